"""Small data sets on disk, and photographs if they are available."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.sample_images import NO_AUGMENT, write_image

from vil.config import AugmentConfig, DataConfig

torch.set_num_threads(1)


@pytest.fixture
def image_folder(tmp_path):
    """root/train with 3 classes × 4 images and root/val with 3 × 2, of several sizes, one of them gray."""
    for split, count in (("train", 4), ("val", 2)):
        for index, name in enumerate(("bear", "cat", "ant")):
            for number in range(count):
                mode = "L" if number == 1 and name == "cat" else "RGB"
                path = tmp_path / split / name / f"{number}.png"
                write_image(path, 100 * index + number, (40 + 3 * number, 30), mode)
    return tmp_path


@pytest.fixture
def folder_data(image_folder):
    return DataConfig(source="folder", root=str(image_folder), workers=0)


@pytest.fixture
def no_augment():
    return AugmentConfig(**NO_AUGMENT)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Folder of 256 photographs in train/<class>; the test is skipped if they are not available."""
    archive = Path(__file__).parents[3] / "shared/data/imagenet_sample.tar"
    if not archive.exists():
        pytest.skip("the sample of photographs is not available")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return os.fspath(folder / "imagenet_sample")
