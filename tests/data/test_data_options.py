"""Every option of the sections data and schedule.augment changes what it configures."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loading import load
from helpers.sample_images import write_image

from data import Mixing
from vil.config import AugmentConfig, DataConfig
from vil.errors import UserError

Options = dict[str, Any]
MIX: Options = {"mixup": 0.8, "cutmix": 1.0}

AUGMENT: dict[str, tuple[Any, Options]] = {
    "crop": ("pad_random", {}),
    "scale": ((0.9, 1.0), {}),
    "ratio": ((1.0, 1.0), {}),
    "pad": (8, {"crop": "pad_random"}),
    "hflip": (1.0, {"hflip": 0.0}),
    "vflip": (1.0, {}),
    "interpolation": ("bilinear", {"interpolation": "bicubic"}),
    "color_jitter": (0.4, {}),
    "auto_augment": ("rand-m9-mstd0.5-inc1", {}),
    "aug_splits": (2, {"auto_augment": "rand-m9-mstd0.5-inc1"}),
    "random_erasing": (1.0, {}),
    "random_erasing_mode": ("const", {"random_erasing": 1.0}),
    "random_erasing_count": (5, {"random_erasing": 1.0}),
    "mixup": (0.8, {}),
    "cutmix": (1.0, {}),
    "cutmix_minmax": ((0.4, 0.5), {}),
    "mixup_prob": (0.0, {**MIX, "mixup_mode": "pair"}),
    "mixup_switch_prob": (0.0, {**MIX, "mixup_switch_prob": 1.0}),
    "mixup_mode": ("elem", MIX),
    "mixup_until": (0, MIX),
    "repeated_augmentation": (3, {}),
}
"""Option -> another value than the default, and options of both runs."""

DATA: dict[str, tuple[Any, Options, str]] = {
    "source": ("digits", {}, "classes"),
    "root": ("other", {}, "train"),
    "train_split": ("other/train", {}, "train"),
    "val_split": ("other/val", {}, "validation"),
    "val_fraction": (0.5, {"root": "whole", "val_fraction": 0.25}, "validation"),
    "val_seed": (1, {"root": "whole", "val_fraction": 0.5}, "validation"),
    "val_list": ("others.txt", {"root": "whole", "val_list": "some.txt"}, "validation"),
    "index": ("index", {}, "files"),
    "unreadable_images": ("skip", {"train_split": "damaged", "max_unreadable_fraction": 1.0}, "error"),
    "max_unreadable_fraction": (0.0, {"train_split": "damaged", "unreadable_images": "skip"}, "error"),
    "train_fraction": (0.5, {}, "train"),
    "images_per_class": (1, {}, "train"),
    "list_file": ("some.txt", {}, "train"),
    "balanced_sampling": (True, {"train_split": "unbalanced"}, "drawn"),
    "crop_pct": (0.5, {}, "pixels"),
    "crop_mode": ("squash", {}, "pixels"),
    "interpolation": ("nearest", {}, "pixels"),
    "mean": ((0.1, 0.2, 0.3), {}, "pixels"),
    "std": ((0.1, 0.2, 0.3), {}, "pixels"),
}
"""Option -> another value than the default, options of both runs, and the effect that must differ."""

TESTED_ELSEWHERE = {"download", "ffcv_order", "real_labels", "workers"}
"""In test_sources, test_ffcv, test_real_labels and test_loaders: they need other data, or processes."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with several training and validation splits."""
    root = tmp_path_factory.mktemp("options")
    ants = {"train": 8, "val": 2, "other/train": 8, "other/val": 2, "damaged": 4, "unbalanced": 8, "whole": 8}
    for seed, (split, count) in enumerate(ants.items()):
        for number in range(count):
            write_image(root / split / "ant" / f"ant{number}.png", 100 * seed + number, (60, 40))
        for number in range(2 if split == "unbalanced" else count):
            write_image(root / split / "bear" / f"bear{number}.png", 100 * seed + 50 + number, (60, 40))
    (root / "damaged/ant/ant0.png").write_bytes(b"no image")
    (root / "some.txt").write_text("ant1.png\nbear0.png\nbear1.png\n")
    (root / "others.txt").write_text("ant2.png\nbear0.png\n")
    return root


def augmented(root: Path, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images and targets of the first step of a run."""
    augment = AugmentConfig(**options)
    data = DataConfig("folder", str(root), workers=0)
    images, targets = next(iter(load(data, augment, batch_size=8).train.epoch(0)))[:2]
    return Mixing(augment, 2, 0.1, seed=0)(images.clone(), targets, step=0, rank=0, part=0, epoch=0)


@pytest.mark.parametrize("name", AUGMENT)
def test_an_option_of_the_augmentation_has_its_effect(name: str, root: Path):
    value, base = AUGMENT[name]
    first, second = augmented(root, base), augmented(root, base)
    assert all(torch.equal(*pair) for pair in zip(first, second))
    changed = augmented(root, {**base, name: value})
    assert not all(torch.equal(*pair) for pair in zip(first, changed))


def effects(root: Path, folder: Path, options: Options) -> Options:
    """Open both splits, load an epoch, and return what options can change."""
    paths = {
        name: str((folder if name == "index" else root) / options[name])
        for name in ("root", "val_list", "list_file", "index")
        if name in options
    }
    data = DataConfig(**{"source": "folder", "root": str(root), "workers": 0} | options | paths)
    if data.source == "digits":
        data.root = None
    error, drawn = None, []
    loaders = load(data, batch_size=2, output=folder)
    try:
        for step, _ in enumerate(loaders.train.epoch(0)):
            drawn += loaders.train.samples(0, step)
    except UserError as caught:
        error = caught.reason
    images, _ = next(iter(loaders.validation))[:2]
    train, validation = loaders.train_source, loaders.validation_source
    return {
        "error": error,
        "classes": loaders.class_names,
        "train": [train.describe(index) for index in range(len(train))],
        "validation": [validation.describe(index) for index in range(len(validation))],
        "drawn": sorted(drawn),
        "pixels": images.tolist(),
        "files": {path.relative_to(folder).parts[0] for path in folder.rglob("*")},
    }


@pytest.mark.parametrize("name", DATA)
def test_an_option_of_the_data_has_its_effect(name: str, root: Path, tmp_path: Path):
    value, base, effect = DATA[name]
    first = effects(root, tmp_path / "first", base)
    assert first == effects(root, tmp_path / "second", base)
    assert first[effect] != effects(root, tmp_path / "changed", {**base, name: value})[effect]


def test_every_option_has_an_entry():
    assert AUGMENT.keys() == {field.name for field in dataclasses.fields(AugmentConfig)}
    assert DATA.keys() == {field.name for field in dataclasses.fields(DataConfig)} - TESTED_ELSEWHERE
