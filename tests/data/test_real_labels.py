"""ReaL labels: matched by the number in an image's name, and mapped to the classes of the data."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.loading import load_validation
from helpers.sample_images import write_image

from data import NotImageNetError
from vil.config import DataConfig
from vil.errors import UserError

OPTIONS = {"batch_size": 3}
WNIDS = ["n01440764", "n01443537", "n01494475"]  # classes 0, 1 and 4


@pytest.fixture
def data(tmp_path):
    """Five validation images of three classes; of class 7, which two labels name, there is no folder."""
    for number, wnid in zip((3, 1, 5, 2, 4), [WNIDS[0], WNIDS[0], WNIDS[1], WNIDS[2], WNIDS[2]]):
        write_image(tmp_path / "val" / wnid / f"ILSVRC2012_val_{number:08d}.png", number)
    (tmp_path / "real.json").write_text(json.dumps([[0], [], [4, 7], [0, 1, 4], [7]]))
    return DataConfig("folder", str(tmp_path), workers=0, real_labels=str(tmp_path / "real.json"))


def test_labels_follow_the_class(data):
    targets = torch.cat([targets for _, targets in load_validation(data, **OPTIONS).loader])
    assert targets.dtype == torch.int64
    # in the order of the paths: images 1, 3 | 5 | 2, 4
    assert targets.tolist() == [
        [0, 0, -1, -1],
        [0, 2, -1, -1],
        [1, -1, -1, -1],
        [2, -1, -1, -1],
        [2, 0, 1, 2],
    ]


def test_the_file_may_begin_with_a_byte_order_mark(data, tmp_path):
    path = tmp_path / "real.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_validation(data, **OPTIONS).loader.num_images == 5


def test_folders_that_are_named_by_number(tmp_path):
    """They are sorted as text, which puts class 2 after 199."""
    for number in range(1000):
        write_image(tmp_path / "val" / str(number) / f"ILSVRC2012_val_{number + 1:08d}.png", number, (8, 8))
    (tmp_path / "real.json").write_text(json.dumps([[number] for number in range(1000)]))
    data = DataConfig("folder", str(tmp_path), workers=0, real_labels=str(tmp_path / "real.json"))
    targets = torch.cat([targets for _, targets in load_validation(data, **OPTIONS).loader])
    assert torch.equal(targets[:, 0], targets[:, 1])


def test_images_do_not_change_with_real_labels(data):
    plain = load_validation(dataclasses.replace(data, real_labels=None), **OPTIONS).loader
    for (images, targets), (same, labeled) in zip(plain, load_validation(data, **OPTIONS).loader):
        assert torch.equal(images, same)
        assert torch.equal(targets, labeled[:, 0])


def test_images_of_another_name_are_rejected(data):
    write_image(Path(data.root) / "val" / WNIDS[0] / "0.png", 1)
    with pytest.raises(NotImageNetError, match=r"0\.png is none of the 5 images with such labels"):
        load_validation(data, **OPTIONS)


def test_other_classes_are_rejected(folder_data, tmp_path):
    (tmp_path / "real.json").write_text("[[0]]")
    labeled = dataclasses.replace(folder_data, real_labels=str(tmp_path / "real.json"))
    with pytest.raises(NotImageNetError, match="must be named by WordNet ids, not 'ant'"):
        load_validation(labeled, **OPTIONS)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[[1000]]", "[[-1]]", "[[true]]", '[["0"]]', "[" * 100_000]
)
def test_invalid_files(data, text):
    with open(data.real_labels, "w") as file:
        file.write(text)
    with pytest.raises(UserError) as error:
        load_validation(data, **OPTIONS)
    assert error.value.location == "data.real_labels"
    assert "\n" not in str(error.value)
