"""2-D local attention in plain PyTorch, linear in tokens: every chunk gathers the chunks it sees.

Legend: B batch, h heads, c chunks, s seen chunks, t tokens of a chunk (w²), G global tokens, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

OWN = 4  # place of a query's own chunk among the nine, counted row by row


def chunked_attention(
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
    globals_ = global_key.shape[2]
    seen = _seen(neighbors, query.device)  # (s,)
    real = _real_keys(size, window, mask, query.device)[:, seen].flatten(1)  # (c, s·t)

    query_chunks = _to_chunks(query, size, window) * query.shape[-1] ** -0.5  # (B, h, c, t, D)
    keys = _surroundings(_to_chunks(key, size, window), size, window, mask, seen)  # (B, h, c, s·t, D)
    values = _surroundings(_to_chunks(value, size, window), size, window, mask, seen)

    scores = query_chunks @ keys.transpose(-2, -1)  # (B, h, c, t, s·t)
    if bias_table is not None:
        bias = _bias_of_offsets(bias_table, window)[:, seen]  # (h, s, t, t)
        scores = scores + bias.transpose(1, 2).flatten(2)[:, None]  # (h, 1, t, s·t)
    visible = real[:, None]  # (c, 1, s·t)
    if mask == "exact":
        visible = visible & _within(window, query.device)[seen].transpose(0, 1).flatten(1)  # (c, t, s·t)
    scores = scores.masked_fill(~visible, float("-inf"))

    global_scores = query_chunks @ global_key[:, :, None].transpose(-2, -1)  # (B, h, c, t, G)
    if global_bias is not None:
        global_scores = global_scores + global_bias[:, None, None]
    weights = torch.cat([global_scores, scores], dim=-1).softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, dropout)
    output = weights[..., :globals_] @ global_value[:, :, None] + weights[..., globals_:] @ values
    return _from_chunks(output, size, window)


def _seen(neighbors: str | int | Tensor, device: torch.device) -> Tensor:
    """(s,) places among the nine chunks of those that are seen; no value of a tensor is read by the host."""
    if isinstance(neighbors, str):
        return torch.arange(9, device=device) if neighbors == "all" else torch.full((1,), OWN, device=device)
    neighbor = torch.as_tensor(neighbors, device=device).reshape(1)
    return torch.cat([torch.full_like(neighbor, OWN), neighbor + (neighbor >= OWN)])


def _surroundings(chunks: Tensor, size: tuple[int, int], window: int, mask: str, seen: Tensor) -> Tensor:
    """For each chunk, the chunks around it that are seen: (B, h, c, t, D) → (B, h, c, s·t, D).

    Beyond the map's edge stands the opposite side of the map for the cyclic mask, and anything for the
    others.
    """
    rows = -(-size[0] // window)
    grid = chunks.unflatten(2, (rows, -1))  # (B, h, rows, columns, t, D)
    for dim in (2, 3):
        grid = torch.cat([grid.narrow(dim, -1, 1), grid, grid.narrow(dim, 0, 1)], dim=dim)
    around = grid.unfold(2, 3, 1).unfold(3, 3, 1)  # (B, h, rows, columns, t, D, 3, 3), a view
    if len(seen) == 9:
        around = around.permute(0, 1, 2, 3, 6, 7, 4, 5).flatten(4, 5)  # (B, h, rows, columns, 9, t, D)
    else:
        around = torch.stack(
            [around.index_select(6, s // 3).index_select(7, s % 3)[..., 0, 0] for s in seen.split(1)], dim=4
        )  # (B, h, rows, columns, s, t, D)
    return around.flatten(4, 5).flatten(2, 3)


def _real_keys(size: tuple[int, int], window: int, mask: str, device: torch.device) -> Tensor:
    """(c, 9, t): for each chunk and those around it, itself in the middle, which positions are keys."""
    rows = _real_keys_along(size[0], window, mask, device)  # (rows, 3, w)
    columns = _real_keys_along(size[1], window, mask, device)
    real = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return real.flatten(4).flatten(2, 3).flatten(0, 1)


def _real_keys_along(length: int, window: int, mask: str, device: torch.device) -> Tensor:
    chunks = -(-length // window)
    step = torch.arange(-1, 2, device=device)
    own = torch.arange(chunks, device=device)[:, None]
    position = ((own + step) % chunks)[..., None] * window + torch.arange(window, device=device)
    real = position < length
    if mask == "cyclic":  # looking back over the edge shows the padding of the last chunk
        return real | ((own == 0) & (step == -1))[..., None]
    return real & ((own + step >= 0) & (own + step < chunks))[..., None]


def _bias_of_offsets(table: Tensor, window: int) -> Tensor:
    """(h, 4w−1, 4w−1) by offset → (h, 9, t, t) by seen chunk, query and key, without a tensor of indices.

    Along one axis, query i and key j of the chunk `step` ∈ {−1, 0, 1} chunks away are i − j − step·w apart.
    In the table turned around, this entry stands at (step+1)·w + (w−1−i) + j: one stretch of w entries for
    each of 3w places, which `unfold` reads off.
    """
    turned = table.flip(1, 2).unfold(1, window, 1).unfold(2, window, 1)  # (h, 3w, 3w, w, w)
    apart = turned.unflatten(2, (3, window)).unflatten(1, (3, window))  # (h, 3, w, 3, w, w, w)
    by_chunk = apart.flip(2, 4).permute(0, 1, 3, 2, 4, 5, 6)  # (h, 3, 3, query w, w, key w, w)
    return by_chunk.flatten(5).flatten(3, 4).flatten(1, 2)


def _within(window: int, device: torch.device) -> Tensor:
    """(9, t, t): for each seen chunk, query and key, whether they are at most w rows and w columns apart."""
    step = torch.arange(-1, 2, device=device)[:, None, None]
    place = torch.arange(window, device=device)
    along = (place[:, None] - place - step * window).abs() <= window  # (3, query w, key w)
    both = along[:, None, :, None, :, None] & along[None, :, None, :, None, :]  # (3, 3, w, w, w, w)
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


def _to_chunks(tokens: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """(B, h, H·W, D) → (B, h, c, t, D), zeros where the last chunks reach over the map."""
    grid = tokens.unflatten(2, size)  # (B, h, H, W, D)
    grid = F.pad(grid, (0, 0, 0, -size[1] % window, 0, -size[0] % window))
    chunks = grid.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, h, rows, w, columns, w, D)
    return chunks.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _from_chunks(chunks: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """The inverse of `_to_chunks`: (B, h, c, t, D) → (B, h, H·W, D)."""
    rows = -(-size[0] // window)
    grid = chunks.unflatten(2, (rows, -1)).unflatten(4, (window, window))  # (B, h, rows, columns, w, w, D)
    grid = grid.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # (B, h, P, Q, D)
    return grid[:, :, : size[0], : size[1]].flatten(2, 3)
