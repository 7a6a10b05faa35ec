"""From a decoded image to a normalised tensor: the recipe's augmentation in training, resize and crop in
evaluation.

The steps are timm's and torchvision's. This module chooses them from the configuration, adds the crops that
timm has not, and mends one operation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from vil.config import AugmentConfig, ConfigError, DataConfig

Transform = Callable[[Image.Image], Tensor]


def train_transform(augment: AugmentConfig, data: DataConfig, *, image_size: int, in_chans: int) -> Transform:
    """The transform of training images: image -> (in_chans, image_size, image_size), normalised.

    Its order is timm's: crop, flips, policy or colour jitter, normalisation, erasing. It draws from the
    global generators of Python, NumPy and PyTorch.

    Raises:
        ConfigError: a value of `augment` or `data` is out of range, or timm does not know the policy.
    """
    _check_ranges(augment)
    _check_policy(augment.auto_augment)
    mean, std = channel_statistics(data, in_chans)
    color_jitter: Any = augment.color_jitter or None
    primary, secondary, final = create_transform(
        image_size,
        is_training=True,
        separate=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        std=std,
        re_prob=augment.random_erasing,
        re_mode=augment.random_erasing_mode,
        re_count=augment.random_erasing_count,
    )
    random_resized_crop, *flips = primary.transforms
    crop = [random_resized_crop] if augment.crop == "random_resized" else _crop(augment, image_size)
    for step in secondary.transforms:
        _mend_posterize(step)
    return transforms.Compose([*crop, *flips, *secondary.transforms, *final.transforms])


def evaluation_transform(data: DataConfig, *, image_size: int, in_chans: int) -> Transform:
    """The transform of evaluation images: short side to image_size / crop_pct, centre crop, normalisation.

    Raises:
        ConfigError: crop_pct, mean or std is out of range.
    """
    if not 0 < data.crop_pct <= 1:
        raise ConfigError("data.crop_pct", f"expected a fraction in (0, 1], got {data.crop_pct}")
    mean, std = channel_statistics(data, in_chans)
    return create_transform(
        image_size, crop_pct=data.crop_pct, interpolation=data.interpolation, mean=mean, std=std
    )


def channel_statistics(data: DataConfig, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; for grey images the averages over red, green and blue."""
    if not all(0 < value < math.inf for value in data.std):
        raise ConfigError("data.std", f"expected positive numbers, got {list(data.std)}")
    if not all(map(math.isfinite, data.mean)):
        raise ConfigError("data.mean", f"expected finite numbers, got {list(data.mean)}")
    if in_chans == 1:
        return (sum(data.mean) / 3,), (sum(data.std) / 3,)
    return data.mean, data.std


def _crop(augment: AugmentConfig, image_size: int) -> list[Any]:
    """The crops other than the Inception crop; all resize the short side to image_size first."""
    drawn = ("bilinear", "bicubic") if augment.interpolation == "random" else (augment.interpolation,)
    resize = transforms.RandomChoice(
        [transforms.Resize(image_size, InterpolationMode(interpolation)) for interpolation in drawn]
    )
    centre = transforms.CenterCrop(image_size)
    if augment.crop == "none":
        return [resize, centre]
    if augment.crop == "pad_random":  # as is usual for CIFAR
        return [resize, centre, transforms.RandomCrop(image_size, padding=augment.pad)]
    # resize_random: the simple random crop of DeiT III (https://arxiv.org/abs/2204.07118, section 3)
    return [resize, transforms.RandomCrop(image_size, padding=augment.pad, padding_mode="reflect")]


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize, also for a policy that keeps no bits: black, as in Pillow before 13, now an error."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def _mend_posterize(policy: Any) -> None:
    """Exchanges posterize in a policy of timm, and leaves timm itself alone."""
    if isinstance(policy, auto_augment.AutoAugment):
        operations = [operation for sub_policy in policy.policy for operation in sub_policy]
    else:
        operations = getattr(policy, "ops", [])  # RandAugment and AugMix; colour jitter has none
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


_INTEGER, _NUMBER = "[0-9]{1,4}", r"[0-9]{1,4}(\.[0-9]{1,6})?"
_ALPHA = r"[1-9][0-9]{0,3}(\.[0-9]{1,6})?|0\.[1-9][0-9]{0,5}"  # below 0.1 a Dirichlet distribution draws nan
_SECTIONS = {  # timm's grammar: what may follow each policy's name, as in rand-m9-mstd0.5-inc1
    "rand": {
        "m": _INTEGER, "n": "[1-9]", "p": _NUMBER, "mstd": _NUMBER, "mmax": "[1-9][0-9]{0,3}", "inc": "[01]",
        "t": "weights|3aw|3a",
    },
    "augmix": {
        "m": _INTEGER, "w": "[1-9][0-9]?", "d": "[0-9]{1,2}", "a": _ALPHA, "b": "[01]", "mstd": _NUMBER,
    },
    **{name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")},
}  # fmt: skip


def _check_policy(policy: str | None) -> None:
    """timm passes over a section without a number and fails assertions on others; both are errors here."""
    if policy is None:
        return
    key = "schedule.augment.auto_augment"
    name, *sections = policy.split("-")
    if name not in _SECTIONS:
        raise ConfigError(key, f"unknown policy {name!r} in {policy!r}; known are {', '.join(_SECTIONS)}")
    grammar = _SECTIONS[name]
    for section in sections:
        if not any(re.fullmatch(f"{letter}({value})", section) for letter, value in grammar.items()):
            known = ", ".join(grammar)
            raise ConfigError(
                key,
                f"cannot read {section!r} in {policy!r}; known are {known}, each with a value of its kind",
            )


def _check_ranges(augment: AugmentConfig) -> None:
    for field in ("hflip", "vflip", "random_erasing"):
        if not 0 <= getattr(augment, field) <= 1:
            raise ConfigError(f"schedule.augment.{field}", "expected a probability in [0, 1]")
    smallest, largest = augment.scale
    if not 0 < smallest <= largest <= 1:
        raise ConfigError("schedule.augment.scale", "expected two rising fractions of the image in (0, 1]")
    narrowest, widest = augment.ratio
    if not 1e-3 <= narrowest <= widest <= 1e3:
        raise ConfigError("schedule.augment.ratio", "expected two rising numbers from 0.001 to 1000")
    if not 0 <= augment.color_jitter <= 100:
        raise ConfigError("schedule.augment.color_jitter", "expected a strength in [0, 100]")
    for field, least in (("pad", 0), ("random_erasing_count", 1)):
        if getattr(augment, field) < least:
            raise ConfigError(f"schedule.augment.{field}", f"expected at least {least}")
