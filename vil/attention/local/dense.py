"""The definition of 2-D local attention: ordinary attention under a dense mask. O((H·W)²) time and memory.

Legend: h heads; H, W the map; P, Q the map padded to whole chunks; G global tokens; D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    mask: str,
    neighbors: str | int | Tensor,
    bias_table: Tensor | None,
    global_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """See `vil.attention.local.local_attention`."""
    local_bias = dense_bias(size, window, mask, neighbors, bias_table, query)  # (h or 1, H·W, P·Q)
    heads, globals_ = query.shape[1], global_key.shape[2]
    if global_bias is None:
        global_bias = query.new_zeros(heads, globals_)
    bias = torch.cat(
        [
            global_bias.to(query.dtype)[:, None, :].expand(heads, query.shape[2], globals_),
            local_bias.expand(heads, -1, -1),
        ],
        dim=-1,
    )
    keys = torch.cat([global_key, _pad(key, size, window)], dim=2)  # (B, h, G + P·Q, D)
    values = torch.cat([global_value, _pad(value, size, window)], dim=2)
    scores = query @ keys.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias  # (B, h, H·W, G + P·Q)
    return F.dropout(scores.softmax(dim=-1), dropout) @ values


def dense_bias(
    size: tuple[int, int],
    window: int,
    mask: str,
    neighbors: str | int | Tensor,
    bias_table: Tensor | None,
    like: Tensor,
) -> Tensor:
    """What is added to each score of a query and a position of the padded map: −inf where it is not seen.

    A chunk that is seen several times, as happens where chunks wrap, adds up the weights of its appearances;
    for the bias this is the logarithm of the sum of their exponentials.

    Returns:
        (heads, H·W, P·Q), or (1, H·W, P·Q) without a table; dtype and device of `like`.
    """
    rows = {step: _axis(size[0], window, mask, step, like.device) for step in (-1, 0, 1)}
    columns = {step: _axis(size[1], window, mask, step, like.device) for step in (-1, 0, 1)}
    if bias_table is None:
        bias_table = like.new_zeros(1, 4 * window - 1, 4 * window - 1)
    appearances = []
    for row_step, column_step in seen_chunks(neighbors):
        row_seen, row_offset = rows[row_step]  # (H, P)
        column_seen, column_offset = columns[column_step]  # (W, Q)
        seen = row_seen[:, None, :, None] & column_seen[None, :, None, :]  # (H, W, P, Q)
        bias = bias_table[:, row_offset[:, None, :, None], column_offset[None, :, None, :]]
        appearances.append(bias.to(like.dtype).masked_fill(~seen, float("-inf")).flatten(3).flatten(1, 2))
    if mask != "cyclic":  # a position appears at most once
        return torch.stack(appearances).amax(dim=0)
    return _logsumexp(torch.stack(appearances))


def seen_chunks(neighbors: str | int | Tensor) -> list[tuple[int, int]]:
    """(row, column) steps from a query's chunk to the chunks that it sees."""
    every = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    if isinstance(neighbors, str):
        return every if neighbors == "all" else [(0, 0)]
    around = [step for step in every if step != (0, 0)]
    return [(0, 0), around[int(neighbors)]]


def _axis(length: int, window: int, mask: str, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the chunk `step` chunks further along one axis: what is seen, and the offset's place in the table.

    Returns:
        seen (length, padded) bool, offset (length, padded) int64 in [0, 4w−2].
    """
    chunks = -(-length // window)
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(chunks * window, device=device)[None, :]
    target = query // window + step  # may lie outside the map
    appears_at = target * window + key % window
    seen = (key // window == (target % chunks if mask == "cyclic" else target)) & (key < length)
    if mask == "cyclic" and step == -1:  # looking back over the edge shows the padding of the last chunk
        seen |= (query < window) & (key // window == chunks - 1)
    if mask == "exact":
        seen &= (query - appears_at).abs() <= window
    return seen, query - appears_at + 2 * window - 1


def _pad(tokens: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """(B, h, H·W, D) → (B, h, P·Q, D), zeros at the bottom and right."""
    grid = tokens.unflatten(2, size)  # (B, h, H, W, D)
    return F.pad(grid, (0, 0, 0, -size[1] % window, 0, -size[0] % window)).flatten(2, 3)


def _logsumexp(stacked: Tensor) -> Tensor:
    """logsumexp over the first dimension, with gradient 0 and not NaN where all entries are −inf."""
    empty = stacked.isneginf().all(dim=0)
    return stacked.masked_fill(empty, 0.0).logsumexp(dim=0).masked_fill(empty, float("-inf"))
