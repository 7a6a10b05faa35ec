"""Transforms from an image to a normalized tensor: augmentation in training, resize and crop in evaluation.

The steps are timm's, torchvision's and those of `data.crops`, selected by the configuration. Normalization
and erasing are separate (`data.to_device`), so that they run on whole batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.crops import (
    ImageOperation,
    RandomResizedCrop,
    StackedCrops,
    WholeImageCrop,
    as_contiguous,
    interpolations,
)
from data.decoding import EncodedImage
from data.mixing import is_mixing_enabled
from data.policies import policy_operations
from data.to_device import ErasingPlan, NormalizeAndErase, collate_erasing
from vil.config import MAX_SIDE, AugmentConfig, DataConfig, EvalConfig, Size, as_size, check_border_color
from vil.errors import UserError
from vil.runtime.images import max_aspect_ratio


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
    mean, std = channel_statistics(data, in_chans)
    policy = policy_operations(augment, size, mean)
    flips = [RandomFlip(p, axis) for p, axis in ((augment.hflip, 1), (augment.vflip, 0)) if p > 0]
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
    names = interpolations(augment.interpolation)

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
