"""Transforms from an image to a normalized tensor: augmentation in training, resize and crop in evaluation.

The steps are timm's and torchvision's. This module selects them by the configuration, adds crops that timm
lacks, and patches one operation. Normalization and erasing are separate (`data.to_device`), so that they run
on whole batches.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, ResizeKeepRatio
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.decoding import EncodedImage, covering_scale
from data.mixing import is_mixing_enabled
from data.to_device import ErasingPlan, NormalizeAndErase, collate_erasing
from vil.config import (
    MAX_SIDE,
    AugmentConfig,
    DataConfig,
    EvalConfig,
    Size,
    UserError,
    as_size,
    check_border_color,
)
from vil.runtime.images import MAX_ASPECT_RATIO, limit_aspect_ratio, max_aspect_ratio

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, in pixels."""
ImageOperation = Callable[[Image.Image], Image.Image]

TRIVIAL_AUGMENT = "trivial"
"""The policy of torchvision's TrivialAugmentWide; all others are timm's."""


@dataclass(eq=False)
class Transform:
    """Map an image to pixels, uint8, and these to a normalized tensor, float32.

    Attributes:
        crop: maps an image to pixels of the model's size: (H, W, 3), or (H, W) if it is gray.
        mean: mean per channel, of values in 0..1.
        std: standard deviation per channel, of values in 0..1.
        flips: random flips of the pixels.
        augment: operations after the flips.
        erasing: random erasing of the normalized tensor.
        aug_splits: views of an image, as of timm's AugMixDataset: the first is cropped and flipped only, the
            others are augmented and erased as well.
    """

    crop: Callable[[EncodedImage], np.ndarray]
    mean: Sequence[float]
    std: Sequence[float]
    flips: Sequence[RandomFlip] = ()
    augment: Sequence[ImageOperation] = ()
    erasing: RandomErasing | None = None
    aug_splits: int = 1

    def __call__(self, image: EncodedImage | Image.Image) -> Tensor:
        """Return the image as (C, H, W) float32, or its views as (S, C, H, W), normalized and erased."""
        pixels, normalize_and_erase = self.pixels(image), NormalizeAndErase(self.mean, self.std)
        views, erased = pixels.view(-1, *pixels.shape[-3:]), collate_erasing(self.draw_erasing(pixels.shape))
        return normalize_and_erase(views, erased).view(pixels.shape)

    def pixels(self, image: EncodedImage | Image.Image) -> Tensor:
        """Return the augmented pixels, (C, H, W) uint8, in memory in the order (H, W, C).

        With `aug_splits`, those of all views: (S, C, H, W).
        """
        if isinstance(image, Image.Image):
            image = EncodedImage(image, "RGB" if len(self.mean) == 3 else "L")
        array = self.crop(image)
        for flip in self.flips:
            array = flip.flip(array) if flip.draw() else array
        if self.aug_splits > 1:
            array = np.stack([array, *(self._augmented(array) for _ in range(self.aug_splits - 1))])
        else:
            array = self._augmented(array)
        # ([S,] H, W[, C]) -> ([S,] H, W, C) -> ([S,] C, H, W)
        sides = array.shape[: 3 if self.aug_splits > 1 else 2]
        array = array.reshape(*sides, -1)
        return torch.from_numpy(as_contiguous(array)).movedim(-1, -3)

    def _augmented(self, array: np.ndarray) -> np.ndarray:
        if not self.augment:
            return array
        augmented = Image.fromarray(array)
        for operation in self.augment:
            augmented = operation(augmented)
        return np.asarray(augmented)

    def draw_erasing(self, shape: Sequence[int]) -> list[ErasingPlan]:
        """Draw the erasing of each view of `pixels`, which have `shape`; to be called after `pixels`."""
        clean = [ErasingPlan()] if self.aug_splits > 1 else []
        count = max(1, self.aug_splits - 1)
        return clean + [ErasingPlan.draw(self.erasing, shape[-3:]) for _ in range(count)]


class RandomFlip(NamedTuple):
    """A flip of pixels (H, W[, 3]) along an axis with a probability, drawn as torchvision draws it."""

    probability: float
    axis: int

    def draw(self) -> bool:
        """Draw whether to flip."""
        return bool(torch.rand(1) < self.probability)

    def flip(self, pixels: np.ndarray) -> np.ndarray:
        """Return the flipped pixels."""
        # Ten times faster than NumPy's flip.
        return torch.from_numpy(as_contiguous(pixels)).flip(self.axis).numpy()


def as_contiguous(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels in writable, C-contiguous memory, copied if necessary."""
    return pixels if pixels.flags.carray else pixels.copy()


class DecodableImage(Protocol):
    """An image that can be decoded at a reduced scale, e.g. `EncodedImage`."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""

    def decode(self, scale: int = 1) -> np.ndarray:
        """Return (H, W[, 3]) uint8: H and W are the size, or the size divided by `scale` and rounded up."""


@dataclass(frozen=True)
class RandomResizedCrop:
    """The Inception crop, drawn as timm draws it, from the size in the image's header.

    The image is decoded at the smallest scale that covers the crop, and resized, always with antialiasing, by
    PyTorch's vectorized resize of bytes.

    At full scale it is Pillow's crop but for rounding: values of 256 ImageNet photographs at 224² differ by
    0.03 of 255 levels on average, and 1 in 7,600 by more than 1 (bicubic, by up to 19). Crops of 448 pixels
    or more (2 % of them) are decoded at half scale or less, where libjpeg averages pixels that Pillow
    interpolates: values differ by 3 levels on average, by up to 124 at edges.

    Attributes:
        size: (height, width) of the result in pixels, or one number for both.
        scale: smallest and largest area, as a fraction of the image.
        ratio: smallest and largest aspect ratio.
        interpolation: bilinear, bicubic, or random for either.
    """

    size: int | Size
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str

    def __call__(self, image: EncodedImage) -> np.ndarray:
        """Return a random crop, (H, W[, 3]) uint8."""
        return self.crop(image, *self.draw(*image.size))

    def crop(self, image: DecodableImage, box: Box, interpolation: str) -> np.ndarray:
        """Return the crop of a box, (H, W[, 3]) uint8."""
        width, height = image.size
        top, left, rows, columns = box
        scale = covering_scale((rows, columns), self.size)
        pixels = image.decode(scale)
        if pixels.shape[:2] == (height, width):  # the format has no reduced scales
            scale = 1
        vertical = _scaled_slice(top, top + rows, scale)
        horizontal = _scaled_slice(left, left + columns, scale)
        return resize(pixels[vertical, horizontal], as_size(self.size), interpolation)

    def draw(self, width: int, height: int) -> tuple[Box, str]:
        """Draw box and interpolation for an image of this size from Python's global generator."""
        image = _ImageSize(width, height)
        top, left, rows, columns = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
        # timm rounds the side of a tiny area, or of an extreme aspect ratio, to 0, at the last edge, too.
        box = (min(top, height - 1), min(left, width - 1), max(1, rows), max(1, columns))
        return box, random.choice(_interpolations(self.interpolation))  # noqa: S311


def _interpolations(name: str) -> tuple[str, ...]:
    return ("bilinear", "bicubic") if name == "random" else (name,)


class _ImageSize(Image.Image):
    """An image without pixels, for timm's draw of a crop, which reads the size alone."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._size = (width, height)
        self._mode = "RGB"


def _scaled_slice(start: int, stop: int, scale: int) -> slice:
    """Return start:stop of a side that was decoded at a scale, rounded to whole pixels."""
    return slice(round(start / scale), round(stop / scale))


def resize(pixels: np.ndarray, size: Size, interpolation: str) -> np.ndarray:
    """Resize bytes (H, W[, 3]) to (*size[, 3]), with antialiasing."""
    if pixels.shape[:2] == size:
        return pixels
    # PyTorch is twice as fast on a batch of one that it recognizes as channels-last, as is the result. The
    # batch must have the stride of a whole image, as unsqueeze sets it.
    tensor = torch.from_numpy(as_contiguous(pixels.reshape(*pixels.shape[:2], -1)))
    images = tensor.unsqueeze(0).permute(0, 3, 1, 2)  # (H, W, C) -> (1, H, W, C) -> (1, C, H, W)
    resized = F.interpolate(images, size, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).reshape(*size, *pixels.shape[2:]).numpy()


@dataclass(frozen=True)
class WholeImageCrop:
    """A crop that decodes the whole image and applies steps of torchvision or timm to it."""

    steps: Sequence[ImageOperation]
    max_aspect_ratio: int = MAX_ASPECT_RATIO

    def __call__(self, encoded: EncodedImage) -> np.ndarray:
        """Return the crop, (H, W[, 3]) uint8."""
        image = limit_aspect_ratio(encoded.to_pil(), self.max_aspect_ratio)
        for step in self.steps:
            image = step(image)
        return np.asarray(image)


@dataclass(frozen=True)
class StackedCrops:
    """Crops of one image, one after the other along the channels.

    Attributes:
        resizes: resizes of the whole image, one per scale.
        crop: a resized image → one crop, or several.
        max_aspect_ratio: limit of the aspect ratio of the image.
    """

    resizes: Sequence[ImageOperation]
    crop: Callable[[Image.Image], Image.Image | tuple[Image.Image, ...]]
    max_aspect_ratio: int

    def __call__(self, encoded: EncodedImage) -> np.ndarray:
        """Return the crops, (H, W, crops * C) uint8, those of the first scale first."""
        image = limit_aspect_ratio(encoded.to_pil(), self.max_aspect_ratio)
        crops = [self.crop(resize_image(image)) for resize_image in self.resizes]
        flat = [crop for group in crops for crop in (group if isinstance(group, tuple) else (group,))]
        return np.dstack([np.asarray(crop) for crop in flat])


def train_transform(
    augment: AugmentConfig, data: DataConfig, *, image_size: int | Size, in_chans: int
) -> Transform:
    """Build the transform of training images: image -> (in_chans, height, width), normalized.

    The order is timm's: crop, flips, policy or color jitter, normalization, erasing. The draws are from the
    global generators of Python, NumPy and PyTorch.

    Raises:
        UserError: an unknown policy, or `aug_splits` without augmentation or with mixing.
    """
    _check_aug_splits(augment)
    size = as_size(image_size)
    _check_policy(augment.auto_augment)
    mean, std = channel_statistics(data, in_chans)
    is_trivial = augment.auto_augment == TRIVIAL_AUGMENT
    _, secondary, _ = create_transform(
        size,
        is_training=True,
        separate=True,
        color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]  # timm's annotation lacks None
        auto_augment=None if is_trivial else augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        std=std,
    )
    flips = [RandomFlip(p, axis) for p, axis in ((augment.hflip, 1), (augment.vflip, 0)) if p > 0]
    policy = [transforms.TrivialAugmentWide()] if is_trivial else secondary.transforms
    for step in policy:
        patch_posterize(step)
    erasing = _random_erasing(augment)
    return Transform(_crop(augment, data, size), mean, std, flips, policy, erasing, augment.aug_splits)


def evaluation_transform(data: DataConfig, *, image_size: int | Size, in_chans: int) -> Transform:
    """Build the transform of evaluation images: resize and crop by `data.crop_mode`, normalization."""
    size = as_size(image_size)
    mean, std = channel_statistics(data, in_chans)
    steps = _evaluation_steps(data, size, mean, data.crop_pct)
    return Transform(WholeImageCrop(steps, max_aspect_ratio(data.crop_mode, size)), mean, std)


def tta_transform(config: EvalConfig) -> Transform:
    """Build the transform for test-time augmentation by `config.tta` and `config.tta_scales`.

    Pixels are (crops * in_chans, H, W): the crops of `StackedCrops`, without mirror images, which the model
    computes (`vil.evaluation.tta`). The center crop at scale 1 is that of `evaluation_transform`.

    Raises:
        UserError: a crop would be larger than the image.
    """
    data, size, in_chans = config.data, config.model.size, config.model.in_chans
    mean, std = channel_statistics(data, in_chans)
    has_corners = config.tta in ("five_crop", "ten_crop")
    if has_corners and data.crop_mode == "border":
        raise UserError("tta", f"{config.tta} requires data.crop_mode center or squash, got border")
    crop: Callable[[Image.Image], Image.Image | tuple[Image.Image, ...]] = transforms.FiveCrop(size)
    resizes = []
    for scale in config.tta_scales:
        if scale < data.crop_pct:
            reason = f"{scale:g} is less than data.crop_pct, {data.crop_pct:g}: the crop would be larger than"
            raise UserError("tta_scales", f"{reason} the image")
        if max(size) * scale / data.crop_pct > MAX_SIDE:
            reason = f"image_size * {scale:g} / crop_pct is more than {MAX_SIDE:,} pixels"
            raise UserError("tta_scales", reason)
        resize_image, center_crop = _evaluation_steps(data, size, mean, data.crop_pct / scale)
        resizes.append(resize_image)
        crop = crop if has_corners else center_crop  # the same at every scale
    stacked = StackedCrops(resizes, crop, max_aspect_ratio(data.crop_mode, size))
    num_crops = len(resizes) * (5 if has_corners else 1)
    return Transform(stacked, tuple(mean) * num_crops, tuple(std) * num_crops)


def _evaluation_steps(
    data: DataConfig, size: Size, mean: tuple[float, ...], crop_pct: float
) -> Sequence[ImageOperation]:
    """Return timm's resize and crop of evaluation images."""
    _check_resized_size(data, size)
    check_border_color(data)
    transform = create_transform(
        size, crop_pct=crop_pct, crop_mode=data.crop_mode, interpolation=data.interpolation, mean=mean
    )
    steps: Sequence[ImageOperation] = transform.transforms[:2]
    return steps


def channel_statistics(data: DataConfig, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel; gray images have the averages over RGB."""
    if in_chans == 1:
        return (sum(data.mean) / 3,), (sum(data.std) / 3,)
    return data.mean, data.std


def _check_resized_size(data: DataConfig, size: Size) -> None:
    side = max(size) / data.crop_pct
    if side > MAX_SIDE:
        reason = f"image_size / crop_pct is {side:,.0f} pixels, expected at most {MAX_SIDE:,}"
        raise UserError("data.crop_pct", reason)


def _check_aug_splits(augment: AugmentConfig) -> None:
    if augment.aug_splits == 1:
        return
    reason = None
    if is_mixing_enabled(augment):
        reason = "cannot be combined with mixup and cutmix"
    elif augment.auto_augment is None and not augment.color_jitter and not augment.random_erasing:
        reason = "the views of an image would be equal: needs auto_augment, e.g. augmix-m3-w3"
    if reason is not None:
        raise UserError("schedule.augment.aug_splits", reason)


def _random_erasing(augment: AugmentConfig) -> RandomErasing | None:
    if augment.random_erasing == 0:
        return None
    return RandomErasing(
        augment.random_erasing,
        mode=augment.random_erasing_mode,
        max_count=augment.random_erasing_count,
        num_splits=0,
        device="cpu",
    )


def _crop(augment: AugmentConfig, data: DataConfig, size: Size) -> Callable[[EncodedImage], np.ndarray]:
    """Build the crop of training images.

    All but the Inception crop resize the image first, to cover `size`, or as in evaluation.
    """
    names = _interpolations(augment.interpolation)

    def resize_to_cover(covered: Size) -> ImageOperation:
        return transforms.RandomChoice([_resize_to_cover(covered, name) for name in names])

    match augment.crop:
        case "random_resized":
            return RandomResizedCrop(size, augment.scale, augment.ratio, augment.interpolation)
        case "none":
            return WholeImageCrop([resize_to_cover(size), transforms.CenterCrop(size)])
        case "pad_random":  # as is usual for CIFAR
            shift = transforms.RandomCrop(size, padding=augment.pad)
            return WholeImageCrop([resize_to_cover(size), transforms.CenterCrop(size), shift])
        case "resize_random":  # of DeiT III (https://arxiv.org/abs/2204.07118, section 3)
            reflected = transforms.RandomCrop(size, padding=augment.pad, padding_mode="reflect")
            return WholeImageCrop([resize_to_cover(size), reflected])
        case "eval_resize_random":
            _check_resized_size(data, size)
            height, width = (math.floor(side / data.crop_pct) for side in size)  # as timm in evaluation
            return WholeImageCrop([resize_to_cover((height, width)), transforms.RandomCrop(size)])


def _resize_to_cover(size: Size, interpolation: str) -> ImageOperation:
    """Return timm's resize of an image to the smallest size of the same aspect ratio that covers `size`."""
    height, width = size
    if height == width:
        return transforms.Resize(height, InterpolationMode(interpolation))
    return ResizeKeepRatio(size, interpolation=interpolation)


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """Posterize as timm does, but return black for 0 bits, which Pillow 13 rejects."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


def patch_posterize(policy: ImageOperation) -> None:
    """Replace posterize in a policy of timm by one that accepts 0 bits; timm itself is not changed."""
    if isinstance(policy, auto_augment.AutoAugment):
        operations = [operation for sub_policy in policy.policy for operation in sub_policy]
    else:
        operations = getattr(policy, "ops", [])  # RandAugment and AugMix; color jitter has none
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize


_INTEGER, _NUMBER = "[0-9]{1,4}", r"[0-9]{1,4}(\.[0-9]{1,6})?"
_ALPHA = r"[1-9][0-9]{0,3}(\.[0-9]{1,6})?|0\.[1-9][0-9]{0,5}"  # below 0.1 a Dirichlet distribution draws nan
_POLICY_SECTIONS: dict[str, dict[str, str]] = {
    "rand": {
        "m": _INTEGER,
        "n": "[1-9]",
        "p": _NUMBER,
        "mstd": _NUMBER,
        "mmax": "[1-9][0-9]{0,3}",
        "inc": "[01]",
        "t": "weights|3aw|3a",
    },
    "augmix": {
        "m": _INTEGER,
        "w": "[1-9][0-9]?",
        "d": "[0-9]{1,2}",
        "a": _ALPHA,
        "b": "[01]",
        "mstd": _NUMBER,
    },
    **{name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")},
    TRIVIAL_AUGMENT: {},
}
"""timm's grammar of policies, e.g. rand-m9-mstd0.5-inc1: name -> section -> pattern of its value."""


def _check_policy(policy: str | None) -> None:
    """Raise UserError for sections that timm ignores or that fail its assertions."""
    if policy is None:
        return
    name, *sections = policy.split("-")
    grammar, reason = _POLICY_SECTIONS.get(name, {}), None
    if name not in _POLICY_SECTIONS:
        reason = f"unknown policy {name!r} in {policy!r}; expected one of {', '.join(_POLICY_SECTIONS)}"
    for section in sections:
        if not any(re.fullmatch(f"{letter}({value})", section) for letter, value in grammar.items()):
            known = ", ".join(grammar)
            reason = (
                reason or f"invalid section {section!r} in {policy!r}; expected one of {known}, with a value"
            )
    if reason is not None:
        raise UserError("schedule.augment.auto_augment", reason)
