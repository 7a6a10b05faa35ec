"""Attention maps: the attention weights of every block for chosen queries, and their rollout over a stage.

Forward hooks record the input of each attention in one forward pass; `Attention.attention_weights` computes
the weights from it.

Legend: B batch, h heads, n queries, G global tokens, N local tokens of an H × W map, T = G + N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vil.attention import Attention
from vil.attention.maps import AttentionWeights
from vil.models.stage import Size, Stage
from vil.runtime.modes import mode

Position = tuple[int, int]
"""Row and column."""
Queries = Sequence[Position] | Literal["all"] | None
WeightsFunction = Callable[[Tensor], AttentionWeights]
"""From token indices (n,) int64 of a block, in 0..T−1, to their attention weights."""

ROLLOUT_ROWS = 256
"""Tokens whose attention weights a rollout holds at a time."""


@dataclass(frozen=True)
class AttentionMap:
    """Attention weights of queries and global tokens in one block, or their rollout over a stage.

    Attributes:
        stage: index of the stage.
        block: index of the block in its stage; None for the rollout over all blocks.
        size: (H, W) of the stage's map.
        patch: side of a position of that map, in pixels.
        queries: positions on the map.
        from_queries: weights of these queries, n = len(queries); h = 1 for a rollout.
        from_globals: weights of the global tokens, n = G.
    """

    stage: int
    block: int | None
    size: Size
    patch: int
    queries: tuple[Position, ...]
    from_queries: AttentionWeights
    from_globals: AttentionWeights


@dataclass(frozen=True)
class _StageTrace:
    """The blocks of a stage after a forward pass: their weights as functions, and T, size and patch."""

    blocks: list[WeightsFunction]
    tokens: int
    device: torch.device
    size: Size
    patch: int

    def attention_map(
        self, stage: int, block: int | None, weights: WeightsFunction, queries: list[Position]
    ) -> AttentionMap:
        """Return the weights of queries, given as positions on the map, and of all global tokens."""
        num_globals = self.tokens - self.size[0] * self.size[1]
        indices = [num_globals + row * self.size[1] + column for row, column in queries]
        from_queries = weights(torch.tensor(indices, dtype=torch.int64, device=self.device))
        from_globals = weights(torch.arange(num_globals, device=self.device))
        return AttentionMap(stage, block, self.size, self.patch, tuple(queries), from_queries, from_globals)

    def positions(self, queries: Queries, image_size: Size) -> list[Position]:
        """Return the positions on the map that contain the pixels `queries` of an image.

        Pixels at the bottom and right outside of all patches are assigned to the nearest position.
        """
        height, width = self.size
        if queries == "all":
            return [(row, column) for row in range(height) for column in range(width)]
        pixels = [(image_size[0] // 2, image_size[1] // 2)] if queries is None else queries
        return [
            (min(int(row) // self.patch, height - 1), min(int(column) // self.patch, width - 1))
            for row, column in pixels
        ]


def attention_maps(
    model: nn.Module,
    stages: Sequence[Stage],
    images: Tensor,
    queries: Queries = None,
    global_tokens: Tensor | None = None,
) -> list[list[AttentionMap]]:
    """See `MultiScaleViT.attention_maps`; `stages` are those of the model."""
    image_size = _check_queries(queries, images)
    with torch.no_grad():
        return [
            [
                trace.attention_map(index, block, weights, trace.positions(queries, image_size))
                for block, weights in enumerate(trace.blocks)
            ]
            for index, trace in enumerate(_trace(model, stages, images, global_tokens))
        ]


def attention_rollout(
    model: nn.Module,
    stages: Sequence[Stage],
    images: Tensor,
    queries: Queries = None,
    global_tokens: Tensor | None = None,
) -> list[AttentionMap | None]:
    """See `MultiScaleViT.attention_rollout`; `stages` are those of the model."""
    image_size = _check_queries(queries, images)
    rollouts: list[AttentionMap | None] = []
    with torch.no_grad():
        for index, trace in enumerate(_trace(model, stages, images, global_tokens)):
            first = torch.zeros(1, dtype=torch.int64, device=trace.device)
            samples = [weights(first) for weights in trace.blocks]
            if not samples or not all(sample.has_positions and sample.cell == 1 for sample in samples):
                rollouts.append(None)
                continue
            weights = partial(_rollout_rows, trace, len(images))
            rollouts.append(trace.attention_map(index, None, weights, trace.positions(queries, image_size)))
    return rollouts


def _rollout_rows(trace: _StageTrace, batch: int, queries: Tensor) -> AttentionWeights:
    """Return the rows of the rollout for token indices (n,).

    With A the mean over the heads of a block, a block mixes its tokens by A + I with rows normalized to 1;
    the stage by the product over its blocks. The requested rows are multiplied from the last block to the
    first, so that no T × T matrix is held.
    """
    rows = torch.zeros(batch, len(queries), trace.tokens, device=trace.device)
    rows[:, torch.arange(len(queries), device=trace.device), queries] = 1.0
    for block_weights in reversed(trace.blocks):
        product = torch.zeros_like(rows)
        nonzero = rows.ne(0).flatten(0, 1).any(dim=0).nonzero()[:, 0]
        for tokens in nonzero.split(ROLLOUT_ROWS):
            weights = block_weights(tokens)
            mixing = torch.cat([weights.to_globals, weights.to_map.flatten(-2)], dim=-1).mean(dim=1)
            mixing = mixing.float()  # (B, c, T)
            scaled = rows[:, :, tokens] / (1 + mixing.sum(dim=-1))[:, None]  # (B, n, c)
            product[:, :, tokens] += scaled
            product += scaled @ mixing
        rows = product
    num_globals = trace.tokens - trace.size[0] * trace.size[1]
    seen = rows[:, :, num_globals:].gt(0).any(dim=0)  # (n, N)
    return AttentionWeights.from_flat(rows[:, None], seen, num_globals, trace.size)


def _trace(
    model: nn.Module, stages: Sequence[Stage], images: Tensor, global_tokens: Tensor | None
) -> list[_StageTrace]:
    """Run the model in evaluation mode and record the inputs of all attentions."""
    inputs: dict[nn.Module, tuple[Tensor, Size]] = {}

    def record(attention: nn.Module, arguments: tuple[Tensor, Size]) -> None:
        inputs[attention] = arguments

    attentions: list[list[Attention]] = [[block.attn for block in stage.blocks] for stage in stages]
    hooks = [a.register_forward_pre_hook(record) for in_stage in attentions for a in in_stage]
    try:
        with mode(model, training=False):
            model(images, global_tokens)
    finally:
        for hook in hooks:
            hook.remove()
    traces, patch = [], 1
    for stage, in_stage in zip(stages, attentions):
        patch *= stage.patch_embed.patch
        blocks: list[WeightsFunction] = [partial(a.attention_weights, *inputs[a]) for a in in_stage]
        tokens, size = inputs[in_stage[0]] if in_stage else (images.new_empty(1, 0, 0), (0, 0))
        traces.append(_StageTrace(blocks, tokens.shape[1], tokens.device, size, patch))
    return traces


def _check_queries(queries: Queries, images: Tensor) -> Size:
    """Return (height, width) of the images. Raise ValueError for a query outside them."""
    height, width = images.shape[-2:]
    if isinstance(queries, str) and queries != "all":
        raise ValueError(f"queries must be positions (row, column), 'all' or None, got {queries!r}")
    for row, column in () if queries is None or isinstance(queries, str) else queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"query ({row}, {column}) is outside the images of {height}×{width} pixels")
    return height, width
