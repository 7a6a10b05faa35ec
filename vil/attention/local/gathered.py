"""2-D local attention in plain operators, without a loop over chunks, for exported graphs.

Graphs of `torch.export`, ONNX and `torch.jit.trace` then run without this package. Every key is copied nine
times, so this is slower than the other backends.

Legend: B batch, h heads, c chunks, s seen chunks, t tokens of a chunk (w²), G global tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import Inputs, LocalAttentionSpec, pad_to_chunks, window_bias

CENTER = 4  # index of a query's own chunk among the nine, row by row


def gathered_attention(inputs: Inputs, spec: LocalAttentionSpec) -> Tensor:
    """See `vil.attention.local.local_attention`."""
    num_globals, side = inputs.global_key.shape[2], spec.window
    visible = _visible_chunks(spec, inputs.neighbor, inputs.query.device)  # (s,)
    is_key = _key_mask(spec, inputs.query.device)[:, visible].flatten(1)  # (c, s·t)

    query = _to_chunks(inputs.query, spec) * inputs.query.shape[-1] ** -0.5  # (B, h, c, t, D)
    keys = _gather_neighbors(_to_chunks(inputs.key, spec), spec, visible)  # (B, h, c, s·t, D)
    values = _gather_neighbors(_to_chunks(inputs.value, spec), spec, visible)

    scores = (query @ keys.transpose(-2, -1)).to(inputs.score_dtype)  # (B, h, c, t, s·t)
    bias = window_bias(inputs, spec)  # (h or 1, w, w, 3w, 3w)
    if bias is not None:
        by_chunk = bias.unflatten(4, (3, side)).unflatten(3, (3, side))  # (h, w, w, 3, w, 3, w)
        by_chunk = by_chunk.transpose(4, 5).flatten(5).flatten(3, 4).flatten(1, 2)  # (h, t, 9, t)
        scores = scores + by_chunk[:, None, :, visible].flatten(3)  # (h, 1, t, s·t)
    scores = scores.masked_fill(~is_key[:, None], float("-inf"))

    global_scores = query @ inputs.global_key[:, :, None].transpose(-2, -1)  # (B, h, c, t, G)
    global_scores = global_scores.to(scores.dtype)
    if inputs.global_bias is not None:
        global_scores = global_scores + inputs.global_bias[:, None, None]
    weights = torch.cat([global_scores, scores], dim=-1).softmax(dim=-1).to(values.dtype)
    weights = F.dropout(weights, spec.dropout)
    output = weights[..., :num_globals] @ inputs.global_value[:, :, None]
    return _from_chunks(output + weights[..., num_globals:] @ values, spec)


def _visible_chunks(spec: LocalAttentionSpec, neighbor: Tensor | None, device: torch.device) -> Tensor:
    """Return the indices (s,) of the visible chunks among the nine, without a synchronization."""
    if spec.neighbors == "all":
        return torch.arange(9, device=device)
    if neighbor is None:
        return torch.full((1,), CENTER, device=device)
    neighbor = neighbor.reshape(1)
    return torch.cat([torch.full_like(neighbor, CENTER), neighbor + (neighbor >= CENTER)])


def _gather_neighbors(chunks: Tensor, spec: LocalAttentionSpec, visible: Tensor) -> Tensor:
    """Gather the visible chunks around each chunk: (B, h, c, t, D) → (B, h, c, s·t, D).

    Beyond an edge of the map they are those of the opposite side, which only the cyclic mask uses.
    """
    rows = -(-spec.size[0] // spec.window)
    grid = chunks.unflatten(2, (rows, -1))  # (B, h, rows, columns, t, D)
    for dim in (2, 3):
        grid = torch.cat([grid.narrow(dim, -1, 1), grid, grid.narrow(dim, 0, 1)], dim=dim)
    neighborhood = grid.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, h, rows, columns, t, D, 3, 3), a view
    neighborhood = neighborhood.movedim((6, 7), (4, 5)).flatten(4, 5)  # (B, h, rows, columns, 9, t, D)
    if spec.neighbors != "all":
        neighborhood = neighborhood.index_select(4, visible)
    return neighborhood.flatten(4, 5).flatten(2, 3)


def _key_mask(spec: LocalAttentionSpec, device: torch.device) -> Tensor:
    """Return (c, 9, t), True for positions of the nine chunks around each chunk that are keys."""
    rows = _key_mask_along(spec.size[0], spec, device)  # (rows, 3, w)
    columns = _key_mask_along(spec.size[1], spec, device)
    is_key = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return is_key.flatten(4).flatten(2, 3).flatten(0, 1)


def _key_mask_along(length: int, spec: LocalAttentionSpec, device: torch.device) -> Tensor:
    chunks = -(-length // spec.window)
    step = torch.arange(-1, 2, device=device)
    chunk = torch.arange(chunks, device=device)[:, None]
    position = ((chunk + step) % chunks)[..., None] * spec.window + torch.arange(spec.window, device=device)
    is_key = position < length
    if spec.mask == "cyclic":  # wrapping backwards includes the padding of the last chunk
        return is_key | ((chunk == 0) & (step == -1))[..., None]
    return is_key & ((chunk + step >= 0) & (chunk + step < chunks))[..., None]


def _to_chunks(tokens: Tensor, spec: LocalAttentionSpec) -> Tensor:
    """Split into chunks, padded with zeros: (B, h, H·W, D) → (B, h, c, t, D)."""
    grid = pad_to_chunks(tokens, spec.size, spec.window)  # (B, h, P, Q, D)
    chunks = grid.unflatten(3, (-1, spec.window)).unflatten(2, (-1, spec.window))
    return chunks.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # from (B, h, rows, w, columns, w, D)


def _from_chunks(chunks: Tensor, spec: LocalAttentionSpec) -> Tensor:
    """Invert `_to_chunks`: (B, h, c, t, D) → (B, h, H·W, D)."""
    (height, width), side = spec.size, spec.window
    rows = -(-height // side)
    grid = chunks.unflatten(2, (rows, -1)).unflatten(4, (side, side))  # (B, h, rows, columns, w, w, D)
    grid = grid.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # (B, h, P, Q, D)
    return grid[:, :, :height, :width].flatten(2, 3)
