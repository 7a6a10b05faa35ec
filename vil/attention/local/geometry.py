"""What the backends of the local attention share: its arguments, where keys stand, and biases by position.

Legend: B batch, h heads, H × W the map, N = H·W, w the window (side of a chunk), G global tokens, D head
width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Mask = Literal["chunk", "exact", "cyclic"]

STEPS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
"""(row, column) steps to the nine chunks around a query, its own in the middle."""
AROUND = tuple(step for step in STEPS if step != (0, 0))
"""The steps to the eight neighbours, in the order in which they are numbered."""


class Inputs(NamedTuple):
    """The tensors of one local attention, as `vil.attention.local.local_attention` describes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    global_key: Tensor
    global_value: Tensor
    bias_table: Tensor | None = None
    global_bias: Tensor | None = None
    neighbor: Tensor | None = None
    """One element: the number of the neighbour that is seen, where `Window.neighbors` is `one`."""

    @property
    def score_dtype(self) -> torch.dtype:
        """That of scores, weights and gradients of biases: float32 for the half precisions."""
        return torch.promote_types(self.query.dtype, torch.float32)


class Window(NamedTuple):
    """Which keys the queries of a map see."""

    size: tuple[int, int]
    side: int
    mask: Mask = "chunk"
    neighbors: Literal["all", "self", "one"] = "all"
    dropout: float = 0.0

    @property
    def places(self) -> int:
        """Positions in the nine chunks: 9w²."""
        return 9 * self.side**2

    def seen(self, neighbor: int | None) -> tuple[tuple[int, int], ...]:
        """(row, column) steps to the chunks that are seen; `neighbor` is read where only one is."""
        if self.neighbors == "all":
            return STEPS
        return ((0, 0),) if neighbor is None else ((0, 0), AROUND[neighbor])


class Run(NamedTuple):
    """Keys that follow each other along one axis of the map, as a chunk sees them."""

    start: int
    """The first of them on the map; −1 for padding, whose keys and values are 0."""
    length: int
    place: int
    """Where the first appears, counted from the beginning of the chunk before the query's."""


@lru_cache(maxsize=4096)
def runs(length: int, window: int, mask: Mask, chunk: int, steps: tuple[int, ...]) -> tuple[Run, ...]:
    """The keys along one axis that chunk number `chunk` sees in the chunks `steps` away, in their order.

    Keys beyond the end of the map are left out, so that borders cost less and not more.
    """
    chunks = -(-length // window)
    found: list[Run] = []
    for step in steps:
        appears = chunk + step
        if mask != "cyclic" and not 0 <= appears < chunks:
            continue
        start, place = appears % chunks * window, (step + 1) * window
        real = min(window, length - start)
        last = found[-1] if found else None
        if (
            last
            and last.start >= 0
            and (last.start + last.length, last.place + last.length) == (start, place)
        ):
            found[-1] = Run(last.start, last.length + real, last.place)
        else:
            found.append(Run(start, real, place))
        if mask == "cyclic" and appears < 0 and real < window:  # looking back over the edge shows the padding
            found.append(Run(-1, window - real, place + real))
    return tuple(found)


def window_bias(inputs: Inputs, window: Window) -> Tensor | None:
    """What is added to the scores of a chunk's queries, by the place where a key appears.

    Returns:
        (h or 1, w, w, 3w, 3w): query row and column in its chunk, row and column of the key counted from the
        beginning of the chunk up and left of it; −inf outside the exact window. None where it would be all 0.
    """
    side, bias = window.side, None
    if inputs.bias_table is not None:
        # Query i and a key at place m are i − (m − w) apart, which stands at i − m + 3w − 1. In the table
        # turned around, the entries of query i are one stretch from w − 1 − i on, which `unfold` reads.
        turned = inputs.bias_table.to(inputs.score_dtype).flip(1, 2)
        bias = turned.unfold(1, 3 * side, 1).unfold(2, 3 * side, 1).flip(1, 2)
    if window.mask == "exact":
        query = torch.arange(side, device=inputs.query.device)[:, None]
        key = torch.arange(-side, 2 * side, device=inputs.query.device)
        near = (query - key).abs() <= side  # (w, 3w)
        outside = ~(near[:, None, :, None] & near[None, :, None, :])[None]  # (1, w, w, 3w, 3w)
        if bias is None:
            bias = torch.zeros(outside.shape, dtype=inputs.score_dtype, device=outside.device)
        bias = bias.masked_fill(outside, float("-inf"))
    return bias


def fold_window_bias(gradient: Tensor, window: int) -> Tensor:
    """The gradient of a bias table (h, 4w−1, 4w−1) from that of its `window_bias` (h, w, w, 3w, 3w).

    A sum in a fixed order, so that it is the same every time, also on a GPU.
    """
    gradient = gradient.flip(3, 4)  # a key's place from the end: query i's run then begins at offset i
    rows = gradient.new_zeros(gradient.shape[0], 4 * window - 1, *gradient.shape[2::2])  # (h, 4w−1, w, 3w)
    for i in range(window):
        rows[:, i : i + 3 * window] += gradient[:, i].transpose(1, 2)
    table = gradient.new_zeros(gradient.shape[0], 4 * window - 1, 4 * window - 1)
    for i in range(window):
        table[:, :, i : i + 3 * window] += rows[:, :, i]
    return table


def pad_to_chunks(tokens: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """(B, h, H·W, D) → (B, h, P, Q, D), with zeros at the bottom and right up to whole chunks."""
    grid = tokens.unflatten(2, size)  # (B, h, H, W, D)
    return F.pad(grid, (0, 0, 0, -size[1] % window, 0, -size[0] % window))


def keys_per_query(
    window: int,
    mask: Mask = "chunk",
    neighbors: Literal["all", "self", "one", "random"] | int | Tensor = "all",
) -> int:
    """Local keys that a query far from the edges sees, as the paper counts them: 9w² for the chunk mask."""
    if mask == "exact":
        return (2 * window + 1) ** 2
    chunks = {"all": 9, "self": 1}.get(neighbors, 2) if isinstance(neighbors, str) else 2
    return chunks * window**2
