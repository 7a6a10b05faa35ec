"""The definition of 2-D local attention: ordinary attention under a dense mask. O((H·W)²) time and memory.

Legend: h heads; H, W the map; P, Q the map padded to whole chunks; G global tokens; D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import Inputs, Window, pad_to_chunks


def dense_attention(inputs: Inputs, window: Window) -> Tensor:
    """See `vil.attention.local.local_attention`."""
    query, key, value = inputs.query, inputs.key, inputs.value
    local_bias = dense_bias(inputs, window)  # (h or 1, H·W, P·Q)
    heads, globals_ = query.shape[1], inputs.global_key.shape[2]
    global_bias = inputs.global_bias
    if global_bias is None:
        global_bias = query.new_zeros(heads, globals_)
    bias = torch.cat(
        [
            global_bias.to(query.dtype)[:, None, :].expand(heads, query.shape[2], globals_),
            local_bias.expand(heads, -1, -1),
        ],
        dim=-1,
    )
    keys, values = (
        torch.cat([memory, pad_to_chunks(tokens, window.size, window.side).flatten(2, 3)], dim=2)
        for memory, tokens in ((inputs.global_key, key), (inputs.global_value, value))
    )  # (B, h, G + P·Q, D)
    scores = query @ keys.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias  # (B, h, H·W, G + P·Q)
    return F.dropout(scores.softmax(dim=-1), window.dropout) @ values


def dense_bias(inputs: Inputs, window: Window) -> Tensor:
    """What is added to each score of a query and a position of the padded map: −inf where it is not seen.

    A chunk that is seen several times, as happens where chunks wrap, adds up the weights of its appearances;
    for the bias this is the logarithm of the sum of their exponentials.

    Returns:
        (heads, H·W, P·Q), or (1, H·W, P·Q) without a table; dtype and device of the query.
    """
    like, table = inputs.query, inputs.bias_table
    rows, columns = (
        {step: _axis(length, window, step, like.device) for step in (-1, 0, 1)} for length in window.size
    )
    if table is None:
        table = like.new_zeros(1, 4 * window.side - 1, 4 * window.side - 1)
    appearances = []
    for row_step, column_step in window.seen(None if inputs.neighbor is None else int(inputs.neighbor)):
        row_seen, row_offset = rows[row_step]  # (H, P)
        column_seen, column_offset = columns[column_step]  # (W, Q)
        seen = row_seen[:, None, :, None] & column_seen[None, :, None, :]  # (H, W, P, Q)
        bias = table[:, row_offset[:, None, :, None], column_offset[None, :, None, :]]
        appearances.append(bias.to(like.dtype).masked_fill(~seen, float("-inf")).flatten(3).flatten(1, 2))
    if window.mask != "cyclic":  # a position appears at most once
        return torch.stack(appearances).amax(dim=0)
    return _logsumexp(torch.stack(appearances))


def _axis(length: int, window: Window, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the chunk `step` chunks further along one axis: what is seen, and the offset's place in the table.

    Returns:
        seen (length, padded) bool, offset (length, padded) int64 in [0, 4w−2].
    """
    side = window.side
    chunks = -(-length // side)
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(chunks * side, device=device)[None, :]
    target = query // side + step  # may lie outside the map
    appears_at = target * side + key % side
    seen = (key // side == (target % chunks if window.mask == "cyclic" else target)) & (key < length)
    if (
        window.mask == "cyclic" and step == -1
    ):  # looking back over the edge shows the padding of the last chunk
        seen |= (query < side) & (key // side == chunks - 1)
    if window.mask == "exact":
        seen &= (query - appears_at).abs() <= side
    return seen, query - appears_at + 2 * side - 1


def _logsumexp(stacked: Tensor) -> Tensor:
    """logsumexp over the first dimension, with gradient 0 and not NaN where all entries are −inf."""
    empty = stacked.isneginf().all(dim=0)
    return stacked.masked_fill(empty, 0.0).logsumexp(dim=0).masked_fill(empty, float("-inf"))
