"""Methods to benchmark: the backends of the local attention, and alternatives to compare them with.

Legend: B batch, h heads, N = H·W local tokens, R × C chunks of t = w² tokens, s visible chunks, G global
tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.benchmarks.shapes import AttentionShape, grad_leaves
from tools.benchmarks.timing import Cost
from vil.attention.local import BACKENDS, local_attention
from vil.attention.local.geometry import CHUNK_OFFSETS, Inputs, LocalAttentionSpec, pad_to_chunks, window_bias

BASELINE = "sliding_chunk"
"""Method that ratios refer to."""


class UnavailableError(ValueError):
    """The method does not support this shape or machine."""


@dataclass
class PreparedMethod:
    """A method bound to tensors in the layout that it needs.

    Attributes:
        forward: returns the output (B, h, queries, D).
        leaves: tensors that gradients are computed for.
        costs: minimal cost of a forward and of a backward pass.
        to_map_order: output → (B, h, N, D) in the order of the map; None for a method that computes another
            attention.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    costs: tuple[Cost, Cost]
    to_map_order: Callable[[Tensor], Tensor] | None = None

    def infer(self) -> Tensor:
        """Return the output, computed without gradients."""
        with torch.no_grad():
            return self.forward()

    def gradients(
        self, output: Tensor, output_gradient: Tensor, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the gradients of `leaves`."""
        return torch.autograd.grad(
            output,
            self.leaves,
            output_gradient,
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )


Method = Callable[[AttentionShape, Inputs], PreparedMethod]


# --- Local attention ----------------------------------------------------------------------------------------


def prepare_local(function: Callable[..., Tensor], shape: AttentionShape, inputs: Inputs) -> PreparedMethod:
    """Bind a function with the signature of `local_attention`."""
    *tokens, table, bias, neighbor = inputs
    forward = partial(
        function,
        *tokens,
        size=shape.size,
        window=shape.window,
        mask=shape.mask,
        neighbors=shape.neighbors if neighbor is None else neighbor,
        bias_table=table,
        global_bias=bias,
    )
    return PreparedMethod(forward, grad_leaves(inputs), shape.costs(), lambda output: output)


def sliding_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    mask: str = "chunk",
    neighbors: str | int | Tensor = "all",
    bias_table: Tensor | None = None,
    global_bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute local attention by the sliding-chunk method of the paper (appendix), with autograd operators.

    For each visible chunk offset, the grid of key chunks is rolled to the chunks of the queries. The products
    for all offsets and for the global keys are concatenated and normalized by one softmax; the values are
    rolled and summed in the same way. Signature and result are those of
    `vil.attention.local.local_attention`; `backend` is ignored.
    """
    neighbor = None if isinstance(neighbors, str) else int(neighbors)
    spec = LocalAttentionSpec(size, window, mask, neighbors if neighbor is None else "one")  # type: ignore[arg-type]
    offsets, num_global = spec.chunk_offsets(neighbor), global_key.shape[2]
    query = _to_chunks(query * query.shape[-1] ** -0.5, size, window)  # (B, h, R, C, t, D)
    keys, values = _to_chunks(key, size, window), _to_chunks(value, size, window)
    products = [torch.einsum("bhrcqd,bhgd->bhrcqg", query, global_key)]
    products += [torch.einsum("bhrcqd,bhrckd->bhrcqk", query, _roll(keys, offset)) for offset in offsets]
    scores = torch.cat(products, dim=-1)  # (B, h, R, C, t, G + s·t)
    inputs = Inputs(query, key, value, global_key, global_value, bias_table, global_bias)
    bias = _chunk_bias(inputs, spec, offsets)
    if bias is not None:
        scores += bias[:, None, None]
    scores.masked_fill_(_hidden_keys(size, window, mask, offsets, num_global, query.device), float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    global_weights, *chunk_weights = weights.split([num_global, *[window**2] * len(offsets)], dim=-1)
    output = torch.einsum("bhrcqg,bhgd->bhrcqd", global_weights, global_value)
    for part, offset in zip(chunk_weights, offsets):
        output = output + torch.einsum("bhrcqk,bhrckd->bhrcqd", part, _roll(values, offset))
    grid = (
        output.unflatten(4, (window, window)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    )  # (B, h, P, Q, D)
    return grid[:, :, : size[0], : size[1]].flatten(2, 3)


def _to_chunks(tokens: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """Split into chunks, padded with zeros: (B, h, N, D) → (B, h, R, C, t, D)."""
    is_divisible = size[0] % window == 0 and size[1] % window == 0
    grid = tokens.unflatten(2, size) if is_divisible else pad_to_chunks(tokens, size, window)
    grid = grid.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, h, R, w, C, w, D)
    return grid.transpose(3, 4).flatten(4, 5)


def _roll(chunks: Tensor, offset: tuple[int, int]) -> Tensor:
    """Move the chunk at `offset` from each chunk of (B, h, R, C, t, D) to that chunk."""
    return chunks if offset == (0, 0) else chunks.roll((-offset[0], -offset[1]), dims=(2, 3))


def _chunk_bias(
    inputs: Inputs, spec: LocalAttentionSpec, offsets: tuple[tuple[int, int], ...]
) -> Tensor | None:
    """Return the (h or 1, t, G + s·t) that is added to the scores; None if it is zero."""
    local, global_bias, side = window_bias(inputs, spec), inputs.global_bias, spec.window
    num_global = inputs.global_key.shape[2]
    if local is None and global_bias is None:
        return None
    if local is None:
        local = inputs.query.new_zeros(1, side, side, 3 * side, 3 * side)
    by_chunk = local.unflatten(4, (3, side)).unflatten(3, (3, side))  # (h, w, w, 3, w, 3, w)
    by_chunk = by_chunk.transpose(4, 5).flatten(5).flatten(3, 4).flatten(1, 2)  # (h, t, 9, t)
    if len(offsets) < len(CHUNK_OFFSETS):
        by_chunk = by_chunk[:, :, [CHUNK_OFFSETS.index(offset) for offset in offsets]]
    if global_bias is None:
        global_bias = local.new_zeros(local.shape[0], num_global)
    heads = max(local.shape[0], global_bias.shape[0])
    global_part = global_bias[:, None].expand(heads, side**2, num_global)
    return torch.cat([global_part, by_chunk.flatten(2).expand(heads, -1, -1)], dim=-1)


@lru_cache(maxsize=64)
def _hidden_keys(
    size: tuple[int, int],
    window: int,
    mask: str,
    offsets: tuple[tuple[int, int], ...],
    num_global: int,
    device: torch.device,
) -> Tensor:
    """Return a mask (R, C, 1, G + s·t) of the positions in visible chunks that are not keys."""
    rows, columns = (
        {offset: _is_key(length, window, mask, offset, device) for offset in (-1, 0, 1)} for length in size
    )
    is_key = [rows[row][:, None, :, None] & columns[column][None, :, None, :] for row, column in offsets]
    return F.pad(~torch.stack(is_key, dim=2).flatten(2), (num_global, 0))[:, :, None]


def _is_key(length: int, window: int, mask: str, offset: int, device: torch.device) -> Tensor:
    """Return a mask (chunks, w) along one axis: the positions of the chunk at `offset` that are keys."""
    chunks = -(-length // window)
    chunk = torch.arange(chunks, device=device)[:, None]
    is_key = (chunk + offset) % chunks * window + torch.arange(window, device=device) < length
    if mask == "cyclic":  # wrapping from the first chunk to the last shows the padding of the last
        return is_key | ((chunk == 0) & (offset == -1))
    return is_key & (chunk + offset >= 0) & (chunk + offset < chunks)


def _sliding_chunk(shape: AttentionShape, inputs: Inputs) -> PreparedMethod:
    if isinstance(shape.neighbors, int):  # drawn on the host, as in the paper's code: no synchronization
        inputs = inputs._replace(neighbor=None)
    return prepare_local(sliding_chunk_attention, shape, inputs)


def _flex(shape: AttentionShape, inputs: Inputs) -> PreparedMethod:
    """Compute local attention by compiled FlexAttention, for all neighbors of the masks chunk and exact.

    Tokens are sorted by chunk beforehand (not timed), after the global keys, so that whole blocks of keys are
    skipped. On a CPU there is no backward pass.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if shape.mask == "cyclic" or shape.neighbors != "all":
        raise UnavailableError(
            "only all neighbors, without cyclic chunks, are implemented with FlexAttention"
        )
    (_, width), side, num_global = shape.size, shape.window, shape.global_tokens
    index = torch.arange(shape.tokens)
    row, column = index // width, index % width
    order = torch.argsort(row // side * -(-width // side) + column // side, stable=True)
    row, column = (
        torch.cat([x.new_zeros(num_global), x[order]]).to(shape.device, torch.int32) for x in (row, column)
    )

    def is_visible(_b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        rows, columns = [x[kv] // side - x[q + num_global] // side for x in (row, column)]
        near = (rows.abs() <= 1) & (columns.abs() <= 1)
        if shape.mask == "exact":
            rows, columns = [x[kv] - x[q + num_global] for x in (row, column)]
            near = near & (rows.abs() <= side) & (columns.abs() <= side)
        return (kv < num_global) | near

    def add_bias(score: Tensor, _b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        last = 4 * side - 2  # index of the table's last row; hidden keys are clamped
        i, j = [(x[q + num_global] - x[kv] + 2 * side - 1).clamp(0, last) for x in (row, column)]
        bias = table[h, i, j]
        if num_global:
            bias = torch.where(kv < num_global, global_bias[h, kv.clamp(max=num_global - 1)], bias)
        return score + bias

    has_backward = shape.device != "cpu"
    with torch.no_grad():
        query = inputs.query[:, :, order]
        key = torch.cat([inputs.global_key, inputs.key[:, :, order]], dim=2)
        value = torch.cat([inputs.global_value, inputs.value[:, :, order]], dim=2)
    leaves, options = [query, key, value], dict[str, Any]()
    if inputs.bias_table is not None and inputs.global_bias is not None:
        table, global_bias = inputs.bias_table.detach().clone(), inputs.global_bias.detach().clone()
        leaves += [table, global_bias] if num_global else [table]
        options["score_mod"] = add_bias
    for leaf in leaves:
        leaf.requires_grad_(has_backward)
    lengths = shape.tokens, num_global + shape.tokens  # of queries and keys
    block_mask = create_block_mask(is_visible, None, None, *lengths, device=shape.device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    inverse = torch.argsort(order).to(shape.device)

    def forward() -> Tensor:
        if torch.is_grad_enabled() and not has_backward:
            raise UnavailableError("FlexAttention has no backward pass on a CPU")
        output: Tensor = compiled(query, key, value, block_mask=block_mask, **options)
        return output

    return PreparedMethod(forward, leaves, shape.costs(), lambda output: output[:, :, inverse])


# --- Other attention ----------------------------------------------------------------------------------------


def _full(shape: AttentionShape, inputs: Inputs) -> PreparedMethod:
    """Prepare full attention over all tokens, global ones included, without bias."""
    global_tokens = (inputs.global_key, inputs.global_key, inputs.global_value)
    with torch.no_grad():
        tokens = (torch.cat(pair, dim=2) for pair in zip(global_tokens, inputs[:3]))
        leaves = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tokens]
    query, key, value = leaves
    count = shape.tokens + shape.global_tokens
    forward = partial(F.scaled_dot_product_attention, query, key, value)
    return PreparedMethod(forward, leaves, shape.costs(count, count**2))


def _natten(shape: AttentionShape, inputs: Inputs) -> PreparedMethod:
    """Prepare NATTEN's neighborhood of 2w+1 rows and columns, shifted inwards at edges; without bias."""
    try:
        import natten
    except ImportError:
        raise UnavailableError("natten is not installed") from None
    kernel_size = tuple(min(2 * shape.window + 1, length) for length in shape.size)
    with torch.no_grad():
        leaves = [x.transpose(1, 2).unflatten(1, shape.size).clone() for x in inputs[:3]]  # (B, H, W, h, D)
        if shape.global_tokens:
            leaves += [x.transpose(1, 2).clone() for x in (inputs.global_key, inputs.global_value)]
    leaves = [x.requires_grad_() for x in leaves]
    additional = dict(zip(("additional_keys", "additional_values"), leaves[3:]))

    def forward() -> Tensor:
        output = natten.na2d(*leaves[:3], kernel_size=kernel_size, **additional)
        return output.flatten(1, 2).transpose(1, 2)

    keys = kernel_size[0] * kernel_size[1] + shape.global_tokens
    return PreparedMethod(forward, leaves, shape.costs(pairs=shape.tokens * keys))


METHODS: dict[str, Method] = {
    **{name: partial(prepare_local, partial(local_attention, backend=name)) for name in (*BACKENDS, "auto")},
    BASELINE: _sliding_chunk,
    "full": _full,
    "flex": _flex,
    "natten": _natten,
}
"""Methods by name, the project's own backends first."""


def estimate_memory(name: str, shape: AttentionShape) -> int:
    """Return the approximate bytes of a training step, for the methods that need much; 0 for the others."""
    heads, element = shape.batch * shape.heads, shape.dtype.itemsize
    rows, columns = (-(-length // shape.window) * shape.window for length in shape.size)
    if name == "dense":  # scores, weights and their gradients; and the bias by visible chunk, twice
        keys = shape.global_tokens + rows * columns
        by_chunk = 2 * len(shape.chunk_offsets) * (shape.heads if shape.is_relative else 1)
        return shape.tokens * (4 * heads * keys * element + by_chunk * rows * columns * element)
    if name == BASELINE:
        keys = shape.global_tokens + len(shape.chunk_offsets) * shape.window**2
        return 4 * heads * rows * columns * keys * element
    return 0
