"""FLOPs of whole models by their formula, against PyTorch's counter running the dense backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vil
from vil.attention import ATTENTIONS
from vil.config import StageConfig
from vil.evaluation.complexity import measure_complexity, multiply_adds


def count(model: nn.Module, image_size: int, in_chans: int = 3) -> int:
    """Count with PyTorch's counter: the wrapped model has no formula."""
    return multiply_adds(nn.Sequential(model), image_size, in_chans)


def build(name: str, device: str = "meta", **options: object) -> nn.Module:
    """Build a model; on the meta device, counting at full size needs no memory and little time."""
    with torch.device(device):
        return vil.create_model(name, attention_backend="dense", **options)


def unused_keys(model: nn.Module, image_size: int) -> int:
    """Return the multiply-adds of the dense backend for keys that local attention does not use.

    Its queries attend to the whole map, padded to whole chunks; the formula has 9w² or (2w+1)².
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
def test_one_window_covers_the_map(attention: str, position: str) -> None:
    """The dense backend then computes exactly what the formula counts; not on the meta device."""
    shared = {"attention": attention, "position": position}
    first = {"dim": 16, "heads": 2, "blocks": 2, "patch": 4, "global_tokens": 2, "window": 8}
    second = {"dim": 32, "heads": 4, "blocks": 1, "patch": 2, "global_tokens": 3, "window": 4}
    stages = [
        StageConfig(**shared, **first, projected_tokens=12, random_features=20, reduction=4),
        StageConfig(**shared, **second, projected_tokens=6, random_features=24, reduction=2),
    ]
    options = {"image_size": 32, "num_classes": 7, "in_chans": 1, "neighbors": "self"}
    model = build("vil", "cpu", stages=stages, **options)
    assert count(model, 32, in_chans=1) == multiply_adds(model, 32, 1)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_at_full_size(attention: str) -> None:
    # Performer disables autocast, which the meta device does not support.
    model = build("vil_tiny", "cpu" if attention == "performer" else "meta", attention=attention)
    assert count(model, 224) == multiply_adds(model, 224, 3) + unused_keys(model, 224)


@pytest.mark.parametrize(
    ("name", "image_size", "mask"),
    [
        ("vil_small", 224, "chunk"),
        ("vil_tiny_3stage", 224, "exact"),
        ("vil_tiny", 384, "exact"),
        ("vil_tiny", 200, "chunk"),
        ("vil_tiny", 200, "exact"),
    ],
)
def test_sizes_and_masks(name: str, image_size: int, mask: str) -> None:
    """200 pixels: maps of 50, 25, 12 and 6, divisible neither by windows nor by patches."""
    model = build(name, image_size=image_size, mask=mask, position="absolute")
    surplus = unused_keys(model, image_size)
    assert surplus
    assert count(model, image_size) == multiply_adds(model, image_size, 3) + surplus


@pytest.mark.parametrize("name", ["evit_tiny_patch16", "evit_small_patch16"])
def test_flat_models(name: str) -> None:
    model = build(name)
    assert count(model, 224) == multiply_adds(model, 224, 3)


def test_separate_projections_of_global_tokens() -> None:
    model = build("vil_tiny", share_global_projection=False)
    found = measure_complexity(model, 224, 3)
    shared = measure_complexity(build("vil_tiny"), 224, 3)
    assert count(model, 224) == found.flops + unused_keys(model, 224)
    assert found.flops > shared.flops
    assert found.params == shared.params + 4 * (48**2 + 48) + 4 * (96**2 + 96)
