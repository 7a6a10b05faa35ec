"""The definition of 2-D local attention: ordinary attention under a dense mask. O((H·W)²) time and memory.

Legend: h heads; H, W the map; P, Q the map padded to whole chunks; G global tokens; D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import Inputs, Window, pad_to_chunks
from vil.attention.weights import softmax_weights


def dense_attention(inputs: Inputs, window: Window) -> Tensor:
    """See `vil.attention.local.local_attention`."""
    weights = _weights(inputs, dense_bias(inputs, window), window, inputs.query)
    values = _padded(inputs.global_value, inputs.value, window)
    return F.dropout(weights, window.dropout) @ values


def dense_weights(inputs: Inputs, window: Window, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The weights by which `dense_attention` sums up values, for some queries.

    Args:
        inputs: the tensors; values are not read.
        window: which keys are seen; dropout is not applied.
        queries: (n,) int64, the places of the queries among the H·W.

    Returns:
        weights (B, h, n, G + H·W + R): global tokens, the map, and for the cyclic mask (R = 1, else 0) all
        padding, whose keys and values are 0; and which positions of the map each query sees, (n, H·W) bool.
    """
    globals_, (height, width) = inputs.global_key.shape[2], window.size
    bias = dense_bias(inputs, window, queries)  # (h or 1, n, P·Q)
    weights = _weights(inputs, bias, window, inputs.query[:, :, queries])
    chunks = tuple(-(-length // window.side) * window.side for length in window.size)  # (P, Q)
    padded = weights[..., globals_:].unflatten(-1, chunks)  # (B, h, n, P, Q)
    parts = [weights[..., :globals_], padded[..., :height, :width].flatten(-2)]
    if window.mask == "cyclic":
        below, beside = padded[..., height:, :], padded[..., :height, width:]
        parts.append((below.sum((-2, -1)) + beside.sum((-2, -1)))[..., None])
    seen = bias[0].isfinite().unflatten(-1, chunks)[:, :height, :width].flatten(1)
    return torch.cat(parts, dim=-1), seen


def dense_bias(inputs: Inputs, window: Window, queries: Tensor | None = None) -> Tensor:
    """What is added to each score of a query and a position of the padded map: −inf where it is not seen.

    A chunk that is seen several times, as happens where chunks wrap, adds up the weights of its appearances;
    for the bias this is the logarithm of the sum of their exponentials.

    Args:
        inputs: the tensors.
        window: which keys are seen.
        queries: (n,) int64, the places of the queries among the H·W; None for all, n = H·W.

    Returns:
        (heads, n, P·Q), or (1, n, P·Q) without a table; dtype and device of the query.
    """
    like, table = inputs.query, inputs.bias_table
    if queries is None:
        queries = torch.arange(window.size[0] * window.size[1], device=like.device)
    rows, columns = (
        {step: tuple(x[place] for x in _axis(length, window, step, like.device)) for step in (-1, 0, 1)}
        for length, place in zip(window.size, (queries // window.size[1], queries % window.size[1]))
    )
    if table is None:
        table = like.new_zeros(1, 4 * window.side - 1, 4 * window.side - 1)
    appearances = []
    for row_step, column_step in window.seen(None if inputs.neighbor is None else int(inputs.neighbor)):
        row_seen, row_offset = rows[row_step]  # (n, P)
        column_seen, column_offset = columns[column_step]  # (n, Q)
        seen = row_seen[:, :, None] & column_seen[:, None, :]  # (n, P, Q)
        bias = table[:, row_offset[:, :, None], column_offset[:, None, :]]  # (h or 1, n, P, Q)
        appearances.append(bias.to(like.dtype).masked_fill(~seen, float("-inf")).flatten(2))
    if window.mask != "cyclic":  # a position appears at most once
        return torch.stack(appearances).amax(dim=0)
    return _logsumexp(torch.stack(appearances))


def _weights(inputs: Inputs, local_bias: Tensor, window: Window, query: Tensor) -> Tensor:
    """Softmax over global keys and the padded map: query (B, h, n, D) → (B, h, n, G + P·Q)."""
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
    return softmax_weights(query, _padded(inputs.global_key, inputs.key, window), bias)


def _padded(memory: Tensor, tokens: Tensor, window: Window) -> Tensor:
    """Global ones before those of the map padded to whole chunks: (B, h, G + P·Q, D)."""
    return torch.cat([memory, pad_to_chunks(tokens, window.size, window.side).flatten(2, 3)], dim=2)


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
