"""Masks of the tokens beyond the borders of the map, for the kernels: one per kind of chunk.

Chunks with the same neighbors on the map see the same of the nine chunks around them, so there are few masks.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

AxisMasks = tuple[tuple[bool, ...], ...]
"""Masks of 3w positions along one axis, by kind: True for tokens that are visible, or see the chunk."""


class BorderMasks(NamedTuple):
    """Masks of the nine chunks around a chunk, by kind; see `border_masks`."""

    kinds: tuple[int, int, int]
    """Packed kinds of the rows and of the columns of chunks (`border_kinds`); number of kinds of columns."""
    keys: tuple[AxisMasks, AxisMasks]
    """Rows and columns: positions that the center chunk sees."""
    queries: tuple[AxisMasks, AxisMasks]
    """The same for queries that see the center chunk."""


def border_masks(size: tuple[int, int], side: int, cyclic: bool) -> BorderMasks:
    """Return the masks for a map of `size` (H, W) in chunks of `side`."""
    (rows, row_kinds), (columns, column_kinds) = (border_kinds(length, side, cyclic) for length in size)
    keys, queries = zip(zip(*row_kinds), zip(*column_kinds))
    return BorderMasks((rows, columns, len(column_kinds)), keys, queries)


@cache
def additive_mask(
    masks: tuple[AxisMasks, AxisMasks],
    num_globals: int,
    columns: int,
    center_only: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return a mask to add to scores: 0 for global and visible local keys, −∞ for others and padding.

    Cached forever: there are few, and CUDA graphs may hold their addresses.

    Args:
        masks: kinds of rows and of columns; both must be visible.
        num_globals: number of global keys, in front.
        columns: length of a row, at least the number of keys.
        center_only: only the center of the nine chunks are keys.
        dtype, device: of the result.

    Returns:
        (kinds, columns), kinds of rows times kinds of columns.
    """
    visible = torch.tensor(masks[0])[:, None, :, None] & torch.tensor(masks[1])[None, :, None, :]
    if center_only:
        side = visible.shape[-1] // 3
        visible = visible[..., side : 2 * side, side : 2 * side]
    keys = visible.flatten(2).flatten(0, 1)  # (kinds, 9w² or w²)
    keys = F.pad(F.pad(keys, (num_globals, 0), value=True), (0, columns - num_globals - keys.shape[1]))
    return torch.zeros(keys.shape, dtype=dtype).masked_fill(~keys, float("-inf")).to(device)


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
