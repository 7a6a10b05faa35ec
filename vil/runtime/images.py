"""Modes and formats of images, and the colors of normalized ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Mode = Literal["RGB", "L"]
"""Color or gray."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")
"""Formats that are read, whatever the file's name. Others that Pillow reads are not safe: PostScript runs a
program."""

MAX_ENCODED_BYTES = 1 << 29
"""Largest encoded image: 134 megapixels of RGB, uncompressed."""

MAX_ASPECT_RATIO = 64
"""Longer images are center-cropped to it before a resize of the short side, which would otherwise take
gigabytes for an image of one row, of which a crop keeps a millionth."""


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the colors of normalized images.

    Args:
        images: (..., C, H, W), of any dtype and device; C is 3, or 1 for gray images.
        mean, std: of red, green and blue, for values in 0..1; gray images are denormalized by their averages.

    Returns:
        (..., 3, H, W) float32 in 0..1, on the CPU.
    """
    images = images.detach().float().cpu()
    shift, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    if images.shape[-3] == 1:
        shift, scale = shift.mean(dim=0, keepdim=True), scale.mean(dim=0, keepdim=True)
    return (images * scale + shift).clamp(0, 1).expand(*images.shape[:-3], 3, -1, -1)


@functools.cache
def supported_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def convert_image(image: Image.Image, mode: Mode) -> Image.Image:
    """Convert an image to RGB or gray, as Pillow does; of gray images of 16 bits the upper 8 are kept.

    Raises ValueError for pixels of no defined range: floats and 32-bit integers.
    """
    with warnings.catch_warnings():
        # "Palette images with Transparency ... should be converted to RGBA": it is dropped on purpose.
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            image = _to_8_bits(image)
        elif image.mode == "LAB":
            image = image.convert("RGB")  # the only mode that Pillow converts it to
        return image.convert(mode)


def limit_aspect_ratio(image: Image.Image, max_ratio: int = MAX_ASPECT_RATIO) -> Image.Image:
    """Return the center of an image that is longer than `max_ratio`; return others unchanged."""
    max_side = max_ratio * min(image.size)
    if max(image.size) <= max_side:
        return image
    width, height = (min(max_side, side) for side in image.size)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def max_aspect_ratio(crop_mode: str, size: tuple[int, int]) -> int:
    """Return the limit of the aspect ratio for an evaluation crop of (height, width) in pixels.

    If the whole image is to fit into the crop (`border`), its short side must keep a pixel.
    """
    return min(MAX_ASPECT_RATIO, *size) if crop_mode == "border" else MAX_ASPECT_RATIO


_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return the upper 8 of the 16 bits of a gray image, or of as many as a TIFF declares."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # these have 16 bits
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(f"its pixels are {kind}, of no defined range; expected 8 or 16 unsigned bits")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)  # (H, W)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow applies to at most 8 bits
        values = 255 - values
    return Image.fromarray(values)
