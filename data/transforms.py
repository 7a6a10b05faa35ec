"""From an image to a normalised tensor: the recipe's augmentation in training, resize and crop in evaluation.

The steps are timm's and torchvision's. This module chooses them from the configuration, adds the crops that
timm has not, and mends one operation. What comes after the pixels, normalisation and erasing, stands apart
(`finish`), so that a GPU can do it for whole batches.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.decoding import Mode, Picture, covering_scale
from vil.config import AugmentConfig, ConfigError, DataConfig

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, in pixels."""

TRIVIAL = "trivial"
"""The policy that is torchvision's TrivialAugmentWide and not one of timm's."""


class Transform:
    """An image becomes pixels, uint8, and these a normalised tensor, float32.

    Args:
        crop: brings an image to the model's size: (H, W, 3), or (H, W) where it is grey.
        flips: change these pixels.
        augment: what changes them after that.
        mean: of the channels, for values in 0..1.
        std: of the channels, for values in 0..1.
        erasing: erases parts of a normalised tensor.
    """

    def __init__(
        self,
        crop: Callable[[Picture], np.ndarray],
        mean: Sequence[float],
        std: Sequence[float],
        flips: Sequence[RandomFlip] = (),
        augment: Sequence[Callable[[Image.Image], Image.Image]] = (),
        erasing: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.crop = crop
        self.flips = list(flips)
        self.augment = list(augment)
        self.erasing = erasing
        self._mode: Mode = "RGB" if len(mean) == 3 else "L"
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __call__(self, image: Picture | Image.Image) -> Tensor:
        """(C, H, W), normalised."""
        return self.finish(self.pixels(image))

    def pixels(self, image: Picture | Image.Image) -> Tensor:
        """The first part: (C, H, W), uint8, its memory in the order (H, W, C)."""
        array = self.crop(Picture(image, self._mode) if isinstance(image, Image.Image) else image)
        for flip in self.flips:
            array = flip(array)
        if self.augment:
            changed = Image.fromarray(array)
            for step in self.augment:
                changed = step(changed)
            array = np.asarray(changed)
        return torch.from_numpy(own(array.reshape(*array.shape[:2], -1))).permute(2, 0, 1)

    def finish(self, pixels: Tensor) -> Tensor:
        """The second part: (C, H, W), normalised and erased."""
        normalised = pixels.contiguous().float().div_(255).sub_(self.mean).div_(self.std)
        return normalised if self.erasing is None else self.erasing(normalised)


class RandomFlip:
    """A flip of pixels (H, W[, 3]) along an axis, with a probability, drawn as torchvision draws it."""

    def __init__(self, probability: float, axis: int) -> None:
        self.probability, self.axis = probability, axis

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels, or their mirror image."""
        return self.mirrored(pixels) if self.drawn() else pixels

    def drawn(self) -> bool:
        """Whether to flip."""
        return bool(torch.rand(1) < self.probability)

    def mirrored(self, pixels: np.ndarray) -> np.ndarray:
        """The mirror image."""
        return torch.from_numpy(own(pixels)).flip(self.axis).numpy()  # NumPy's takes ten times as long


def own(pixels: np.ndarray) -> np.ndarray:
    """The pixels in memory of their own order that may be written to, copied where they are not."""
    return pixels if pixels.flags.carray else pixels.copy()


class Encoded(Protocol):
    """An image of which a part can be decoded at a smaller scale, as `Picture`."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""

    def pixels(self, scale: int = 1) -> np.ndarray:
        """(H, W[, 3]), uint8, where H and W are the size, or the size divided by `scale` and rounded up."""


class RandomResizedCrop:
    """The Inception crop, drawn as timm draws it, from the size that the header tells.

    So the image is decoded at the smallest scale that covers the crop: resized afterwards, always with
    antialiasing, by PyTorch's vectorised resize of bytes.

    It is Pillow's crop but for rounding where it is decoded at full scale: values of 256 ImageNet photographs
    at 224² differ by 0.03 of 255 levels on average, and 1 in 7,600 by more than 1 (bicubic, by up to 19).
    Crops of 448 pixels or more (2 % of theirs) are decoded at half scale or less, where libjpeg averages
    pixels that Pillow interpolates: values differ by 3 levels on average, by up to 124 at edges.

    Args:
        size: side of the result, in pixels.
        scale: smallest and largest area, as a fraction of the image.
        ratio: smallest and largest aspect ratio.
        interpolation: bilinear, bicubic, or random for one of both.
    """

    def __init__(
        self, size: int, scale: tuple[float, float], ratio: tuple[float, float], interpolation: str
    ) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio
        self.interpolations = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)

    def __call__(self, picture: Picture) -> np.ndarray:
        """The crop, size × size."""
        return self.cut(picture, *self.draw(*picture.size))

    def cut(self, picture: Encoded, box: Box, interpolation: str) -> np.ndarray:
        """The crop that was drawn, (size, size[, 3]) uint8."""
        width, height = picture.size
        top, left, rows, columns = box
        scale = covering_scale((columns, rows), self.size)
        pixels = picture.pixels(scale)
        if pixels.shape[:2] == (height, width):  # a format that has no scales
            scale = 1
        vertical = _scaled(top, top + rows, scale)
        horizontal = _scaled(left, left + columns, scale)
        return resize(pixels[vertical, horizontal], self.size, interpolation)

    def draw(self, width: int, height: int) -> tuple[Box, str]:
        """The box and the interpolation for an image of that size, from Python's global generator."""
        drawn_from = _OnlySize(width, height)
        box = RandomResizedCropAndInterpolation.get_params(drawn_from, self.scale, self.ratio)
        return box, random.choice(self.interpolations)  # noqa: S311


class _OnlySize(Image.Image):
    """What timm's draw of a crop looks at: an image without pixels."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._size = (width, height)
        self._mode = "RGB"


def _scaled(first: int, end: int, scale: int) -> slice:
    """Positions first:end of a side, where it was decoded at a scale, to the nearest whole position."""
    return slice(round(first / scale), round(end / scale))


def resize(pixels: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """Resizes bytes (H, W[, 3]) to (size, size[, 3]), with antialiasing."""
    if pixels.shape[:2] == (size, size):
        return pixels
    # A batch of one that PyTorch sees as channels-last: twice as fast, and so is what comes out. For that the
    # stride of the batch must be that of a whole image, as unsqueeze makes it.
    tensor = torch.from_numpy(own(pixels.reshape(*pixels.shape[:2], -1)))
    images = tensor.unsqueeze(0).permute(0, 3, 1, 2)  # (H, W, C) -> (1, H, W, C) -> (1, C, H, W)
    resized = F.interpolate(images, (size, size), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).reshape(size, size, *pixels.shape[2:]).numpy()


def train_transform(augment: AugmentConfig, data: DataConfig, *, image_size: int, in_chans: int) -> Transform:
    """The transform of training images: image -> (in_chans, image_size, image_size), normalised.

    Its order is timm's: crop, flips, policy or colour jitter, normalisation, erasing. It draws from the
    global generators of Python, NumPy and PyTorch.

    Raises:
        ConfigError: a value of `augment` or `data` is out of range, or the policy is unknown.
    """
    _check_side(image_size)
    _check_ranges(augment)
    _check_policy(augment.auto_augment)
    mean, std = channel_statistics(data, in_chans)
    trivial = augment.auto_augment == TRIVIAL
    color_jitter: Any = augment.color_jitter or None
    _, secondary, _ = create_transform(
        image_size,
        is_training=True,
        separate=True,
        color_jitter=color_jitter,
        auto_augment=None if trivial else augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        std=std,
    )
    flips = [RandomFlip(p, axis) for p, axis in ((augment.hflip, 1), (augment.vflip, 0)) if p > 0]
    policy = [transforms.TrivialAugmentWide()] if trivial else secondary.transforms
    for step in policy:
        _mend_posterize(step)
    crop = _crop(augment, data, image_size)
    return Transform(crop, mean, std, flips, policy, random_erasing(augment))


def random_erasing(augment: AugmentConfig, device: str = "cpu") -> RandomErasing | None:
    """timm's random erasing, of a normalised tensor (C, H, W), or of each of a batch; None without it."""
    if augment.random_erasing == 0:
        return None
    return RandomErasing(
        augment.random_erasing,
        mode=augment.random_erasing_mode,
        max_count=augment.random_erasing_count,
        num_splits=0,
        device=device,
    )


def evaluation_transform(data: DataConfig, *, image_size: int, in_chans: int) -> Transform:
    """The transform of evaluation images: short side to image_size / crop_pct, centre crop, normalisation.

    Raises:
        ConfigError: image_size, crop_pct, mean or std is out of range.
    """
    _check_side(image_size)
    _check_crop_pct(data, image_size)
    mean, std = channel_statistics(data, in_chans)
    timms = create_transform(
        image_size, crop_pct=data.crop_pct, interpolation=data.interpolation, mean=mean, std=std
    )
    return Transform(_OfWhole(timms.transforms[:2]), mean, std)  # resize and centre crop


def _check_side(image_size: int) -> None:
    """Raise ConfigError for images whose pixels as float32 would take more than 0.8 GB each."""
    if image_size > MAX_SIDE:
        raise ConfigError("model.image_size", f"expected at most {MAX_SIDE} pixels, got {image_size}")


def _check_crop_pct(data: DataConfig, image_size: int) -> None:
    if not 0.01 <= data.crop_pct <= 1:  # below, an image would be enlarged a hundredfold and thrown away
        raise ConfigError("data.crop_pct", f"expected a fraction from 0.01 to 1, got {data.crop_pct}")
    side = image_size / data.crop_pct
    if side > MAX_SIDE:
        reason = f"resizes to {side:,.0f} pixels, of which at most {MAX_SIDE} are possible"
        raise ConfigError("data.crop_pct", reason)


def channel_statistics(data: DataConfig, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; for grey images the averages over red, green and blue."""
    if not all(0 < value < math.inf for value in data.std):
        raise ConfigError("data.std", f"expected positive numbers, got {list(data.std)}")
    if not all(map(math.isfinite, data.mean)):
        raise ConfigError("data.mean", f"expected finite numbers, got {list(data.mean)}")
    if in_chans == 1:
        return (sum(data.mean) / 3,), (sum(data.std) / 3,)
    return data.mean, data.std


MAX_SIDE = 8192
"""Of an image as a model sees it, and of one that is resized before it is cropped; stored options decide."""

LONGEST = 64
"""Longer than so many times its width an image is cut to its middle before it is resized: a picture of one
line of pixels would otherwise take gigabytes, of which a crop leaves a millionth."""


class _OfWhole:
    """Crops that see the whole image."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def __call__(self, picture: Picture) -> np.ndarray:
        image = picture.image()
        if max(image.size) > LONGEST * min(image.size):
            most = LONGEST * min(image.size)
            image = transforms.functional.center_crop(
                image, [min(most, image.height), min(most, image.width)]
            )
        for step in self.steps:
            image = step(image)
        return np.asarray(image)


def _crop(augment: AugmentConfig, data: DataConfig, image_size: int) -> Callable[[Picture], np.ndarray]:
    """Return the crop of a recipe.

    All but the Inception crop resize the short side first: to image_size, or as in evaluation.

    Raises:
        ConfigError: data.crop_pct is out of range.
    """
    if augment.crop == "random_resized":
        return RandomResizedCrop(image_size, augment.scale, augment.ratio, augment.interpolation)
    short_side = image_size
    if augment.crop == "eval_resize_random":
        _check_crop_pct(data, image_size)
        short_side = math.floor(image_size / data.crop_pct)  # as timm's evaluation transform
    drawn = ("bilinear", "bicubic") if augment.interpolation == "random" else (augment.interpolation,)
    resize_short_side = transforms.RandomChoice(
        [transforms.Resize(short_side, InterpolationMode(interpolation)) for interpolation in drawn]
    )
    if augment.crop == "eval_resize_random":
        return _OfWhole([resize_short_side, transforms.RandomCrop(image_size)])
    centre = transforms.CenterCrop(image_size)
    if augment.crop == "none":
        return _OfWhole([resize_short_side, centre])
    if augment.crop == "pad_random":  # as is usual for CIFAR
        shifted = transforms.RandomCrop(image_size, padding=augment.pad)
        return _OfWhole([resize_short_side, centre, shifted])
    # resize_random: the simple random crop of DeiT III (https://arxiv.org/abs/2204.07118, section 3)
    anywhere = transforms.RandomCrop(image_size, padding=augment.pad, padding_mode="reflect")
    return _OfWhole([resize_short_side, anywhere])


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
# timm's grammar: what may follow each policy's name, as in rand-m9-mstd0.5-inc1
_SECTIONS: dict[str, dict[str, str]] = {
    "rand": {
        "m": _INTEGER, "n": "[1-9]", "p": _NUMBER, "mstd": _NUMBER, "mmax": "[1-9][0-9]{0,3}", "inc": "[01]",
        "t": "weights|3aw|3a",
    },
    "augmix": {
        "m": _INTEGER, "w": "[1-9][0-9]?", "d": "[0-9]{1,2}", "a": _ALPHA, "b": "[01]", "mstd": _NUMBER,
    },
    **{name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")},
    TRIVIAL: {},
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
    for field, least, most in (("pad", 0, 4096), ("random_erasing_count", 1, 1000)):
        if not least <= getattr(augment, field) <= most:
            raise ConfigError(f"schedule.augment.{field}", f"expected {least} to {most}")
