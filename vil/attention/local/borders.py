"""Masks of the tokens beyond the borders of the map, for the kernels: one per kind of chunk.

Chunks with the same neighbors on the map see the same of the nine chunks around them, so there are few masks.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class BorderMasks(NamedTuple):
    """Masks of the nine chunks around a chunk, by kind; see `border_masks`."""

    kinds: tuple[int, int, int]
    """Packed kinds of the rows and of the columns of chunks (`border_kinds`); number of kinds of columns."""
    hidden_keys: Tensor
    """(kinds, 9w²), kinds of rows times columns: 0 for positions that the center chunk sees, else −∞."""
    hidden_queries: Tensor
    """The same with 0 for queries that see the center chunk."""


def border_masks(size: tuple[int, int], side: int, cyclic: bool, device: torch.device) -> BorderMasks:
    """Return the masks for a map of `size` (H, W) in chunks of `side`."""
    (rows, row_kinds), (columns, column_kinds) = (border_kinds(length, side, cyclic) for length in size)
    # Of rows and columns: masks of the keys, then masks of the queries.
    keys, queries = (_hidden(*axes, device) for axes in zip(zip(*row_kinds), zip(*column_kinds)))
    return BorderMasks((rows, columns, len(column_kinds)), keys, queries)


@cache
def _hidden(
    rows: tuple[tuple[bool, ...], ...], columns: tuple[tuple[bool, ...], ...], device: torch.device
) -> Tensor:
    """Return (kinds, 9w²), 0 where both the row and the column (3w each, by kind) are True, else −∞.

    Cached forever: there are few, and CUDA graphs may hold their addresses.
    """
    seen = torch.tensor(rows)[:, None, :, None] & torch.tensor(columns)[None, :, None, :]
    hidden = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    return hidden.flatten(2).flatten(0, 1).to(device)


@lru_cache(maxsize=4096)
def border_kinds(
    length: int, side: int, cyclic: bool
) -> tuple[int, tuple[tuple[tuple[bool, ...], tuple[bool, ...]], ...]]:
    """Return the kinds of chunks along one axis, by the chunks before and after them.

    There are six cases: with or without a chunk before, and with none, one or more after. At most four occur
    on one map, and some have equal masks.

    Returns:
        The kind of each case, three bits each, in the order of `kernels._kind`; and for each kind, two masks
        of the 3w positions around: keys, and queries.
    """
    chunks = -(-length // side)
    kinds: list[tuple[tuple[bool, ...], tuple[bool, ...]]] = []
    packed = 0
    for case in range(6):
        chunks_of_case = [c for c in range(chunks) if (c > 0) * 3 + min(chunks - 1 - c, 2) == case]
        if not chunks_of_case:
            continue
        keys, queries = [], []
        for position in range((chunks_of_case[0] - 1) * side, (chunks_of_case[0] + 2) * side):
            wrapped = position % (chunks * side) if cyclic else position
            queries.append(0 <= wrapped < length)
            keys.append(queries[-1] or (cyclic and position < 0))
        kind = (tuple(keys), tuple(queries))
        if kind not in kinds:
            kinds.append(kind)
        packed |= kinds.index(kind) << 3 * case
    return packed, tuple(kinds)
