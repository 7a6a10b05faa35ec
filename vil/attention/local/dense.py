"""Reference implementation of 2-D local attention: ordinary attention with a mask. O((H·W)²) time and memory.

Legend: h heads; H, W the map; P, Q the map padded to whole chunks; G global tokens; D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import Inputs, LocalAttentionSpec, pad_to_chunks
from vil.attention.maps import softmax_weights


def dense_attention(inputs: Inputs, spec: LocalAttentionSpec) -> Tensor:
    """See `vil.attention.local.local_attention`."""
    weights = _weights(inputs, dense_bias(inputs, spec), spec, inputs.query)
    values = _pad_and_concatenate(inputs.global_value, inputs.value, spec)
    return F.dropout(weights, spec.dropout) @ values


def dense_weights(inputs: Inputs, spec: LocalAttentionSpec, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention weights of `dense_attention` for some queries, without dropout.

    Args:
        inputs: the tensors; values are not read.
        spec: the map and the visible keys.
        queries: (n,) int64, indices among the H·W tokens.

    Returns:
        Weights (B, h, n, G + H·W + R): global tokens, the map, and for the cyclic mask (R = 1, else 0) the
        padding, whose keys and values are 0; and the visible positions of the map, (n, H·W) bool.
    """
    num_globals, (height, width) = inputs.global_key.shape[2], spec.size
    bias = dense_bias(inputs, spec, queries)  # (h or 1, n, P·Q)
    weights = _weights(inputs, bias, spec, inputs.query[:, :, queries])
    chunks = tuple(-(-length // spec.window) * spec.window for length in spec.size)  # (P, Q)
    padded = weights[..., num_globals:].unflatten(-1, chunks)  # (B, h, n, P, Q)
    parts = [weights[..., :num_globals], padded[..., :height, :width].flatten(-2)]
    if spec.mask == "cyclic":
        bottom, right = padded[..., height:, :], padded[..., :height, width:]
        parts.append((bottom.sum((-2, -1)) + right.sum((-2, -1)))[..., None])
    seen = bias[0].isfinite().unflatten(-1, chunks)[:, :height, :width].flatten(1)
    return torch.cat(parts, dim=-1), seen


def dense_bias(inputs: Inputs, spec: LocalAttentionSpec, queries: Tensor | None = None) -> Tensor:
    """Return the biases of all scores with the padded map, −inf for hidden keys.

    If chunks wrap, a chunk may be visible several times, and the weights of its copies are summed; for biases
    this is the logarithm of the sum of exponentials.

    Args:
        inputs: the tensors.
        spec: the map and the visible keys.
        queries: (n,) int64, indices among the H·W tokens; None for all, n = H·W.

    Returns:
        (heads, n, P·Q), or (1, n, P·Q) without a table; dtype and device of the query.
    """
    query, table = inputs.query, inputs.bias_table
    if queries is None:
        queries = torch.arange(spec.size[0] * spec.size[1], device=query.device)
    rows, columns = (
        {step: tuple(x[positions] for x in _axis(length, spec, step, query.device)) for step in (-1, 0, 1)}
        for length, positions in zip(spec.size, (queries // spec.size[1], queries % spec.size[1]))
    )
    if table is None:
        table = query.new_zeros(1, 4 * spec.window - 1, 4 * spec.window - 1)
    copies = []
    neighbor = None if inputs.neighbor is None else int(inputs.neighbor)
    for row_step, column_step in spec.chunk_offsets(neighbor):
        row_seen, row_offset = rows[row_step]  # (n, P)
        column_seen, column_offset = columns[column_step]  # (n, Q)
        seen = row_seen[:, :, None] & column_seen[:, None, :]  # (n, P, Q)
        bias = table[:, row_offset[:, :, None], column_offset[:, None, :]]  # (h or 1, n, P, Q)
        copies.append(bias.to(query.dtype).masked_fill(~seen, float("-inf")).flatten(2))
    if spec.mask != "cyclic":  # a position appears at most once
        return torch.stack(copies).amax(dim=0)
    return _logsumexp(torch.stack(copies))


def _weights(inputs: Inputs, local_bias: Tensor, spec: LocalAttentionSpec, query: Tensor) -> Tensor:
    """Compute the softmax over global keys and the padded map: query (B, h, n, D) → (B, h, n, G + P·Q)."""
    heads, num_globals = query.shape[1], inputs.global_key.shape[2]
    global_bias = inputs.global_bias
    if global_bias is None:
        global_bias = query.new_zeros(heads, num_globals)
    global_bias = global_bias.to(query.dtype)[:, None, :].expand(-1, query.shape[2], -1)
    bias = torch.cat([global_bias, local_bias.expand(heads, -1, -1)], dim=-1)
    return softmax_weights(query, _pad_and_concatenate(inputs.global_key, inputs.key, spec), bias)


def _pad_and_concatenate(global_tokens: Tensor, tokens: Tensor, spec: LocalAttentionSpec) -> Tensor:
    """Concatenate global tokens and the map, padded to whole chunks: (B, h, G + P·Q, D)."""
    return torch.cat([global_tokens, pad_to_chunks(tokens, spec.size, spec.window).flatten(2, 3)], dim=2)


def _axis(length: int, spec: LocalAttentionSpec, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the visible keys in the chunk at offset `step` along one axis, and their entries of the table.

    Returns:
        Visible (length, padded) bool; entry of the bias table (length, padded) int64 in [0, 4w−2].
    """
    side = spec.window
    chunks = -(-length // side)
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(chunks * side, device=device)[None, :]
    target = query // side + step  # may lie outside the map
    appears_at = target * side + key % side
    seen = (key // side == (target % chunks if spec.mask == "cyclic" else target)) & (key < length)
    if spec.mask == "cyclic" and step == -1:  # wrapping backwards includes the padding of the last chunk
        seen |= (query < side) & (key // side == chunks - 1)
    if spec.mask == "exact":
        seen &= (query - appears_at).abs() <= side
    return seen, query - appears_at + 2 * side - 1


def _logsumexp(stacked: Tensor) -> Tensor:
    """Compute logsumexp over the first dimension, with gradient 0 instead of NaN if all entries are −inf."""
    empty = stacked.isneginf().all(dim=0)
    return stacked.masked_fill(empty, 0.0).logsumexp(dim=0).masked_fill(empty, float("-inf"))
