"""Subsets: a fraction of each class, a number per class, a list; the same images in every run."""

import numpy as np
import pytest
from helpers.loading import load
from helpers.sample_images import write_image

from data.sources import open_source
from data.sources.subsets import select_subset
from vil.config import DataConfig
from vil.errors import UserError


def subset(**options):
    source = open_source(DataConfig(), "train", 1)
    part = select_subset(source, DataConfig(**options))
    return {part.describe(index) for index in range(len(part))}, np.bincount(part.targets, minlength=10)


def test_a_larger_fraction_contains_a_smaller_one_of_every_class():
    _, all_sizes = subset()
    one, sizes = subset(train_fraction=0.01)
    tenth, tenth_sizes = subset(train_fraction=0.1)
    half, _ = subset(train_fraction=0.5)
    assert (sizes == np.ceil(all_sizes * 0.01)).all()
    assert (tenth_sizes == np.ceil(all_sizes * 0.1)).all()
    assert one < tenth < half
    assert subset(train_fraction=0.1)[0] == tenth


def test_images_per_class():
    three, sizes = subset(images_per_class=3)
    assert (sizes == 3).all()
    assert three < subset(images_per_class=5)[0]
    assert (subset(images_per_class=10_000)[1] == subset()[1]).all()
    assert (subset(images_per_class=20, train_fraction=0.1)[1] <= 20).all()


def test_a_list_names_paths_or_plain_files(folder_data, image_folder, tmp_path):
    write_image(image_folder / "train/ant/only.png", 1)
    folder_data.list_file = str(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("cat/1.png\n\n./bear/3.png\nonly.png\ncat/1.png\n")
    part = select_subset(open_source(folder_data, "train", 3), folder_data)
    assert [part.name(index) for index in range(len(part))] == ["ant/only.png", "bear/3.png", "cat/1.png"]
    assert part.class_names == ("ant", "bear", "cat")
    assert part.targets.tolist() == [0, 1, 2]
    assert part.load(1)[1] == 1


def test_a_list_may_begin_with_a_byte_order_mark(folder_data, tmp_path):
    folder_data.list_file = str(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfcat/1.png\r\nbear/3.png\r\n")
    part = select_subset(open_source(folder_data, "train", 3), folder_data)
    assert [part.name(index) for index in range(len(part))] == ["bear/3.png", "cat/1.png"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("cat/1.png\ndog/1.png\n", "line 2: dog/1.png is not an image"),
        ("1.png\n", "line 1: 1.png is the name of several"),
        ("\n", "does not name any image"),
        ("cat/1.png\ncat/2.png\n", "all of its images are of one class, cat"),
        (None, "No such file"),
    ],
)
def test_a_bad_list_is_one_line(folder_data, tmp_path, content, reason):
    folder_data.list_file = str(tmp_path / "list.txt")
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=reason) as error:
        select_subset(open_source(folder_data, "train", 3), folder_data)
    assert error.value.location == "data.list_file"


def test_training_sees_the_subset_alone_and_validation_all(folder_data):
    folder_data.images_per_class = 2
    loaders = load(folder_data, image_size=16, batch_size=6)
    assert (loaders.train.steps_per_epoch, loaders.train.num_images) == (1, 6)
    assert (loaders.validation.num_images, len(loaders.class_names)) == (6, 3)
