"""FLOPs of whole models by their formula, against PyTorch's counter running the dense backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vil
from vil.config import StageConfig
from vil.evaluation.complexity import measure_complexity, multiply_adds

ATTENTIONS = [
    "full", "vision_longformer", "linformer", "performer", "spatial_reduction", "global_only",
]  # fmt: skip


def counted(model: nn.Module, image_size: int, in_chans: int = 3) -> int:
    """What PyTorch counts: wrapped, the model has no formula to ask."""
    return multiply_adds(nn.Sequential(model), image_size, in_chans)


def build(name: str, device: str = "meta", **options: object) -> nn.Module:
    """On the meta device a model without numbers: counting at full size takes no memory and no time."""
    with torch.device(device):
        return vil.create_model(name, attention_backend="dense", **options)


def unseen_keys(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of the dense backend for keys that the local attention does not see.

    Its queries meet the whole map, padded to whole chunks; the formula has 9w² or (2w+1)² keys everywhere.
    """
    total, side = 0, image_size
    for stage in model.stages:
        side //= stage.config.patch
        if stage.config.attention == "vision_longformer":
            window = stage.config.window
            padded = -(-side // window) * window
            keys = {"chunk": 9 * window**2, "exact": (2 * window + 1) ** 2}[stage.blocks[0].attn.mask]
            total += stage.config.blocks * 2 * side**2 * (padded**2 - keys) * stage.config.dim
    return total


@pytest.mark.parametrize("position", ["absolute", "relative"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_where_one_window_covers_the_map(attention: str, position: str) -> None:
    """The dense backend then does no needless work, and the numbers are real."""
    stages = [
        StageConfig(
            dim=16, heads=2, blocks=2, patch=4, attention=attention, global_tokens=2, position=position,
            window=8, projected_tokens=12, random_features=20, reduction=4,
        ),
        StageConfig(
            dim=32, heads=4, blocks=1, patch=2, attention=attention, global_tokens=3, position=position,
            window=4, projected_tokens=6, random_features=24, reduction=2,
        ),
    ]  # fmt: skip
    model = vil.create_model(
        "vil", stages=stages, image_size=32, num_classes=7, in_chans=1, neighbors="self",
        attention_backend="dense",
    )  # fmt: skip
    assert counted(model, 32, in_chans=1) == multiply_adds(model, 32, 1)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_at_full_size(attention: str) -> None:
    # Performer leaves autocast for a moment, which the meta device does not know.
    model = build("vil_tiny", "cpu" if attention == "performer" else "meta", attention=attention)
    assert counted(model, 224) == multiply_adds(model, 224, 3) + unseen_keys(model, 224)


@pytest.mark.parametrize("mask", ["chunk", "exact"])
@pytest.mark.parametrize(
    ("name", "image_size"),
    [("vil_small", 224), ("vil_tiny_3stage", 224), ("vil_tiny", 384), ("vil_tiny", 200)],
)
def test_sizes_and_masks(name: str, image_size: int, mask: str) -> None:
    """200 pixels: maps of 50, 25, 12 and 6, which neither windows nor patches divide."""
    model = build(name, image_size=image_size, mask=mask, position="absolute")
    surplus = unseen_keys(model, image_size)
    assert surplus
    assert counted(model, image_size) == multiply_adds(model, image_size, 3) + surplus


@pytest.mark.parametrize("name", ["evit_tiny_patch16", "evit_small_patch16"])
def test_flat_models(name: str) -> None:
    model = build(name)
    assert counted(model, 224) == multiply_adds(model, 224, 3)


def test_global_tokens_with_projections_of_their_own() -> None:
    model = build("vil_tiny", share_global_projection=False)
    found = measure_complexity(model, 224, 3)
    shared = measure_complexity(build("vil_tiny"), 224, 3)
    assert counted(model, 224) == found.flops + unseen_keys(model, 224)
    assert found.flops > shared.flops
    assert found.params == shared.params + 4 * (48**2 + 48) + 4 * (96**2 + 96)
