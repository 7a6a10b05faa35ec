"""Crops: an encoded image → pixels of the model's size, decoded at the scale that the crop needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn import functional as F

from data.decoding import EncodedImage, covering_scale
from vil.config import Size, as_size
from vil.runtime.images import MAX_ASPECT_RATIO, limit_aspect_ratio

Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop, in pixels."""
ImageOperation = Callable[[Image.Image], Image.Image]


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
        return box, random.choice(interpolations(self.interpolation))  # noqa: S311


def interpolations(name: str) -> tuple[str, ...]:
    """Return the interpolations that `schedule.augment.interpolation` draws from."""
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


def as_contiguous(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels in writable, C-contiguous memory, copied if necessary."""
    return pixels if pixels.flags.carray else pixels.copy()
