"""Test-time augmentation: mean logits over views of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vil.config import EvalConfig

_NUM_CROPS = {"none": 1, "hflip": 1, "five_crop": 5, "ten_crop": 5}
_FLIPPED = ("hflip", "ten_crop")


def count_views(config: EvalConfig) -> int:
    """Return the number of forward passes per image."""
    return len(config.tta_scales) * _NUM_CROPS[config.tta] * (2 if config.tta in _FLIPPED else 1)


def describe_tta(config: EvalConfig) -> str | None:
    """Return the test-time augmentation for results, e.g. `hflip, scales 1 1.15`; None for none."""
    parts: list[str] = [] if config.tta == "none" else [config.tta]
    if config.tta_scales != [1.0]:
        parts.append("scales " + " ".join(f"{scale:g}" for scale in config.tta_scales))
    return ", ".join(parts) or None


def build_tta_model(model: nn.Module, config: EvalConfig) -> nn.Module:
    """Return a model of the views of `config.tta` and `config.tta_scales`; `model` itself without any."""
    if describe_tta(config) is None:
        return model
    return TTAModel(model, config.model.in_chans, has_flips=config.tta in _FLIPPED)


class TTAModel(nn.Module):
    """A model that averages the logits of `model` over crops and their mirror images.

    The mean is that of logits, as in timm, so that views without a difference change nothing. It is computed
    in float64.

    Args:
        model: maps images (B, in_chans, H, W) to logits (B, classes).
        in_chans: channels of one crop.
        has_flips: add the mirror image of each crop.
    """

    def __init__(self, model: nn.Module, in_chans: int, has_flips: bool) -> None:
        super().__init__()
        self.model, self.in_chans, self.has_flips = model, in_chans, has_flips

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits (B, classes), float64, of crops (B, crops * in_chans, H, W)."""
        is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        views = images.split(self.in_chans, dim=1)
        if self.has_flips:
            views += tuple(view.flip(-1) for view in views)
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for view in views:
            total = total + self.model(view.contiguous(memory_format=memory_format)).double()
        return total / len(views)
