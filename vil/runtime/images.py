"""Normalized images and their colors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
