"""Subsets: a share of each class, so many of each, a list; the same ones in every run."""

import numpy as np
import pytest
from sample_images import write_image

from data import build_loaders
from data.sources import open_source
from data.subsets import chosen
from vil.config import AugmentConfig, ConfigError, DataConfig


def subset(**options):
    source = open_source(DataConfig(), "train", 1)
    part = chosen(source, DataConfig(**options))
    return {part.describe(index) for index in range(len(part))}, np.bincount(part.targets, minlength=10)


def test_a_share_takes_its_part_of_every_class_and_grows():
    _, all_sizes = subset()
    one, sizes = subset(train_fraction=0.01)
    tenth, tenth_sizes = subset(train_fraction=0.1)
    half, _ = subset(train_fraction=0.5)
    assert (sizes == np.ceil(all_sizes * 0.01)).all()
    assert (tenth_sizes == np.ceil(all_sizes * 0.1)).all()
    assert one < tenth < half
    assert subset(train_fraction=0.1)[0] == tenth


def test_so_many_images_of_each_class():
    three, sizes = subset(images_per_class=3)
    assert (sizes == 3).all()
    assert three < subset(images_per_class=5)[0]
    assert (subset(images_per_class=10_000)[1] == subset()[1]).all()
    assert (subset(images_per_class=20, train_fraction=0.1)[1] <= 20).all()


def test_a_list_names_paths_or_plain_files(folder_data, image_folder, tmp_path):
    write_image(image_folder / "train/ant/only.png", 1)
    folder_data.list_file = str(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("cat/1.png\n\n./bear/3.png\nonly.png\ncat/1.png\n")
    part = chosen(open_source(folder_data, "train", 3), folder_data)
    assert [part.name(index) for index in range(len(part))] == ["ant/only.png", "bear/3.png", "cat/1.png"]
    assert part.class_names == ("ant", "bear", "cat")
    assert part.targets.tolist() == [0, 1, 2]
    assert part.load(1)[1] == 1


def test_a_list_may_begin_with_a_byte_order_mark(folder_data, tmp_path):
    folder_data.list_file = str(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfcat/1.png\r\nbear/3.png\r\n")
    part = chosen(open_source(folder_data, "train", 3), folder_data)
    assert [part.name(index) for index in range(len(part))] == ["bear/3.png", "cat/1.png"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("cat/1.png\ndog/1.png\n", "line 2: dog/1.png is no image"),
        ("1.png\n", "line 1: 1.png is the name of several"),
        ("\n", "names no image"),
        ("cat/1.png\ncat/2.png\n", "all of its images are of one class, cat"),
        (None, "No such file"),
    ],
)
def test_a_bad_list_is_one_line(folder_data, tmp_path, content, reason):
    folder_data.list_file = str(tmp_path / "list.txt")
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ConfigError, match=reason) as error:
        chosen(open_source(folder_data, "train", 3), folder_data)
    assert error.value.key == "data.list_file"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_fraction", 0.0),
        ("train_fraction", 1.5),
        ("train_fraction", float("nan")),
        ("images_per_class", 0),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError) as error:
        subset(**{field: value})
    assert error.value.key == f"data.{field}"


def test_training_sees_the_subset_alone_and_validation_all(folder_data):
    folder_data.images_per_class = 2
    loaders = build_loaders(
        folder_data, AugmentConfig(), image_size=16, in_chans=3, batch_size=6, accumulation=1, seed=0
    )
    assert (loaders.train.steps_per_epoch, loaders.train.num_images) == (1, 6)
    assert (loaders.validation.num_images, loaders.num_classes) == (6, 3)
