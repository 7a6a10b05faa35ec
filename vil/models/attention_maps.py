"""What a model attends to: the weights of every block for chosen queries, and their rollout over a stage.

Nothing is computed here as a model computes it: the attentions of its blocks are asked for their weights
(`vil.attention.Attention.weights`), on the tokens that they receive in a forward pass.

Legend: B batch, h heads, n queries, G global tokens, N local tokens of an H × W map, T = G + N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vil.attention.weights import AttentionWeights
from vil.models.stage import Size
from vil.modes import mode

if TYPE_CHECKING:
    from vil.models.multiscale_vit import MultiScaleViT

Position = tuple[int, int]
"""Row and column."""
Queries = Sequence[Position] | Literal["all"] | None
Weigh = Callable[[Tensor], AttentionWeights]
"""From places among the T tokens of a block, (n,) int64, to what they attend to."""

ROLLOUT_ROWS = 256
"""Tokens whose weights a rollout holds at a time."""


@dataclass(frozen=True)
class AttentionMap:
    """What the queries and the global tokens of a block attend to, or those of a stage by its rollout.

    Attributes:
        stage: number of the stage, from 0.
        block: number of the block in its stage, from 0; None for the rollout over all blocks.
        size: (H, W) of the stage's map.
        patch: side of a position of that map, in pixels.
        queries: positions on the map.
        from_queries: the weights of these queries, n = len(queries); of a rollout, h = 1.
        from_globals: the weights of the global tokens, n = G.
    """

    stage: int
    block: int | None
    size: Size
    patch: int
    queries: tuple[Position, ...]
    from_queries: AttentionWeights
    from_globals: AttentionWeights


@dataclass(frozen=True)
class _StageInputs:
    """What the blocks of a stage received: their `Weigh`, and (T, device, size and patch) of the stage."""

    blocks: list[Weigh]
    tokens: int
    device: torch.device
    size: Size
    patch: int

    def mapped(self, stage: int, block: int | None, weigh: Weigh, queries: list[Position]) -> AttentionMap:
        """The weights of queries, given in positions of the map, and of all global tokens."""
        globals_ = self.tokens - self.size[0] * self.size[1]
        places = [globals_ + row * self.size[1] + column for row, column in queries]
        from_queries = weigh(torch.tensor(places, dtype=torch.int64, device=self.device))
        from_globals = weigh(torch.arange(globals_, device=self.device))
        return AttentionMap(stage, block, self.size, self.patch, tuple(queries), from_queries, from_globals)

    def positions(self, queries: Queries, image: Size) -> list[Position]:
        """The positions of the map on which pixels of an image of that size lie.

        Pixels at the edge that filled no patch count to the one beside them.
        """
        height, width = self.size
        if queries == "all":
            return [(row, column) for row in range(height) for column in range(width)]
        pixels = [(image[0] // 2, image[1] // 2)] if queries is None else queries
        return [
            (min(int(row) // self.patch, height - 1), min(int(column) // self.patch, width - 1))
            for row, column in pixels
        ]


def attention_maps(
    model: MultiScaleViT, images: Tensor, queries: Queries = None, global_tokens: Tensor | None = None
) -> list[list[AttentionMap]]:
    """See `MultiScaleViT.attention_maps`."""
    image = _checked(queries, images)
    with torch.no_grad():
        return [
            [
                stage.mapped(number, block, weigh, stage.positions(queries, image))
                for block, weigh in enumerate(stage.blocks)
            ]
            for number, stage in enumerate(_stage_inputs(model, images, global_tokens))
        ]


def attention_rollout(
    model: MultiScaleViT, images: Tensor, queries: Queries = None, global_tokens: Tensor | None = None
) -> list[AttentionMap | None]:
    """See `MultiScaleViT.attention_rollout`."""
    image = _checked(queries, images)
    found: list[AttentionMap | None] = []
    with torch.no_grad():
        for number, stage in enumerate(_stage_inputs(model, images, global_tokens)):
            first = torch.zeros(1, dtype=torch.int64, device=stage.device)
            samples = [weigh(first) for weigh in stage.blocks]
            if not samples or not all(sample.on_map and sample.cell == 1 for sample in samples):
                found.append(None)
                continue
            weigh = partial(_rolled_out, stage, len(images))
            found.append(stage.mapped(number, None, weigh, stage.positions(queries, image)))
    return found


def _rolled_out(stage: _StageInputs, batch: int, queries: Tensor) -> AttentionWeights:
    """The rows of the rollout for places (n,) among the tokens.

    With A the mean over the heads of a block, a block mixes its tokens by A + I, whose rows are then made to
    sum up to 1; the stage by the product over its blocks. The rows that are asked for go through it from the
    last block to the first, so that no T × T matrix is ever held.
    """
    rows = torch.zeros(batch, len(queries), stage.tokens, device=stage.device)
    rows[:, torch.arange(len(queries), device=stage.device), queries] = 1.0
    for weigh in reversed(stage.blocks):
        before = torch.zeros_like(rows)
        reached = rows.ne(0).flatten(0, 1).any(dim=0).nonzero()[:, 0]
        for tokens in reached.split(ROLLOUT_ROWS):
            weights = weigh(tokens)
            mixing = torch.cat([weights.to_globals, weights.to_map.flatten(-2)], dim=-1).mean(dim=1)
            mixing = mixing.float()  # (B, c, T)
            share = rows[:, :, tokens] / (1 + mixing.sum(dim=-1))[:, None]  # (B, n, c)
            before[:, :, tokens] += share
            before += share @ mixing
        rows = before
    locals_ = stage.size[0] * stage.size[1]
    seen = rows[:, :, stage.tokens - locals_ :].gt(0).any(dim=0)  # (n, N)
    return AttentionWeights.place(rows[:, None], seen, stage.tokens - locals_, stage.size)


def _stage_inputs(model: MultiScaleViT, images: Tensor, global_tokens: Tensor | None) -> list[_StageInputs]:
    """What the blocks of each stage receive in a forward pass, as in evaluation."""
    received: dict[nn.Module, tuple[Tensor, Size]] = {}

    def note(attention: nn.Module, arguments: tuple[Any, ...]) -> None:
        received[attention] = arguments

    attentions = [[block.attn for block in stage.blocks] for stage in model.stages]
    hooks = [a.register_forward_pre_hook(note) for of_stage in attentions for a in of_stage]
    try:
        with mode(model, training=False):
            model.forward_features(images, global_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for of_stage, info in zip(attentions, model.feature_info):
        blocks: list[Weigh] = [partial(attention.weights, *received[attention]) for attention in of_stage]
        tokens, size = received[of_stage[0]] if of_stage else (images.new_empty(1, 0, 0), (0, 0))
        found.append(_StageInputs(blocks, tokens.shape[1], tokens.device, size, info["reduction"]))
    return found


def _checked(queries: Queries, images: Tensor) -> Size:
    """(Height, width) of the images. Raises ValueError where a query lies outside."""
    height, width = images.shape[-2:]
    if isinstance(queries, str) and queries != "all":
        raise ValueError(f"queries must be positions (row, column), 'all' or None, got {queries!r}")
    for row, column in () if queries is None or isinstance(queries, str) else queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"query ({row}, {column}) lies outside images of {height}×{width} pixels")
    return height, width
