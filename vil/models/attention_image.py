"""An image of a model's attention maps in plain PyTorch, fast enough for logging in a training run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.models.attention_maps import AttentionMap
from vil.models.multiscale_vit import MultiScaleViT
from vil.runtime.images import denormalize

PANEL_HEIGHT = 128
"""In pixels."""
GAP_WIDTH = 4
"""Pixels between panels."""
MAX_IMAGES = 4
COLORMAP = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]) / 255
"""Colors from weight 0 to the maximum."""
OUTLINE, QUERY = (torch.tensor(color)[:, None] for color in ((1.0, 1.0, 1.0), (0.2, 0.9, 1.0)))


def attention_sheet(
    model: MultiScaleViT, images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Draw the attention weights of the last block of every stage, averaged over heads.

    One row per image: the image, then per stage the weights of the global tokens, if any, and those of the
    position at the image center, with its window outlined in white and the query in blue. Each panel is
    scaled to its maximum. Stages whose keys have no position on the map (linformer) are omitted.

    Args:
        model: the model; its mode is restored.
        images: (B, C, H, W), normalized, on the model's device; the first four are drawn.
        mean, std: of the channels, for values in 0..1.

    Returns:
        (3, H', W') uint8, on the CPU.

    Raises:
        ValueError: another class of model, or no images.
    """
    if not isinstance(model, MultiScaleViT):
        raise ValueError(f"attention maps need a MultiScaleViT, got {type(model).__name__}")
    if not len(images):
        raise ValueError("expected at least one image")
    images = images[:MAX_IMAGES].float()
    last_blocks = [blocks[-1] for blocks in model.attention_maps(images) if blocks]
    rows = []
    for index, image in enumerate(denormalize(images, mean, std)):  # (3, H, W)
        panels = [_panel(image)]
        for attention_map in last_blocks:
            panels += _stage_panels(attention_map, index, image)
        rows.append(_join(panels, dim=2))
    return _join(rows, dim=1).mul(255).round().byte()


def _stage_panels(attention_map: AttentionMap, index: int, image: Tensor) -> list[Tensor]:
    panels = []
    for weights, queries in (
        (attention_map.from_globals, ()),
        (attention_map.from_queries, attention_map.queries),
    ):
        if not weights.has_positions or not weights.seen.shape[0]:
            continue
        side = attention_map.patch * weights.cell
        heat = weights.to_map[index].float().mean(dim=(0, 1)).cpu()  # (H, W)
        is_query = torch.zeros(attention_map.size, dtype=torch.bool)
        for position in queries:
            is_query[position] = True
        marks = [(weights.seen.any(dim=0).cpu(), side, OUTLINE), (is_query, attention_map.patch, QUERY)]
        panels.append(_panel(image, _upsample(heat, side, image), marks if queries else []))
    return panels


def _panel(
    image: Tensor, heat: Tensor | None = None, marks: Sequence[tuple[Tensor, int, Tensor]] = ()
) -> Tensor:
    """Return an image (3, H, W), resized to the height of a panel, gray below the heat map (H, W) if given.

    Marks are outlined: positions (rows, columns) bool, their side in pixels, and a color.
    """
    size = (PANEL_HEIGHT, max(1, round(PANEL_HEIGHT * image.shape[2] / image.shape[1])))
    panel = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    if heat is None:
        return panel
    heat = F.interpolate(heat[None, None], size, mode="nearest-exact")[0, 0]
    heat = heat / heat.max().clamp(min=1e-12)
    opacity = 0.5 + 0.4 * heat
    gray = 0.15 + 0.5 * panel.mean(dim=0)  # dimmed, so that brightness shows the weights
    panel = gray * (1 - opacity) + _colors(heat) * opacity
    for positions, side, color in marks:
        covered = _upsample(positions.float(), side, image)
        covered = F.interpolate(covered[None, None], size, mode="nearest-exact")[0, 0] > 0
        inner = -F.max_pool2d(-F.pad(covered.float()[None, None], (1, 1, 1, 1)), 3, stride=1)[0, 0] > 0
        panel[:, covered & ~inner] = color
    return panel


def _upsample(values: Tensor, side: int, image: Tensor) -> Tensor:
    """Repeat values of positions (H, W) over the `side` × `side` pixels of an image; 0 outside the map."""
    pixels = values.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)
    height, width = image.shape[1:]
    return F.pad(pixels, (0, width - pixels.shape[1], 0, height - pixels.shape[0]))


def _colors(heat: Tensor) -> Tensor:
    """Map values in 0..1, (H, W), to colors (3, H, W), by linear interpolation in `COLORMAP`."""
    index = heat * (len(COLORMAP) - 1)
    low = index.long().clamp(max=len(COLORMAP) - 2)
    fraction = (index - low)[..., None]
    return (COLORMAP[low] * (1 - fraction) + COLORMAP[low + 1] * fraction).permute(2, 0, 1)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    """Join images side by side (dim 2) or vertically (dim 1), with white gaps."""
    length = max(part.shape[3 - dim] for part in parts)
    gap = torch.ones(3, length, GAP_WIDTH) if dim == 2 else torch.ones(3, GAP_WIDTH, length)
    separated = [piece for part in parts for piece in (gap, part)][1:]
    return torch.cat(separated, dim=dim)
