"""Relative position: learned biases by the offset of a query and a key on the map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.tracing import is_exporting


def position_biases(table: Tensor, queries: tuple[int, int]) -> Tensor:
    """Return the biases of queries and keys on two grids from a table of their offsets, query − key.

    Args:
        table: (h, a + c − 1, b + d − 1): one entry per offset of rows and of columns. The last entry is that
            of the last query and the first key.
        queries: (a, b), rows and columns of the queries.

    Returns:
        (h, a, b, c, d): rows and columns of the queries, then of the keys.
    """
    is_compiled = torch.compiler.is_compiling() and not is_exporting()
    return (_expand_by_views if is_compiled else _expand)(table, queries)


def _expand(table: Tensor, queries: tuple[int, int]) -> Tensor:
    """See `position_biases`."""
    biases = table.flip(1, 2)  # in it, the entries of a query are contiguous, and begin earlier for the next
    for dim, count in enumerate(queries, start=1):
        biases = biases.unfold(dim, table.shape[dim] - count + 1, 1)  # a view: (h, a, b, c, d) in the end
    return biases.flip(1, 2)


def _expand_by_views(table: Tensor, queries: tuple[int, int]) -> Tensor:
    """See `position_biases`: for compilers, which fuse these functions.

    The gradient is a sum. Inductor computes that of `Tensor.unfold` by atomic additions, in an order that
    changes from run to run; PyTorch's own kernel does not.
    """
    columns = _sliding_ranges(table, queries[1])  # (h, a + c − 1, b, d)
    both = _sliding_ranges(columns.movedim(1, 3), queries[0])  # (h, b, d, a, c)
    return both.permute(0, 3, 1, 4, 2).flip(3, 4)


def _sliding_ranges(x: Tensor, count: int) -> Tensor:
    """Return entries i … i + n − 1 of the last axis for all i < count: (…, count + n − 1) → (…, count, n)."""
    length = x.shape[-1]
    copies = x[..., None, :].expand(*x.shape[:-1], count + 1, length).flatten(-2)
    # In rows of `length` + 1 entries, each copy begins one entry later than the one before.
    rows = copies[..., : count * (length + 1)].unflatten(-1, (count, length + 1))
    return rows[..., : length - count + 1]


def resize_offsets(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a table of offsets (h, 2H'−1, 2W'−1) to (h, 2H−1, 2W−1), (H, W) = `size`, bilinearly."""
    target = (2 * size[0] - 1, 2 * size[1] - 1)
    if table.shape[1:] == target:
        return table
    return F.interpolate(table[None], target, mode="bilinear", align_corners=False)[0]
