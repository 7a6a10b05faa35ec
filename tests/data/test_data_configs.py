"""The files of configs/data load, say how they are used, and describe their data sets rightly."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from test_sources import write_cifar10

from data import build_loaders, build_validation
from data.sources import open_source
from vil.command_line import parse
from vil.config import AugmentConfig, DataConfig, TrainConfig

FOLDER = Path(__file__).parents[2] / "configs/data"


def read(name, *options):
    return parse(TrainConfig, ["--data", str(FOLDER / f"{name}.yaml"), *options]).config.data


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_open_with_their_command_and_hold_only_what_differs(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"--data configs/data/{path.name}" in text
    default = vars(DataConfig())
    for key, value in yaml.safe_load(text).items():
        assert key == "source" or (tuple(value) if isinstance(value, list) else value) != default[key], key
    assert read(path.stem).source


def test_digits_are_normalised_to_zero_mean_and_unit_deviation():
    data = read("digits")
    source = open_source(data, "train", 1)
    images = np.stack([np.asarray(source.load(index)[0]) for index in range(len(source))]) / 255
    assert images.mean() == pytest.approx(data.mean[0], abs=1e-3)
    assert images.std() == pytest.approx(data.std[0], abs=1e-3)


def test_digits_lose_nothing_in_evaluation():
    validation = build_validation(
        read("digits", "--data.workers", "0"), image_size=32, in_chans=1, batch_size=360
    )
    ((images, _),) = validation.loader
    first = np.asarray(open_source(DataConfig(), "val", 1).load(0)[0]) / 255
    assert np.allclose(images[0, 0] * 0.349 + 0.309, first, atol=1e-5)


def test_cifar10_from_torchvision_and_from_folders(tmp_path, monkeypatch, image_folder):
    write_cifar10(tmp_path, monkeypatch)
    options = {"image_size": 32, "in_chans": 3, "batch_size": 4, "accumulation": 1, "seed": 0}
    data = read("cifar10", "--data.root", str(tmp_path), "--data.workers", "0")
    loaders = build_loaders(data, AugmentConfig(), **options)
    assert (loaders.num_classes, loaders.train.steps_per_epoch, loaders.validation.num_images) == (10, 5, 4)

    (image_folder / "val").rename(image_folder / "test")
    words = ["--data.source", "folder", "--data.root", str(image_folder), "--data.workers", "0"]
    loaders = build_loaders(read("cifar10", *words), AugmentConfig(), **options)
    assert (loaders.num_classes, loaders.validation.num_images) == (3, 6)


def test_imagenet_has_the_geometry_of_the_paper():
    data = read("imagenet", "--data.root", "/datasets/imagenet")
    assert (data.source, data.crop_pct, data.interpolation) == ("folder", 0.875, "bicubic")
    assert (data.train_split, data.val_split) == ("train", "val")
