"""Pillow's image operations on whole batches, on the CPU or a GPU, one argument per image.

Every function maps uint8 images (B, 3, H, W) to images of the same shape. They follow Pillow's C code, whose
rounding is part of a recipe: results differ from Pillow's by at most one level, except where a coordinate
falls on the edge of an image. None waits for the device: shapes do not depend on values, and Python
scalars are passed to operators, not copied as tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 256
BLUR_REACH = 2
"""Pixels on each side that a box filter of `gaussian_blur` averages."""


def invert(images: Tensor) -> Tensor:
    """Return 255 − value."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` (B,) highest bits of each value: 0 is black, 8 changes nothing."""
    masks = 256 - 2 ** (8 - bits.clamp(0, 8).long())  # no bits: 0; 8 bits: 255
    return images & _per_image(masks).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from `threshold` (B,) on."""
    return torch.where(images < _per_image(threshold), images, 255 - images)


def solarize_add(images: Tensor, add: Tensor) -> Tensor:
    """Add `add` (B,) to the values below 128, up to 255."""
    brighter = (images.to(torch.int16) + _per_image(add).to(torch.int16)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a channel with a single value does not change."""
    low, high = (extreme.double() for extreme in torch.aminmax(images.flatten(2), dim=2, keepdim=True))
    scale = 255 / (high - low)
    table = (torch.arange(LEVELS, device=images.device) * scale - low * scale).clamp(0, 255)  # (B, 3, 256)
    return _apply_table(images, torch.where(high > low, table, _identity_table(images)))


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each channel."""
    values = images.flatten(2).long()
    # Not `bincount`, which waits for the device to read the highest value.
    counts = values.new_zeros(*values.shape[:2], LEVELS).scatter_add_(2, values, torch.ones_like(values))
    below = counts.cumsum(2) - counts
    highest = values.amax(2, keepdim=True)
    step = below.gather(2, highest) // 255  # pixels below the highest value, per level
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _apply_table(images, torch.where(step > 0, table, _identity_table(images)))


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: factor (B,) 0 is black, 1 the image."""
    return _blend(torch.zeros((), device=images.device), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the gray image: factor (B,) 0 is that gray, 1 the image."""
    mean = gray(images).flatten(1).sum(1, dtype=torch.int64).double() / images[0, 0].numel()
    return _blend(_per_image((mean + 0.5).floor().float()), images, factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image: factor (B,) 0 is gray, 1 the image."""
    return _blend(gray(images).float(), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed image, whose border is not smoothed: factor (B,) 0 is smooth, 1 the image."""
    smooth = images.clone()
    if min(images.shape[2:]) >= 3:
        x = images.to(torch.int16)
        rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]  # 13 weights
        smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return _blend(smooth.float(), images, factor)


def gaussian_blur(images: Tensor, radius: Tensor) -> Tensor:
    """Blur by three box filters per axis whose variance is radius² (B,), as Pillow does; radius at most 2.

    Source: Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011.
    """
    variance = radius.double() ** 2 / 3
    radius_int = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    fraction = (
        (2 * radius_int + 1)
        * (radius_int * (radius_int + 1) - 3 * variance)
        / (6 * (variance - (radius_int + 1) ** 2))
    )
    distance = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device).abs()
    edge = radius_int[:, None] + 1
    taps = torch.where(distance < edge, 1.0, torch.where(distance == edge, fraction[:, None], 0.0))
    taps = (taps / (2 * (radius_int + fraction) + 1)[:, None]).float()  # (B, 2·reach + 1)
    x = images.float()
    for axis in (3, 2):
        for _ in range(3):
            reach = (BLUR_REACH, BLUR_REACH)
            padded = F.pad(x, (*reach, 0, 0) if axis == 3 else (0, 0, *reach), mode="replicate")
            shifted = (padded.narrow(axis, offset, x.shape[axis]) for offset in range(len(distance)))
            blurred = [_per_image(taps[:, offset]) * view for offset, view in enumerate(shifted)]
            x = torch.stack(blurred).sum(0).add_(0.5).floor_()
    return x.clamp(0, 255).to(torch.uint8)


def affine(images: Tensor, coefficients: Tensor, filter: str, axis: str, fill: tuple[int, ...]) -> Tensor:
    """Sample each pixel at the position that an affine map assigns to it.

    Args:
        images: (B, 3, H, W), uint8.
        coefficients: (B, 6), the (a, b, c, d, e, f) of Pillow: pixel (x, y) of the result is the image's
            value at (ax + by + c, dx + ey + f), where the center of the first pixel is (0.5, 0.5).
        filter: nearest, bilinear or bicubic.
        axis: horizontal or vertical if the map does not change the other coordinate, which is faster;
            else both.
        fill: color of positions outside the image.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = (value[:, None, None] for value in coefficients.float().unbind(1))
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    at_x = a * x + b * y + c  # (B, H, W)
    at_y = d * x + e * y + f
    outside = (at_x < 0) | (at_x >= width) | (at_y < 0) | (at_y >= height)
    columns = _taps(at_x, width, filter if axis != "vertical" else "nearest")
    rows = _taps(at_y, height, filter if axis != "horizontal" else "nearest")
    pixels = images.flatten(2)  # (B, 3, H·W)
    total: Tensor | None = None
    for row, row_weight in rows:
        for column, column_weight in columns:
            position = (row * width + column).flatten(1)[:, None]  # (B, 1, H·W)
            values = pixels.gather(2, position.expand_as(pixels)).view_as(images)
            if filter != "nearest":
                values = values * (row_weight * column_weight)[:, None]
            total = values if total is None else total.add_(values)
    assert total is not None
    if filter != "nearest":
        # Pillow truncates sums in double precision; these are in single precision.
        total = (total + 1e-3).clamp_(0, 255).to(torch.uint8)
    for channel, value in zip(total.unbind(1), fill, strict=True):
        channel.masked_fill_(outside, value)
    return total


def gray(images: Tensor) -> Tensor:
    """Return (B, 1, H, W) int32, the luma of ITU-R 601-2 as Pillow rounds it."""
    red, green, blue = images.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _taps(at: Tensor, size: int, filter: str) -> list[tuple[Tensor, Tensor]]:
    """Return positions (B, H, W) along an axis, clamped to it, and their weights."""
    if filter == "nearest":
        return [(at.floor().long().clamp_(0, size - 1), torch.ones_like(at))]
    at = at - 0.5
    first = at.floor()
    t = at - first
    if filter == "bilinear":
        weights = {0: 1 - t, 1: t}
    else:  # the cubic with slope −1 at distance 1, unlike in Pillow's resize
        weights = {
            -1: t * (-1 + t * (2 - t)),
            0: 1 + t * t * (t - 2),
            1: t * (1 + t * (1 - t)),
            2: t * t * (t - 1),
        }
    return [((first + step).long().clamp_(0, size - 1), weight) for step, weight in weights.items()]


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return degenerate + factor · (image − degenerate), truncated."""
    blended = torch.lerp(degenerate.expand(images.shape), images.float(), _per_image(factor).float())
    return blended.clamp_(0, 255).to(torch.uint8)


def _apply_table(images: Tensor, tables: Tensor) -> Tensor:
    """Map the values of the images by `tables` (B, 3, 256), truncated."""
    return tables.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _identity_table(images: Tensor) -> Tensor:
    return torch.arange(LEVELS, device=images.device)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
