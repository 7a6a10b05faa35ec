"""2-D local attention in PyTorch's own operators, linear in tokens, strip by strip and chunk by chunk.

The keys of one column of chunks, or of several side by side, are laid out as a *strip* (`strips.py`), in
which those of every chunk are one stretch. The scores of a chunk exist only while it is worked on, in the
cache. For the backward pass nothing is kept but the inputs: the weights of each chunk are computed again.

Legend: B images, h heads, c columns of chunks in a strip, L its keys for each of them, t queries of a chunk,
G global keys, k keys of a query, D head width. Products of matrices have one dimension n = B·c·h. A grid is
(B, h, H, W, D).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vil.attention.local.geometry import Inputs, Run, Window, fold_window_bias, window_bias
from vil.attention.local.operator import empty_gradients, like_tokens, register
from vil.attention.local.strips import Chunk, Strip, strips

SCORES_AT_ONCE = 2**20
"""So many scores at a time, or those of one chunk of one image if these are more; fewer were slower."""
ELEMENTS_OF_STRIP = 2**22
"""So many numbers in the keys of a strip, or those of one column of chunks if these are more."""


def forward(inputs: Inputs, window: Window, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output (B, h, N, D) and an empty tensor; see `operator.register`."""
    work = _Work(inputs, window, seed)
    output = like_tokens(inputs.query)
    with torch.autocast("cpu", enabled=False):  # it would round the biases
        _attend_all(work, output)
    return output, inputs.query.new_empty(0, dtype=torch.float32)


def _attend_all(work: _Work, output: Tensor) -> None:
    for images in work.slices():
        query, key, value, memory, memory_value = work.of_images(images)
        (grid,) = work.grids(output[images])
        for strip in work.strips:
            queries = work.load_queries("query", query, strip, work.scale)
            keys = work.load_keys("key", key, memory, strip)
            values = work.load_keys("value", value, memory_value, strip)
            for chunk in strip.chunks:
                work.store(grid, strip, chunk, work.attend(strip, chunk, queries, keys, values))


def backward(
    inputs: Inputs,
    window: Window,
    seed: Tensor | None,
    _: Tensor,
    __: Tensor,
    gradient: Tensor,
    of_biases: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of the first seven inputs; output and sums are not read (`operator.register`)."""
    work = _Work(inputs, window, seed)
    gradients = empty_gradients(inputs, of_biases)
    # Sums over strips, in float32 for the half precisions.
    sums = [x.to(inputs.score_dtype).zero_() for x in gradients[1:5]]
    for images in work.slices():
        query, key, value, memory, memory_value = work.of_images(images)
        of_query, of_key, of_value, upstream_grid = work.grids(
            *[x[images] for x in (gradients[0], *sums[:2], gradient)]
        )
        of_memory, of_memory_value = sums[2][images], sums[3][images]
        for strip in work.strips:
            queries = work.load_queries("query", query, strip, work.scale)
            upstream = work.load_queries("upstream", upstream_grid, strip)
            keys = work.load_keys("key", key, memory, strip)
            values = work.load_keys("value", value, memory_value, strip)
            of_keys, of_values = work.zeros("of_keys", keys), work.zeros("of_values", values)
            for chunk in strip.chunks:
                at = strip.queries(chunk)
                weights = work.weights(strip, chunk, queries, keys)  # (n, t, k)
                dropped, kept = work.drop(weights)
                of_weights = work.product(
                    "of_weights", upstream[:, at], values[:, chunk.keys].transpose(1, 2)
                ).to(weights.dtype)
                if kept is not None:
                    of_weights *= kept
                of_scores = torch.ops.aten._softmax_backward_data.out(
                    of_weights, weights, -1, weights.dtype, grad_input=of_weights
                )
                if of_biases:
                    work.add_biases(strip, chunk, of_scores)
                of_scores, dropped = of_scores.to(queries.dtype), dropped.to(queries.dtype)
                of_queries = work.product("output", of_scores, keys[:, chunk.keys])
                work.store(of_query, strip, chunk, of_queries, work.scale)
                part = work.product("part", of_scores.transpose(1, 2), queries[:, at])
                of_keys[:, chunk.keys].add_(part)
                part = work.product("part", dropped.transpose(1, 2), upstream[:, at])
                of_values[:, chunk.keys].add_(part)
            work.add_keys(of_key, of_memory, strip, of_keys)
            work.add_keys(of_value, of_memory_value, strip, of_values)
    for place, total in zip(gradients[1:5], sums):
        if place is not total:
            place.copy_(total)
    if of_biases:
        work.store_biases(*gradients[5:])
    return gradients


class _Work:
    """What the strips of one call have in common."""

    def __init__(self, inputs: Inputs, window: Window, seed: Tensor | None) -> None:
        self.inputs, self.window = inputs, window
        self.batch, self.heads, _, self.width = inputs.query.shape
        self.globals_ = inputs.global_key.shape[2]
        self.scale = self.width**-0.5
        self.window_bias = window_bias(inputs, window)  # (h or 1, w, w, 3w, 3w)
        self.biases: dict[Hashable, Tensor] = {}
        self.bias_gradients: dict[Hashable, tuple[Strip, Chunk, Tensor]] = {}
        self.buffers: dict[str, Tensor] = {}
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(inputs.query.device).manual_seed(int(seed))
        seen = window.seen(None if inputs.neighbor is None else int(inputs.neighbor))
        self.per_chunk = self.heads * window.side**2 * (self.globals_ + len(seen) * window.side**2)
        images = max(1, min(self.batch, SCORES_AT_ONCE // self.per_chunk))
        columns = max(1, SCORES_AT_ONCE // (images * self.per_chunk))
        keys = ELEMENTS_OF_STRIP // (images * self.heads * self.width)
        self.strips = strips(window, seen, self.globals_, columns, keys)

    def slices(self) -> Iterator[slice]:
        """All images, so many at a time that the scores of their chunks stay in cache."""
        images = max(1, SCORES_AT_ONCE // self.per_chunk)
        for first in range(0, self.batch, images):
            yield slice(first, first + images)

    def of_images(self, images: slice) -> tuple[Tensor, ...]:
        """Grids of queries, keys and values, and global keys and values."""
        tokens = [tensor[images] for tensor in self.inputs[:5]]
        return (*self.grids(*tokens[:3]), *tokens[3:])

    def grids(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """(B, h, H·W, D) → (B, h, H, W, D)."""
        return tuple(tensor.unflatten(2, self.window.size) for tensor in tokens)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of that name, used again and again: fresh memory costs more than the work on it.

        A name has one type: that of the queries, or `dtype`.
        """
        count = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < count:
            self.buffers[name] = self.inputs.query.new_empty(count, dtype=dtype)
        return self.buffers[name][:count].view(shape)

    def zeros(self, name: str, like: Tensor) -> Tensor:
        """Zeros for a sum, in the buffer of that name."""
        return self.buffer(name, *like.shape, dtype=self.inputs.score_dtype).zero_()

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """(n, a, b) and (n, b, c) → (n, a, c), in the buffer of that name."""
        return torch.bmm(left, right, out=self.buffer(name, *left.shape[:2], right.shape[2]))

    def load_queries(self, name: str, grid: Tensor, strip: Strip, factor: float = 1.0) -> Tensor:
        """What stands at a strip's queries, times a factor: (B, h, H, W, D) → (n, H·columns, D)."""
        source = self._columns(grid, slice(None), strip.columns, strip.count)
        copy = torch.mul(source, factor, out=self.buffer(name, *source.shape))
        return copy.view(-1, source.shape[3] * source.shape[4], self.width)

    def store(self, grid: Tensor, strip: Strip, chunk: Chunk, values: Tensor, factor: float = 1.0) -> None:
        """Puts (n, t, D) or (B·c, h, t, D), times a factor, to where the queries of a chunk come from."""
        place = self._columns(grid, chunk.rows, strip.columns, strip.count)
        torch.mul(values.view(place.shape), factor, out=place)

    def load_keys(self, name: str, grid: Tensor, memory: Tensor, strip: Strip) -> Tensor:
        """The keys of a strip: (B, h, H, W, D) and (B, h, G, D) → (n, L, D)."""
        keys = self.buffer(name, len(grid), strip.count, self.heads, strip.length, self.width)
        for at in strip.global_keys:
            keys[:, :, :, at : at + self.globals_] = memory[:, None]
        for block in strip.blocks:
            target = keys[:, :, :, block.keys].unflatten(3, block.shape)
            for run, part in block.parts():
                if block.rows.start < 0 or run.start < 0:
                    target[..., part, :] = 0
                else:
                    source = self._columns(grid, _slice(block.rows), _slice(run), strip.count)
                    target[..., part, :].copy_(source)
        return keys.view(-1, strip.length, self.width)

    def add_keys(self, grid: Tensor, memory: Tensor, strip: Strip, values: Tensor) -> None:
        """Adds (n, L, D) to where `load_keys` took keys from."""
        values = values.view(len(grid), strip.count, self.heads, strip.length, self.width)
        for at in strip.global_keys:
            memory += values[:, :, :, at : at + self.globals_].sum(dim=1)
        for block in strip.blocks:
            source = values[:, :, :, block.keys].unflatten(3, block.shape)
            for run, part in block.parts():
                if block.rows.start < 0 or run.start < 0:
                    continue
                for number, addend in enumerate(source[..., part, :].unbind(1)):
                    columns = _slice(run, number * self.window.side)
                    grid[:, :, _slice(block.rows), columns].add_(addend)

    def attend(self, strip: Strip, chunk: Chunk, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The output of a chunk (B·c, h, t, D)."""
        if self.generator is not None or queries.device.type != "cpu":  # kernels of GPUs want other masks
            weights, _ = self.drop(self.weights(strip, chunk, queries, keys))
            output = self.product("output", weights.to(values.dtype), values[:, chunk.keys])
            return output.unflatten(0, (-1, self.heads))
        query, key, value = (
            tensor[:, part].unflatten(0, (-1, self.heads))
            for tensor, part in zip((queries, keys, values), (strip.queries(chunk), chunk.keys, chunk.keys))
        )
        bias = self._bias(strip, chunk)
        bias = None if bias is None else bias[None]  # four dimensions, which the kernel for CPUs wants
        return F.scaled_dot_product_attention(query, key, value, bias, scale=1.0)

    def weights(self, strip: Strip, chunk: Chunk, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention weights of a chunk (n, t, k) from the queries and keys of its strip."""
        query, key = queries[:, strip.queries(chunk)], keys[:, chunk.keys]
        scores = self.product("scores", query, key.transpose(1, 2)).to(self.inputs.score_dtype)
        bias = self._bias(strip, chunk)
        if bias is not None:
            scores.view(-1, *bias.shape).add_(bias)
        return torch.softmax(scores, -1, out=scores)

    def drop(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights after dropout, and what each was multiplied by. Call it once per chunk, in order."""
        if self.generator is None:
            return weights, None
        keep = 1 - self.window.dropout
        kept = torch.empty_like(weights).bernoulli_(keep, generator=self.generator).div_(keep or 1)
        return weights * kept, kept

    def _bias(self, strip: Strip, chunk: Chunk) -> Tensor | None:
        """(h, t, k): what is added to scores; the same for all chunks of one signature."""
        if self.window_bias is None and self.inputs.global_bias is None:
            return None
        signature = strip.signature(chunk)
        if signature not in self.biases:
            queries, keys = strip.queries(chunk), chunk.keys
            bias = self.inputs.query.new_zeros(
                self.heads,
                queries.stop - queries.start,
                keys.stop - keys.start,
                dtype=self.inputs.score_dtype,
            )
            if self.inputs.global_bias is not None:
                bias[..., self._global(chunk)] = self.inputs.global_bias[:, None]
            if self.window_bias is not None:
                for of_place, of_keys in self._places(self.window_bias, bias, strip, chunk):
                    of_keys.copy_(of_place)
            self.biases[signature] = bias
        return self.biases[signature]

    def add_biases(self, strip: Strip, chunk: Chunk, of_scores: Tensor) -> None:
        """Takes note of the gradients of a chunk's scores (n, t, k)."""
        total = of_scores.unflatten(0, (-1, self.heads)).sum(dim=0)  # (h, t, k)
        signature = strip.signature(chunk)
        if signature in self.bias_gradients:
            self.bias_gradients[signature][2].add_(total)
        else:
            self.bias_gradients[signature] = strip, chunk, total

    def store_biases(self, of_table: Tensor, of_global: Tensor) -> None:
        """Puts the sums of what `add_biases` noted into the gradients of the biases that are not empty."""
        heads, side = self.heads, self.window.side
        by_place = self.inputs.query.new_zeros(
            heads, side, side, 3 * side, 3 * side, dtype=self.inputs.score_dtype
        )
        by_key = by_place.new_zeros(heads, self.globals_)
        for strip, chunk, total in self.bias_gradients.values():
            by_key += total[..., self._global(chunk)].sum(dim=1)
            for of_place, of_keys in self._places(by_place, total, strip, chunk):
                of_place += of_keys
        if of_table.numel():
            of_table.copy_(fold_window_bias(by_place, side))
        if of_global.numel():
            of_global.copy_(by_key)

    def _global(self, chunk: Chunk) -> slice:
        """The global keys in a chunk's stretch."""
        return slice(chunk.global_key, chunk.global_key + self.globals_)

    @staticmethod
    def _places(
        by_place: Tensor, by_key: Tensor, strip: Strip, chunk: Chunk
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same entries of (h, w, w, 3w, 3w) and (h, t, k), for the local keys of a chunk."""
        rows = chunk.rows.stop - chunk.rows.start
        of_queries = by_place[:, :rows, : strip.width]
        of_keys = by_key.unflatten(1, (rows, strip.width))
        for block in chunk.blocks:
            in_block = of_keys[..., block.keys].unflatten(3, block.shape)
            rows_of_keys = slice(block.rows.place, block.rows.place + block.rows.length)
            for run, part in block.parts():
                yield of_queries[..., rows_of_keys, run.place : run.place + run.length], in_block[..., part]

    def _columns(self, grid: Tensor, rows: slice, columns: slice, count: int) -> Tensor:
        """A view of `count` rectangles, each a window right of the last: (B, c, h, rows, columns, D)."""
        side = self.window.side
        across = grid[:, :, rows, columns.start : columns.stop + (count - 1) * side]
        return across.unfold(3, columns.stop - columns.start, side).permute(0, 3, 1, 2, 5, 4)


def _slice(run: Run, further: int = 0) -> slice:
    return slice(run.start + further, run.start + run.length + further)


chunked_attention = register("chunked", forward, backward, keeps_sums=False)
