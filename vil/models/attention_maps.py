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
from vil.config import Size
from vil.models.stage import Stage
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
    """A stage after a forward pass: the weights of its blocks as functions, T, its map, and the queries."""

    index: int
    blocks: list[WeightsFunction]
    tokens: int
    device: torch.device
    size: Size
    patch: int
    queries: tuple[Position, ...]

    def attention_map(self, block: int | None, weights: WeightsFunction) -> AttentionMap:
        """Return the weights of the queries and of all global tokens."""
        num_globals = self.tokens - self.size[0] * self.size[1]
        indices = [num_globals + row * self.size[1] + column for row, column in self.queries]
        from_queries = weights(torch.tensor(indices, dtype=torch.int64, device=self.device))
        from_globals = weights(torch.arange(num_globals, device=self.device))
        return AttentionMap(
            self.index, block, self.size, self.patch, self.queries, from_queries, from_globals
        )


@torch.no_grad()
def attention_maps(
    model: nn.Module,
    stages: Sequence[Stage],
    images: Tensor,
    queries: Queries = None,
    global_tokens: Tensor | None = None,
) -> list[list[AttentionMap]]:
    """See `MultiScaleViT.attention_maps`; `stages` are those of the model."""
    traces = _trace(model, stages, images, queries, global_tokens)
    return [[trace.attention_map(*block) for block in enumerate(trace.blocks)] for trace in traces]


@torch.no_grad()
def attention_rollout(
    model: nn.Module,
    stages: Sequence[Stage],
    images: Tensor,
    queries: Queries = None,
    global_tokens: Tensor | None = None,
) -> list[AttentionMap | None]:
    """See `MultiScaleViT.attention_rollout`; `stages` are those of the model."""
    rollouts: list[AttentionMap | None] = []
    for trace in _trace(model, stages, images, queries, global_tokens):
        first = torch.zeros(1, dtype=torch.int64, device=trace.device)
        samples = [weights(first) for weights in trace.blocks]
        has_rollout = samples and all(sample.has_positions and sample.cell == 1 for sample in samples)
        weights = partial(_rollout_rows, trace, len(images))
        rollouts.append(trace.attention_map(None, weights) if has_rollout else None)
    return rollouts


def _rollout_rows(trace: _StageTrace, batch: int, queries: Tensor) -> AttentionWeights:
    """Return the rows of the rollout for token indices (n,).

    With A the mean over the heads of a block, a block mixes its tokens by A + I with rows normalized to 1;
    the stage by the product over its blocks. The requested rows are multiplied from the last block to the
    first, so that no T × T matrix is held.
    """
    rows = torch.zeros(batch, len(queries), trace.tokens, dtype=torch.float32, device=trace.device)
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
    model: nn.Module, stages: Sequence[Stage], images: Tensor, queries: Queries, global_tokens: Tensor | None
) -> list[_StageTrace]:
    """Run the model in evaluation mode and record the inputs of all attentions.

    Raises:
        ValueError: a query outside the images.
    """
    pixels = _check_queries(queries, images)
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
    for index, (stage, in_stage) in enumerate(zip(stages, attentions)):
        patch *= stage.patch_embed.patch
        blocks: list[WeightsFunction] = [partial(a.attention_weights, *inputs[a]) for a in in_stage]
        tokens, size = inputs[in_stage[0]] if in_stage else (images.new_empty(1, 0, 0), (0, 0))
        positions = [(row, column) for row in range(size[0]) for column in range(size[1])]
        if pixels is not None:  # those outside of all patches are assigned to the nearest position
            positions = [(min(r // patch, size[0] - 1), min(c // patch, size[1] - 1)) for r, c in pixels]
        traces.append(
            _StageTrace(index, blocks, tokens.shape[1], tokens.device, size, patch, tuple(positions))
        )
    return traces


def _check_queries(queries: Queries, images: Tensor) -> list[Position] | None:
    """Return the queries as pixels; None for all. Raise ValueError for a query outside the images."""
    height, width = images.shape[-2:]
    if isinstance(queries, str):
        if queries != "all":
            raise ValueError(f"queries must be positions (row, column), 'all' or None, got {queries!r}")
        return None
    pixels = [(height // 2, width // 2)] if queries is None else queries
    for row, column in pixels:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"query ({row}, {column}) is outside the images of {height}×{width} pixels")
    return [(int(row), int(column)) for row, column in pixels]
