"""2-D local attention as one piece of plain operators, without a loop over chunks: for exported graphs.

`torch.export`, ONNX and `torch.jit.trace` write down each operator that they meet. What they write of this
one runs where this package is not installed. It copies every key nine times, so nothing else uses it.

Legend: B batch, h heads, c chunks, s seen chunks, t tokens of a chunk (w²), G global tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import Inputs, Window, pad_to_chunks, window_bias

OWN = 4  # place of a query's own chunk among the nine, counted row by row


def gathered_attention(inputs: Inputs, window: Window) -> Tensor:
    """See `vil.attention.local.local_attention`."""
    globals_, side = inputs.global_key.shape[2], window.side
    seen = _seen(window, inputs.neighbor, inputs.query.device)  # (s,)
    real = _real_keys(window, inputs.query.device)[:, seen].flatten(1)  # (c, s·t)

    query = _to_chunks(inputs.query, window) * inputs.query.shape[-1] ** -0.5  # (B, h, c, t, D)
    keys = _surroundings(_to_chunks(inputs.key, window), window, seen)  # (B, h, c, s·t, D)
    values = _surroundings(_to_chunks(inputs.value, window), window, seen)

    scores = (query @ keys.transpose(-2, -1)).to(inputs.score_dtype)  # (B, h, c, t, s·t)
    bias = window_bias(inputs, window)  # (h or 1, w, w, 3w, 3w)
    if bias is not None:
        by_chunk = bias.unflatten(4, (3, side)).unflatten(3, (3, side))  # (h, w, w, 3, w, 3, w)
        by_chunk = by_chunk.transpose(4, 5).flatten(5).flatten(3, 4).flatten(1, 2)  # (h, t, 9, t)
        scores = scores + by_chunk[:, None, :, seen].flatten(3)  # (h, 1, t, s·t)
    scores = scores.masked_fill(~real[:, None], float("-inf"))

    global_scores = (query @ inputs.global_key[:, :, None].transpose(-2, -1)).to(
        scores.dtype
    )  # (B, h, c, t, G)
    if inputs.global_bias is not None:
        global_scores = global_scores + inputs.global_bias[:, None, None]
    weights = torch.cat([global_scores, scores], dim=-1).softmax(dim=-1).to(values.dtype)
    weights = F.dropout(weights, window.dropout)
    output = weights[..., :globals_] @ inputs.global_value[:, :, None] + weights[..., globals_:] @ values
    return _from_chunks(output, window)


def _seen(window: Window, neighbor: Tensor | None, device: torch.device) -> Tensor:
    """(s,) places among the nine chunks of those that are seen; no value of a tensor is read by the host."""
    if neighbor is None:
        return (
            torch.arange(9, device=device)
            if window.neighbors == "all"
            else torch.full((1,), OWN, device=device)
        )
    neighbor = neighbor.reshape(1)
    return torch.cat([torch.full_like(neighbor, OWN), neighbor + (neighbor >= OWN)])


def _surroundings(chunks: Tensor, window: Window, seen: Tensor) -> Tensor:
    """For each chunk, the chunks around it that are seen: (B, h, c, t, D) → (B, h, c, s·t, D).

    Beyond the map's edge stands the opposite side of the map for the cyclic mask, and anything for the
    others.
    """
    rows = -(-window.size[0] // window.side)
    grid = chunks.unflatten(2, (rows, -1))  # (B, h, rows, columns, t, D)
    for dim in (2, 3):
        grid = torch.cat([grid.narrow(dim, -1, 1), grid, grid.narrow(dim, 0, 1)], dim=dim)
    around = grid.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, h, rows, columns, t, D, 3, 3), a view
    around = around.permute(0, 1, 2, 3, 6, 7, 4, 5).flatten(4, 5)  # (B, h, rows, columns, 9, t, D)
    if window.neighbors != "all":
        around = around.index_select(4, seen)
    return around.flatten(4, 5).flatten(2, 3)


def _real_keys(window: Window, device: torch.device) -> Tensor:
    """(c, 9, t): for each chunk and those around it, itself in the middle, which positions are keys."""
    rows = _real_keys_along(window.size[0], window, device)  # (rows, 3, w)
    columns = _real_keys_along(window.size[1], window, device)
    real = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return real.flatten(4).flatten(2, 3).flatten(0, 1)


def _real_keys_along(length: int, window: Window, device: torch.device) -> Tensor:
    chunks = -(-length // window.side)
    step = torch.arange(-1, 2, device=device)
    own = torch.arange(chunks, device=device)[:, None]
    position = ((own + step) % chunks)[..., None] * window.side + torch.arange(window.side, device=device)
    real = position < length
    if window.mask == "cyclic":  # looking back over the edge shows the padding of the last chunk
        return real | ((own == 0) & (step == -1))[..., None]
    return real & ((own + step >= 0) & (own + step < chunks))[..., None]


def _to_chunks(tokens: Tensor, window: Window) -> Tensor:
    """(B, h, H·W, D) → (B, h, c, t, D), zeros where the last chunks reach over the map."""
    grid = pad_to_chunks(tokens, window.size, window.side)  # (B, h, P, Q, D)
    chunks = grid.unflatten(3, (-1, window.side)).unflatten(2, (-1, window.side))
    return chunks.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # from (B, h, rows, w, columns, w, D)


def _from_chunks(chunks: Tensor, window: Window) -> Tensor:
    """The inverse of `_to_chunks`: (B, h, c, t, D) → (B, h, H·W, D)."""
    (height, width), side = window.size, window.side
    rows = -(-height // side)
    grid = chunks.unflatten(2, (rows, -1)).unflatten(4, (side, side))  # (B, h, rows, columns, w, w, D)
    grid = grid.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # (B, h, P, Q, D)
    return grid[:, :, :height, :width].flatten(2, 3)
