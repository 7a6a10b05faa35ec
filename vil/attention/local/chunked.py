"""2-D local attention in PyTorch operators, in time and memory linear in the number of tokens.

The keys of one or several adjacent columns of chunks are copied to a *strip* (`strips.py`), in which those of
every chunk are contiguous. The scores of a chunk are computed one chunk at a time, so they stay in cache. The
backward pass saves only the inputs and computes the weights of each chunk again.

Legend: B images, h heads, c columns of chunks in a strip, L keys per column, t queries of a chunk, G global
keys, k keys of a query, D head width. Matrix products have one batch dimension n = B·c·h. A grid is
(B, h, H, W, D).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import KeyRange, LocalAttentionSpec, OperatorInputs
from vil.attention.local.operator import empty_gradients, like_tokens, register
from vil.attention.local.strips import Chunk, Strip, strips

MAX_SCORES = 2**20
"""Scores computed at a time, at least those of one chunk of one image. Smaller values were slower."""
MAX_STRIP_ELEMENTS = 2**22
"""Elements of the keys of a strip, at least those of one column of chunks."""


def forward(inputs: OperatorInputs, spec: LocalAttentionSpec, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output (B, h, N, D) and an empty tensor; see `operator.register`."""
    work = _ChunkedAttention(inputs, spec, seed)
    output = like_tokens(inputs.query)
    with torch.autocast("cpu", enabled=False):  # autocast would round the biases
        for images in work.slices():
            query, key, value, global_key, global_value = work.image_inputs(images)
            (grid,) = work.grids(output[images])
            for strip in work.strips:
                queries = work.load_queries("query", query, strip, work.scale)
                keys = work.load_keys("key", key, global_key, strip)
                values = work.load_keys("value", value, global_value, strip)
                for chunk in strip.chunks:
                    work.store(grid, strip, chunk, work.attend(strip, chunk, queries, keys, values))
    return output, inputs.query.new_empty(0, dtype=torch.float32)


def backward(
    inputs: OperatorInputs,
    spec: LocalAttentionSpec,
    seed: Tensor | None,
    _: Tensor,
    __: Tensor,
    gradient: Tensor,
    needs_bias_grads: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of the first seven inputs; output and sums are unused; see `operator.register`."""
    work = _ChunkedAttention(inputs, spec, seed)
    gradients = empty_gradients(inputs, needs_bias_grads)
    # Summed over strips, in float32 for half precision.
    sums = [x.to(inputs.score_dtype).zero_() for x in gradients[1:5]]
    for images in work.slices():
        query, key, value, global_key, global_value = work.image_inputs(images)
        tokens = (gradients[0], sums[0], sums[1], gradient)
        grad_query, grad_key, grad_value, upstream_grid = work.grids(*[x[images] for x in tokens])
        grad_global_key, grad_global_value = sums[2][images], sums[3][images]
        for strip in work.strips:
            queries = work.load_queries("query", query, strip, work.scale)
            upstream = work.load_queries("upstream", upstream_grid, strip)
            keys = work.load_keys("key", key, global_key, strip)
            values = work.load_keys("value", value, global_value, strip)
            grad_keys, grad_values = work.zeros("grad_keys", keys), work.zeros("grad_values", values)
            for chunk in strip.chunks:
                index = strip.queries(chunk)
                weights = work.weights(strip, chunk, queries, keys)  # (n, t, k)
                dropped, keep_mask = work.drop(weights)
                value_t = values[:, chunk.keys].transpose(1, 2)
                grad_weights = work.product("grad_weights", upstream[:, index], value_t).to(weights.dtype)
                if keep_mask is not None:
                    grad_weights *= keep_mask
                grad_scores = torch.ops.aten._softmax_backward_data.out(
                    grad_weights, weights, -1, weights.dtype, grad_input=grad_weights
                )
                if any(needs_bias_grads):
                    work.add_biases(strip, chunk, grad_scores)
                grad_scores, dropped = grad_scores.to(queries.dtype), dropped.to(queries.dtype)
                grad_queries = work.product("output", grad_scores, keys[:, chunk.keys])
                work.store(grad_query, strip, chunk, grad_queries, work.scale)
                # Not `baddbmm_`, which rounds otherwise: runs would not continue bit-identically.
                part = work.product("part", grad_scores.transpose(1, 2), queries[:, index])
                grad_keys[:, chunk.keys].add_(part)
                part = work.product("part", dropped.transpose(1, 2), upstream[:, index])
                grad_values[:, chunk.keys].add_(part)
            work.add_keys(grad_key, grad_global_key, strip, grad_keys)
            work.add_keys(grad_value, grad_global_value, strip, grad_values)
    for gradient_out, total in zip(gradients[1:5], sums):
        if gradient_out is not total:
            gradient_out.copy_(total)
    if any(needs_bias_grads):
        work.store_biases(*gradients[5:])
    return gradients


class _ChunkedAttention:
    """State of one call: its strips, biases, buffers and dropout generator."""

    def __init__(self, inputs: OperatorInputs, spec: LocalAttentionSpec, seed: Tensor | None) -> None:
        self.inputs, self.spec = inputs, spec
        self.batch, self.heads, _, self.width = inputs.query.shape
        self.num_globals = inputs.global_key.shape[2]
        self.scale = self.width**-0.5
        has_fast_matmul = _has_fast_matmul(inputs.query.device, inputs.query.dtype)
        self.dtype = inputs.query.dtype if has_fast_matmul else inputs.score_dtype
        """Type of the strips, and of products."""
        self.biases: dict[Hashable, Tensor] = {}
        self.bias_gradients: dict[Hashable, tuple[Strip, Chunk, Tensor]] = {}
        self.buffers: dict[str, Tensor] = {}
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(inputs.query.device).manual_seed(int(seed))
        seen = spec.chunk_offsets(None if inputs.neighbor is None else int(inputs.neighbor))
        scores_per_chunk = self.heads * spec.window**2 * (self.num_globals + len(seen) * spec.window**2)
        self.images = max(1, min(self.batch, MAX_SCORES // scores_per_chunk))
        columns = max(1, MAX_SCORES // (self.images * scores_per_chunk))
        keys = MAX_STRIP_ELEMENTS // (self.images * self.heads * self.width)
        self.strips = strips(spec, seen, self.num_globals, columns, keys)

    def slices(self) -> Iterator[slice]:
        """Yield slices of images that are few enough for the scores of their chunks to stay in cache."""
        for first in range(0, self.batch, self.images):
            yield slice(first, first + self.images)

    def image_inputs(self, images: slice) -> tuple[Tensor, ...]:
        """Return the grids of queries, keys and values, and global keys and values, of some images."""
        tokens = [tensor[images] for tensor in self.inputs[:5]]
        return (*self.grids(*tokens[:3]), *tokens[3:])

    def grids(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Reshape each tensor (B, h, H·W, D) → (B, h, H, W, D)."""
        return tuple(tensor.unflatten(2, self.spec.size) for tensor in tokens)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return reused memory by name; allocating it anew was slower than the computation.

        The type of a name is that of the strips, or `dtype`, and must not change.
        """
        count = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = self.inputs.query.new_empty(count, dtype=dtype or self.dtype)
        return self.buffers[name][:count].view(shape)

    def zeros(self, name: str, like: Tensor) -> Tensor:
        """Return zeros for a sum, in the buffer `name`."""
        return self.buffer(name, *like.shape, dtype=self.inputs.score_dtype).zero_()

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Multiply matrices into the buffer `name`: (n, a, b) and (n, b, c) → (n, a, c)."""
        return torch.bmm(left, right, out=self.buffer(name, *left.shape[:2], right.shape[2]))

    def load_queries(self, name: str, grid: Tensor, strip: Strip, factor: float = 1.0) -> Tensor:
        """Copy a strip's queries from a grid, times a factor: (B, h, H, W, D) → (n, H·columns, D)."""
        source = self._columns(grid, slice(None), strip.columns, strip.count)
        copy = self.buffer(name, *source.shape)
        if source.dtype == copy.dtype:
            torch.mul(source, factor, out=copy)
        else:
            copy.copy_(source).mul_(factor)  # not rounded to the precision of the source
        return copy.view(-1, source.shape[3] * source.shape[4], self.width)

    def store(self, grid: Tensor, strip: Strip, chunk: Chunk, values: Tensor, factor: float = 1.0) -> None:
        """Write (n, t, D) or (B·c, h, t, D), times a factor, to the positions of a chunk's queries."""
        target = self._columns(grid, chunk.rows, strip.columns, strip.count)
        torch.mul(values.view(target.shape), factor, out=target)

    def load_keys(self, name: str, grid: Tensor, global_key: Tensor, strip: Strip) -> Tensor:
        """Copy the keys of a strip: (B, h, H, W, D) and (B, h, G, D) → (n, L, D)."""
        keys = self.buffer(name, len(grid), strip.count, self.heads, strip.length, self.width)
        for index in strip.global_keys:
            keys[:, :, :, index : index + self.num_globals] = global_key[:, None]
        for block in strip.blocks:
            target = keys[:, :, :, block.keys].unflatten(3, block.shape)
            for run, part in block.parts():
                if block.rows.start < 0 or run.start < 0:
                    target[..., part, :] = 0
                else:
                    source = self._columns(grid, _as_slice(block.rows), _as_slice(run), strip.count)
                    target[..., part, :].copy_(source)
        return keys.view(-1, strip.length, self.width)

    def add_keys(self, grid: Tensor, global_key: Tensor, strip: Strip, values: Tensor) -> None:
        """Add (n, L, D) to the positions from which `load_keys` copies; the transpose of `load_keys`."""
        values = values.view(len(grid), strip.count, self.heads, strip.length, self.width)
        for index in strip.global_keys:
            global_key += values[:, :, :, index : index + self.num_globals].sum(dim=1)
        for block in strip.blocks:
            source = values[:, :, :, block.keys].unflatten(3, block.shape)
            for run, part in block.parts():
                if block.rows.start < 0 or run.start < 0:
                    continue
                for number, addend in enumerate(source[..., part, :].unbind(1)):
                    columns = _as_slice(run, number * self.spec.window)
                    grid[:, :, _as_slice(block.rows), columns].add_(addend)

    def attend(self, strip: Strip, chunk: Chunk, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the output of a chunk (B·c, h, t, D)."""
        if self.generator is not None or queries.device.type != "cpu":  # GPU kernels need other masks
            weights, _ = self.drop(self.weights(strip, chunk, queries, keys))
            output = self.product("output", weights.to(values.dtype), values[:, chunk.keys])
            return output.unflatten(0, (-1, self.heads))
        query, key, value = (
            tensor[:, part].unflatten(0, (-1, self.heads))
            for tensor, part in zip((queries, keys, values), (strip.queries(chunk), chunk.keys, chunk.keys))
        )
        bias = self._bias(strip, chunk)
        bias = None if bias is None else bias[None]  # the kernel for CPUs needs four dimensions
        return F.scaled_dot_product_attention(query, key, value, bias, scale=1.0)

    def weights(self, strip: Strip, chunk: Chunk, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the attention weights of a chunk (n, t, k), from the queries and keys of its strip."""
        query, key = queries[:, strip.queries(chunk)], keys[:, chunk.keys]
        scores = self.product("scores", query, key.transpose(1, 2)).to(self.inputs.score_dtype)
        bias = self._bias(strip, chunk)
        if bias is not None:
            scores.view(-1, *bias.shape).add_(bias)
        return torch.softmax(scores, -1, out=scores)

    def drop(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights after dropout, and their factors. Call it once per chunk, in order."""
        if self.generator is None:
            return weights, None
        keep = 1 - self.spec.dropout
        keep_mask = torch.empty_like(weights).bernoulli_(keep, generator=self.generator).div_(keep or 1)
        return weights * keep_mask, keep_mask

    def _bias(self, strip: Strip, chunk: Chunk) -> Tensor | None:
        """Return the biases (h, t, k) of a chunk's scores, cached by signature."""
        if self.inputs.window_bias is None and self.inputs.global_bias is None:
            return None
        signature = strip.signature(chunk)
        if signature not in self.biases:
            shape = [self.heads, *(part.stop - part.start for part in (strip.queries(chunk), chunk.keys))]
            bias = self.inputs.query.new_zeros(shape, dtype=self.inputs.score_dtype)
            if self.inputs.global_bias is not None:
                bias[..., self._global(chunk)] = self.inputs.global_bias[:, None]
            if self.inputs.window_bias is not None:
                for at_positions, grad_keys in self._bias_entries(
                    self.inputs.window_bias, bias, strip, chunk
                ):
                    grad_keys.copy_(at_positions)
            self.biases[signature] = bias
        return self.biases[signature]

    def add_biases(self, strip: Strip, chunk: Chunk, grad_scores: Tensor) -> None:
        """Add the gradients of a chunk's scores (n, t, k) to those of its signature."""
        total = grad_scores.unflatten(0, (-1, self.heads)).sum(dim=0)  # (h, t, k)
        signature = strip.signature(chunk)
        if signature in self.bias_gradients:
            self.bias_gradients[signature][2].add_(total)
        else:
            self.bias_gradients[signature] = strip, chunk, total

    def store_biases(self, grad_window_bias: Tensor, grad_global_bias: Tensor) -> None:
        """Write the sums of `add_biases` to the gradients of the biases, unless these are empty."""
        grad_window_bias.zero_()
        grad_global_bias.zero_()
        for strip, chunk, total in self.bias_gradients.values():
            if grad_global_bias.numel():
                grad_global_bias += total[..., self._global(chunk)].sum(dim=1)
            if grad_window_bias.numel():
                for at_positions, grad_keys in self._bias_entries(grad_window_bias, total, strip, chunk):
                    at_positions += grad_keys

    def _global(self, chunk: Chunk) -> slice:
        """Return the slice of global keys among the keys of a chunk."""
        return slice(chunk.global_key, chunk.global_key + self.num_globals)

    @staticmethod
    def _bias_entries(
        by_position: Tensor, by_key: Tensor, strip: Strip, chunk: Chunk
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of views of (h, w, w, 3w, 3w) and (h, t, k) with the biases of the same local keys."""
        rows = chunk.rows.stop - chunk.rows.start
        grad_queries = by_position[:, :rows, : strip.width]
        grad_keys = by_key.unflatten(1, (rows, strip.width))
        for block in chunk.blocks:
            in_block = grad_keys[..., block.keys].unflatten(3, block.shape)
            in_rows = grad_queries[..., block.rows.offset : block.rows.offset + block.rows.length, :]
            for run, part in block.parts():
                yield in_rows[..., run.offset : run.offset + run.length], in_block[..., part]

    def _columns(self, grid: Tensor, rows: slice, columns: slice, count: int) -> Tensor:
        """View `count` rectangles, one window apart from left to right: (B, c, h, rows, columns, D)."""
        side = self.spec.window
        across = grid[:, :, rows, columns.start : columns.stop + (count - 1) * side]
        return across.unfold(3, columns.stop - columns.start, side).permute(0, 3, 1, 2, 5, 4)


def _has_fast_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Return False for a half precision that this CPU does not multiply; PyTorch's fallback is slow."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    is_supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return is_supported is not None and is_supported()


def _as_slice(run: KeyRange, offset: int = 0) -> slice:
    return slice(run.start + offset, run.start + run.length + offset)


chunked_attention = register("chunked", forward, backward, keeps_sums=False)
