"""The files of configs/data load, and contain their command line."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.loading import load, load_validation
from test_sources import write_cifar10

from data.sources import open_source
from vil.command_line import parse
from vil.config import DataConfig, TrainConfig

FOLDER = Path(__file__).parents[2] / "configs/data"


def read(name, *options):
    return parse(TrainConfig, ["--data", str(FOLDER / f"{name}.yaml"), *options]).config.data


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_begin_with_their_command_and_contain_no_defaults(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"--data configs/data/{path.name}" in text
    default = vars(DataConfig())
    for key, value in yaml.safe_load(text).items():
        assert key == "source" or (tuple(value) if isinstance(value, list) else value) != default[key], key
    assert read(path.stem).source


def test_digits_are_normalized_to_zero_mean_and_unit_deviation():
    data = read("digits")
    source = open_source(data, "train", 1)
    images = np.stack([np.asarray(source.load(index)[0]) for index in range(len(source))]) / 255
    assert images.mean() == pytest.approx(data.mean[0], abs=1e-3)
    assert images.std() == pytest.approx(data.std[0], abs=1e-3)


def test_evaluation_does_not_crop_digits():
    validation = load_validation(read("digits", "--data.workers", "0"), in_chans=1, batch_size=360)
    ((images, _),) = validation.loader
    first = np.asarray(open_source(DataConfig(), "val", 1).load(0)[0]) / 255
    assert np.allclose(images[0, 0] * 0.349 + 0.309, first, atol=1e-5)


def test_cifar10_from_torchvision_and_from_folders(tmp_path, monkeypatch, image_folder):
    write_cifar10(tmp_path, monkeypatch)
    data = read("cifar10", "--data.root", str(tmp_path), "--data.workers", "0")
    loaders = load(data, batch_size=4)
    assert len(loaders.class_names) == 10
    assert (loaders.train.steps_per_epoch, loaders.validation.num_images) == (5, 4)

    (image_folder / "val").rename(image_folder / "test")
    argv = ["--data.source", "folder", "--data.root", str(image_folder), "--data.workers", "0"]
    loaders = load(read("cifar10", *argv), batch_size=4)
    assert (len(loaders.class_names), loaders.validation.num_images) == (3, 6)


def test_imagenet_has_the_geometry_of_the_paper():
    data = read("imagenet", "--data.root", "/datasets/imagenet")
    assert (data.source, data.crop_pct, data.interpolation) == ("folder", 0.875, "bicubic")
    assert (data.train_split, data.val_split) == ("train", "val")
