"""Geometry shared by the backends of the local attention: inputs, visible keys, and biases by position.

Legend: B batch, h heads, H × W the map, N = H·W, w the window (side of a chunk), G global tokens, D head
width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.relative_position import position_biases

Mask = Literal["chunk", "exact", "cyclic"]

CHUNK_OFFSETS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
"""(row, column) offsets, in chunks, of the nine chunks around a query; its own chunk is in the middle."""
NEIGHBOR_OFFSETS = tuple(offset for offset in CHUNK_OFFSETS if offset != (0, 0))
"""The offsets of the eight neighbors, in the order of their numbers."""


class Inputs(NamedTuple):
    """The tensors of one local attention, as described in `vil.attention.local.local_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    global_key: Tensor
    global_value: Tensor
    bias_table: Tensor | None = None
    global_bias: Tensor | None = None
    neighbor: Tensor | None = None
    """One element: the number of the visible neighbor, if `LocalAttentionSpec.neighbors` is `one`."""

    @property
    def score_dtype(self) -> torch.dtype:
        """Type of scores, weights and gradients of biases: float32 for the half precisions."""
        return torch.promote_types(self.query.dtype, torch.float32)


class OperatorInputs(NamedTuple):
    """`Inputs` of a backend that is registered as an operator: with biases by position, of `score_dtype`."""

    query: Tensor
    key: Tensor
    value: Tensor
    global_key: Tensor
    global_value: Tensor
    window_bias: Tensor | None = None
    """(h or 1, w, w, 3w, 3w): see the function `window_bias`."""
    global_bias: Tensor | None = None
    neighbor: Tensor | None = None

    @property
    def score_dtype(self) -> torch.dtype:
        """See `Inputs.score_dtype`."""
        return torch.promote_types(self.query.dtype, torch.float32)


class LocalAttentionSpec(NamedTuple):
    """The map, the keys that its queries see, and options of the computation."""

    size: tuple[int, int]
    window: int
    mask: Mask = "chunk"
    neighbors: Literal["all", "self", "one"] = "all"
    dropout: float = 0.0
    may_fall_back: bool = False
    """Another backend may be used if the kernels of `fused` fail."""

    @property
    def num_positions(self) -> int:
        """Positions in the nine chunks: 9w²."""
        return 9 * self.window**2

    def chunk_offsets(self, neighbor: int | None) -> tuple[tuple[int, int], ...]:
        """Return the (row, column) offsets of the visible chunks; `neighbor` is for `neighbors="one"`."""
        if self.neighbors == "all":
            return CHUNK_OFFSETS
        return ((0, 0),) if neighbor is None else ((0, 0), NEIGHBOR_OFFSETS[neighbor])


class KeyRange(NamedTuple):
    """Consecutive keys along one axis of the map, as a chunk sees them."""

    start: int
    """Index of the first key on the map; −1 for padding, whose keys and values are 0."""
    length: int
    offset: int
    """Position of the first key, counted from the beginning of the chunk before the query's."""


@lru_cache(maxsize=4096)
def key_ranges(
    length: int, window: int, mask: Mask, chunk: int, steps: tuple[int, ...]
) -> tuple[KeyRange, ...]:
    """Return the keys along one axis that chunk number `chunk` sees in the chunks at offsets `steps`.

    Keys beyond the end of the map are omitted, so that chunks at borders cost less.
    """
    num_chunks = -(-length // window)
    ranges: list[KeyRange] = []
    for step in steps:
        apparent = chunk + step  # outside the map where the cyclic mask wraps
        if mask != "cyclic" and not 0 <= apparent < num_chunks:
            continue
        start, offset = apparent % num_chunks * window, (step + 1) * window
        num_keys = min(window, length - start)
        last = ranges[-1] if ranges else KeyRange(-1, 0, 0)
        if last.start >= 0 and (last.start + last.length, last.offset + last.length) == (start, offset):
            ranges[-1] = last._replace(length=last.length + num_keys)
        else:
            ranges.append(KeyRange(start, num_keys, offset))
        if mask == "cyclic" and apparent < 0 and num_keys < window:  # wrapping backwards includes the padding
            ranges.append(KeyRange(-1, window - num_keys, offset + num_keys))
    return tuple(ranges)


def operator_inputs(inputs: Inputs, spec: LocalAttentionSpec) -> OperatorInputs:
    """Return the inputs of an operator, computed with differentiable functions."""
    local_bias, global_bias = window_bias(inputs, spec), inputs.global_bias
    if local_bias is not None:
        local_bias = local_bias.contiguous()  # once, not in each pass
    if global_bias is not None:
        global_bias = global_bias.to(inputs.score_dtype)
    return OperatorInputs(*inputs[:5], local_bias, global_bias, inputs.neighbor)


def window_bias(inputs: Inputs, spec: LocalAttentionSpec) -> Tensor | None:
    """Return the biases of a chunk's queries by the position of the key.

    Returns:
        (h or 1, w, w, 3w, 3w): query row and column in its chunk, key row and column counted from the
        beginning of the chunk up and left of it; −inf outside the exact window. None if all are 0.
    """
    w, bias = spec.window, None
    if inputs.bias_table is not None:
        bias = position_biases(inputs.bias_table.to(inputs.score_dtype), (w, w))
    if spec.mask == "exact":
        query = torch.arange(w, device=inputs.query.device)[:, None]
        key = torch.arange(-w, 2 * w, device=inputs.query.device)
        near = (query - key).abs() <= w  # (w, 3w)
        outside = ~(near[:, None, :, None] & near[None, :, None, :])[None]  # (1, w, w, 3w, 3w)
        if bias is None:
            bias = torch.zeros(outside.shape, dtype=inputs.score_dtype, device=outside.device)
        bias = bias.masked_fill(outside, float("-inf"))
    return bias


def pad_to_chunks(tokens: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """Pad with zeros at the bottom and right to whole chunks: (B, h, H·W, D) → (B, h, P, Q, D)."""
    grid = tokens.unflatten(2, size)  # (B, h, H, W, D)
    return F.pad(grid, (0, 0, 0, -size[1] % window, 0, -size[0] % window))


def keys_per_query(
    window: int,
    mask: Mask = "chunk",
    neighbors: Literal["all", "self", "one", "random"] | int | Tensor = "all",
) -> int:
    """Return the local keys of a query far from the borders, as the paper counts: 9w² for the chunk mask."""
    if mask == "exact":
        return (2 * window + 1) ** 2
    num_chunks = {"all": 9, "self": 1}.get(neighbors, 2) if isinstance(neighbors, str) else 2
    return num_chunks * window**2
