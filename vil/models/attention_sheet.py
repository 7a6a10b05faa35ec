"""A picture of what a model attends to, made of PyTorch alone: small and fast enough for a training run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.models.attention_maps import AttentionMap
from vil.models.multiscale_vit import MultiScaleViT
from vil.pictures import denormalised

PANEL = 128
"""Height of a panel, in pixels."""
GAP = 4
MOST_IMAGES = 4
HEAT = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]) / 255
"""Colours from no weight to the largest."""
OUTLINE, QUERY = (torch.tensor(color)[:, None] for color in ((1.0, 1.0, 1.0), (0.2, 0.9, 1.0)))


def attention_sheet(
    model: MultiScaleViT, images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """What the last block of every stage attends to, in the mean of its heads.

    One row per image. Its panels are the image, and then for each stage what the global tokens look at, where
    it has some, and what the image's middle looks at: its window outlined in white, the query in blue. The
    brightest position of a panel is its largest weight. Stages whose keys have no place on the map
    (linformer) are left out.

    Args:
        model: the model, in any mode; it is left as it is.
        images: (B, C, H, W), normalised, on the model's device; the first four are shown.
        mean, std: of the channels, for values in 0..1.

    Returns:
        (3, H', W') uint8, on the CPU.

    Raises:
        ValueError: the model is none of this project's, or there is no image.
    """
    if not isinstance(model, MultiScaleViT):
        raise ValueError(f"attention is shown of models of this project, not of {type(model).__name__}")
    if not len(images):
        raise ValueError("expected at least one image")
    images = images[:MOST_IMAGES].float()
    stages = [blocks[-1] for blocks in model.attention_maps(images) if blocks]
    pictures = denormalised(images, mean, std)  # (B, 3, H, W)
    rows = []
    for number, picture in enumerate(pictures):
        panels = [_panel(picture)]
        for stage in stages:
            panels += _stage_panels(stage, number, picture)
        rows.append(_joined(panels, dim=2))
    return _joined(rows, dim=1).mul(255).round().byte()


def _stage_panels(stage: AttentionMap, number: int, picture: Tensor) -> list[Tensor]:
    panels = []
    for weights, queries in ((stage.from_globals, ()), (stage.from_queries, stage.queries)):
        if not weights.on_map or not weights.seen.shape[0]:
            continue
        side = stage.patch * weights.cell
        heat = weights.to_map[number].float().mean(dim=(0, 1)).cpu()  # (H, W)
        seen = weights.seen.any(dim=0).cpu()
        asking = torch.zeros(stage.size, dtype=torch.bool)
        for position in queries:
            asking[position] = True
        marks = [(seen, side, OUTLINE)] if queries else []
        marks += [(asking, stage.patch, QUERY)] if queries else []
        panels.append(_panel(picture, _on_pixels(heat, side, picture), marks))
    return panels


def _panel(
    picture: Tensor, heat: Tensor | None = None, marks: Sequence[tuple[Tensor, int, Tensor]] = ()
) -> Tensor:
    """The picture (3, H, W), grey under the heat (H, W) where it is given, of the height of a panel.

    Marks are outlined: positions (rows, columns) bool, their side in pixels, and a colour.
    """
    size = (PANEL, max(1, round(PANEL * picture.shape[2] / picture.shape[1])))
    panel = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    if heat is None:
        return panel
    heat = F.interpolate(heat[None, None], size, mode="nearest-exact")[0, 0]
    heat = heat / heat.max().clamp(min=1e-12)
    opacity = 0.5 + 0.4 * heat
    grey = 0.15 + 0.5 * panel.mean(dim=0)  # dim, so that brightness tells weights
    panel = grey * (1 - opacity) + _colors(heat) * opacity
    for positions, side, color in marks:
        covered = _on_pixels(positions.float(), side, picture)
        covered = F.interpolate(covered[None, None], size, mode="nearest-exact")[0, 0] > 0
        inner = -F.max_pool2d(-F.pad(covered.float()[None, None], (1, 1, 1, 1)), 3, stride=1)[0, 0] > 0
        panel[:, covered & ~inner] = color
    return panel


def _on_pixels(values: Tensor, side: int, picture: Tensor) -> Tensor:
    """Values of positions (H, W) of `side` pixels on a picture's pixels; 0 where no position reaches."""
    pixels = values.repeat_interleave(side, dim=0).repeat_interleave(side, dim=1)
    height, width = picture.shape[1:]
    return F.pad(pixels, (0, width - pixels.shape[1], 0, height - pixels.shape[0]))


def _colors(heat: Tensor) -> Tensor:
    """Values in 0..1, (H, W), to colours, (3, H, W), linearly between those of `HEAT`."""
    place = heat * (len(HEAT) - 1)
    low = place.long().clamp(max=len(HEAT) - 2)
    share = (place - low)[..., None]
    return (HEAT[low] * (1 - share) + HEAT[low + 1] * share).permute(2, 0, 1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """Images side by side (dim 2) or one below the other (dim 1), white between them."""
    length = max(part.shape[3 - dim] for part in parts)
    gap = torch.ones(3, length, GAP) if dim == 2 else torch.ones(3, GAP, length)
    between = [piece for part in parts for piece in (gap, part)][1:]
    return torch.cat(between, dim=dim)
