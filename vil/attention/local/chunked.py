"""2-D local attention in PyTorch's own operators, linear in tokens, tile by tile within the cache.

A tile is one chunk, or several in a row, of some or all images. Its queries and the keys that they see are
copied to one place, and their scores exist only while the tile is worked on. For the backward pass nothing is
kept but the inputs: the weights of each tile are computed again.

Legend: B images, h heads, c chunks of a tile, t queries of a chunk, G global keys, k keys of a query with the
global ones in front, D head width. Products of matrices have one dimension B·h·c. A grid is (B, h, H, W, D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from vil.attention.local.geometry import Inputs, Run, Window, fold_window_bias, runs, window_bias
from vil.attention.local.operator import empty_gradients, like_tokens, register

SCORES_PER_TILE = 2**20
"""Scores of a tile at most, where one chunk of one image has not more: 4 MiB in float32 (measured)."""

Rectangle = tuple[Run, Run]
"""Rows and columns of keys."""


@dataclass(frozen=True)
class _Tile:
    """Chunks that follow each other in a row and see keys at the same places."""

    rows: slice
    columns: slice
    """Queries of the first chunk; each further chunk lies one window to the right."""
    chunks: int
    keys: tuple[Rectangle, ...]
    """Local keys of the first chunk."""

    def moved(self, by: int) -> _Tile:
        """The tile so many columns to the right."""
        keys = tuple((rows, run._replace(start=run.start + by)) for rows, run in self.keys)
        return replace(self, columns=slice(self.columns.start + by, self.columns.stop + by), keys=keys)

    @cached_property
    def places(self) -> tuple[tuple[Rectangle, slice], ...]:
        """Where each rectangle of keys stands among the local keys of a chunk."""
        ends = list(itertools.accumulate((r.length * c.length for r, c in self.keys), initial=0))
        return tuple((rectangle, slice(*ends[i : i + 2])) for i, rectangle in enumerate(self.keys))

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Rows and columns of queries of a chunk, and its local keys."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return rows, columns, self.places[-1][1].stop

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """The same for tiles whose scores have the same biases."""
        return (*self.shape, *[(r.length, r.place, c.length, c.place) for r, c in self.keys])


def _forward(inputs: Inputs, window: Window, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    work = _Work(inputs, window, seed)
    output = like_tokens(inputs.query)
    for images in work.slices():
        query, key, value, memory, memory_value = work.of_images(images)
        (grid,) = work.grids(output[images])
        for tile in work.tiles:
            queries = work.load_queries("query", query, tile, work.scale)
            keys, values = (
                work.load_keys("key", key, memory, tile),
                work.load_keys("value", value, memory_value, tile),
            )
            weights, _ = work.drop(work.weights(tile, queries, keys))
            work.store(grid, tile, work.product("output", weights.to(values.dtype), values))
    return output, inputs.query.new_empty(0, dtype=torch.float32)


def _backward(
    inputs: Inputs,
    window: Window,
    seed: Tensor | None,
    _: Tensor,
    __: Tensor,
    gradient: Tensor,
    of_biases: bool,
) -> tuple[Tensor, ...]:
    work = _Work(inputs, window, seed)
    gradients = empty_gradients(inputs, of_biases)
    # Sums over tiles, in float32 for the half precisions.
    sums = [x.new_zeros(x.shape, dtype=inputs.score_dtype) for x in gradients[1:5]]
    window_sum, global_sum = work.bias_sums()
    for images in work.slices():
        query, key, value, memory, memory_value = work.of_images(images)
        of_query, of_key, of_value, upstream_grid = work.grids(
            *[x[images] for x in (gradients[0], *sums[:2], gradient)]
        )
        of_memory, of_memory_value = sums[2][images], sums[3][images]
        for tile in work.tiles:
            queries = work.load_queries("query", query, tile, work.scale)  # (B·h·c, t, D)
            keys, values = (
                work.load_keys("key", key, memory, tile),
                work.load_keys("value", value, memory_value, tile),
            )
            upstream = work.load_queries("upstream", upstream_grid, tile)
            weights = work.weights(tile, queries, keys)  # (B·h·c, t, k)
            dropped, kept = work.drop(weights)
            of_weights = work.product("of_weights", upstream, values.transpose(1, 2)).to(weights.dtype)
            if kept is not None:
                of_weights *= kept
            of_scores = torch.ops.aten._softmax_backward_data.out(
                of_weights, weights, -1, weights.dtype, grad_input=of_weights
            )
            if of_biases:
                work.add_biases(window_sum, global_sum, tile, of_scores)
            of_scores, dropped = of_scores.to(queries.dtype), dropped.to(queries.dtype)
            work.store(of_query, tile, work.product("output", of_scores, keys).mul_(work.scale))
            of_keys = work.product("of_keys", of_scores.transpose(1, 2), queries)
            work.add_keys(of_key, of_memory, tile, of_keys)
            of_values = work.product("of_keys", dropped.transpose(1, 2), upstream)
            work.add_keys(of_value, of_memory_value, tile, of_values)
    for place, total in zip(gradients[1:5], sums):
        place.copy_(total)
    if gradients[5].numel():
        gradients[5].copy_(fold_window_bias(window_sum, window.side))
    if gradients[6].numel():
        gradients[6].copy_(global_sum)
    return gradients


class _Work:
    """What the tiles of one call have in common."""

    def __init__(self, inputs: Inputs, window: Window, seed: Tensor | None) -> None:
        self.inputs, self.window = inputs, window
        self.batch, self.heads, _, self.width = inputs.query.shape
        self.globals_ = inputs.global_key.shape[2]
        self.scale = self.width**-0.5
        self.window_bias = window_bias(inputs, window)  # (h or 1, w, w, 3w, 3w)
        self.biases: dict[tuple[object, ...], Tensor] = {}
        self.memory: dict[str, Tensor] = {}
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(inputs.query.device).manual_seed(int(seed))
        seen = window.seen(None if inputs.neighbor is None else int(inputs.neighbor))
        self.per_chunk = self.heads * window.side**2 * (self.globals_ + len(seen) * window.side**2)
        self.tiles = _tiles(window, seen, max(1, SCORES_PER_TILE // (max(1, self.batch) * self.per_chunk)))

    def slices(self) -> Iterator[slice]:
        """All images, so many at a time that the scores of a tile stay in cache."""
        images = max(1, SCORES_PER_TILE // self.per_chunk)
        for first in range(0, self.batch, images):
            yield slice(first, first + images)

    def of_images(self, images: slice) -> tuple[Tensor, ...]:
        """Grids of queries, keys and values, and global keys and values.

        Keys and values are read nine times: from rows of the map that lie in one piece.
        """
        query, key, value, *memory = (tensor[images] for tensor in self.inputs[:5])
        key, value = key.contiguous(), value.contiguous()
        return (*self.grids(query, key, value), *memory)

    def grids(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """(B, h, H·W, D) → (B, h, H, W, D)."""
        return tuple(tensor.unflatten(2, self.window.size) for tensor in tokens)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory of that name, used again for every tile: fresh memory costs more than the work on it."""
        count = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < count:
            self.memory[name] = self.inputs.query.new_empty(count)
        return self.memory[name][:count].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """(n, a, b) and (n, b, c) → (n, a, c), in the buffer of that name."""
        return torch.bmm(left, right, out=self.buffer(name, *left.shape[:2], right.shape[2]))

    def load_queries(self, name: str, grid: Tensor, tile: _Tile, factor: float = 1.0) -> Tensor:
        """What stands at a tile's queries, times a factor: (B, h, H, W, D) → (B·h·c, t, D)."""
        source = self._chunks(grid, tile.rows, tile.columns, tile.chunks)
        copy = torch.mul(source, factor, out=self.buffer(name, *source.shape))
        return copy.view(-1, tile.shape[0] * tile.shape[1], self.width)

    def store(self, grid: Tensor, tile: _Tile, values: Tensor) -> None:
        """The inverse of `load_queries`."""
        place = self._chunks(grid, tile.rows, tile.columns, tile.chunks)
        place.copy_(values.view(place.shape))

    def load_keys(self, name: str, grid: Tensor, memory: Tensor, tile: _Tile) -> Tensor:
        """The keys of a tile, global ones first: (B, h, H, W, D) and (B, h, G, D) → (B·h·c, k, D)."""
        count = self.globals_ + tile.shape[2]
        keys = self.buffer(name, *grid.shape[:2], tile.chunks, count, self.width)
        if self.globals_:
            keys[:, :, :, : self.globals_] = memory[:, :, None]
        local = keys[:, :, :, self.globals_ :]
        for (rows, columns), place in tile.places:
            if rows.start < 0 or columns.start < 0:
                local[:, :, :, place] = 0
            else:
                target = local[:, :, :, place].unflatten(3, (rows.length, columns.length))
                target.copy_(self._chunks(grid, _slice(rows), _slice(columns), tile.chunks))
        return keys.view(-1, count, self.width)

    def add_keys(self, grid: Tensor, memory: Tensor, tile: _Tile, values: Tensor) -> None:
        """Adds (B·h·c, k, D) to where `load_keys` took keys from."""
        values = values.view(*grid.shape[:2], tile.chunks, -1, self.width)  # (B, h, c, k, D)
        if self.globals_:
            memory += values[:, :, :, : self.globals_].sum(dim=2)
        local = values[:, :, :, self.globals_ :]
        for (rows, columns), place in tile.places:
            if rows.start < 0 or columns.start < 0:
                continue
            shape = (rows.length, columns.length)
            for chunk, part in enumerate(local[:, :, :, place].unflatten(3, shape).unbind(2)):
                grid[:, :, _slice(rows), _slice(columns, chunk * self.window.side)] += part

    def weights(self, tile: _Tile, query: Tensor, key: Tensor) -> Tensor:
        """Attention weights (B·h·c, t, k)."""
        scores = self.product("scores", query, key.transpose(1, 2)).to(self.inputs.score_dtype)
        bias = self._bias(tile)
        if bias is not None:
            scores.view(-1, self.heads, tile.chunks, *scores.shape[1:]).add_(bias[:, None])
        return torch.softmax(scores, -1, out=scores)

    def drop(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights after dropout, and what each was multiplied by. Call it once per tile, in order."""
        if self.generator is None:
            return weights, None
        keep = 1 - self.window.dropout
        kept = torch.empty_like(weights).bernoulli_(keep, generator=self.generator).div_(keep or 1)
        return weights * kept, kept

    def _bias(self, tile: _Tile) -> Tensor | None:
        """(h, t, k): what is added to scores; the same for all tiles of one signature."""
        if self.window_bias is None and self.inputs.global_bias is None:
            return None
        if tile.signature not in self.biases:
            rows, columns, count = tile.shape
            bias = self.inputs.query.new_zeros(
                self.heads, rows * columns, self.globals_ + count, dtype=self.inputs.score_dtype
            )
            if self.inputs.global_bias is not None:
                bias[:, :, : self.globals_] = self.inputs.global_bias[:, None]
            if self.window_bias is not None:
                for rectangle, place in tile.places:
                    part = self._part(self.window_bias, tile, rectangle)
                    bias[:, :, self.globals_ :][:, :, place].view(self.heads, *part.shape[1:]).copy_(part)
            self.biases[tile.signature] = bias
        return self.biases[tile.signature]

    def bias_sums(self) -> tuple[Tensor, Tensor]:
        """Zeros for the sums of gradients by place (h, w, w, 3w, 3w), and of the global keys (h, G)."""
        side = self.window.side
        zeros = self.inputs.query.new_zeros(
            self.heads, side, side, 3 * side, 3 * side, dtype=self.inputs.score_dtype
        )
        return zeros, zeros.new_zeros(self.heads, self.globals_)

    def add_biases(self, window_sum: Tensor, global_sum: Tensor, tile: _Tile, of_scores: Tensor) -> None:
        """Adds the gradients of a tile's scores (B·h·c, t, k) to those of the biases."""
        by_image = of_scores.view(-1, self.heads, tile.chunks, *of_scores.shape[1:])  # (B, h, c, t, k)
        total = by_image.sum(dim=0).sum(dim=1)  # (h, t, k); one sum over both dimensions is many times slower
        global_sum += total[:, :, : self.globals_].sum(dim=1)
        for rectangle, place in tile.places:
            part = self._part(window_sum, tile, rectangle)
            part += total[:, :, self.globals_ :][:, :, place].reshape(part.shape)

    @staticmethod
    def _part(by_place: Tensor, tile: _Tile, rectangle: Rectangle) -> Tensor:
        """The part of (h, w, w, 3w, 3w) for a tile's queries and a rectangle of its keys."""
        queries = [slice(length) for length in tile.shape[:2]]
        keys = [slice(run.place, run.place + run.length) for run in rectangle]
        at = (slice(None), *queries, *keys)
        return by_place[at]

    def _chunks(self, grid: Tensor, rows: slice, columns: slice, chunks: int) -> Tensor:
        """A view of one rectangle per chunk, each a window right of the last: (B, h, c, rows, columns, D)."""
        side = self.window.side
        across = grid[:, :, rows, columns.start : columns.stop + (chunks - 1) * side]
        return across.unfold(3, columns.stop - columns.start, side).permute(0, 1, 3, 2, 5, 4)


@lru_cache(maxsize=64)
def _tiles(window: Window, seen: tuple[tuple[int, int], ...], most: int) -> tuple[_Tile, ...]:
    """All tiles of a map, of `most` chunks at most."""
    found: list[_Tile] = []
    (height, width), side = window.size, window.side
    for row, column in itertools.product(range(-(-height // side)), range(-(-width // side))):
        rows = slice(row * side, min(row * side + side, height))
        columns = slice(column * side, min(column * side + side, width))
        tile = _Tile(rows, columns, 1, _rectangles(window, seen, row, column))
        if column and found[-1].chunks < most:
            last = found[-1]
            if replace(last, chunks=1).moved(last.chunks * side) == tile:
                found[-1] = replace(last, chunks=last.chunks + 1)
                continue
        found.append(tile)
    return tuple(found)


def _rectangles(
    window: Window, seen: tuple[tuple[int, int], ...], row: int, column: int
) -> tuple[Rectangle, ...]:
    """The keys that a chunk sees: one rectangle of nine chunks where it can be, or one for each chunk."""
    steps = [((-1, 0, 1), (-1, 0, 1))] if window.neighbors == "all" else [((r,), (c,)) for r, c in seen]
    return tuple(
        rectangle
        for row_steps, column_steps in steps
        for rectangle in itertools.product(
            runs(window.size[0], window.side, window.mask, row, row_steps),
            runs(window.size[1], window.side, window.mask, column, column_steps),
        )
    )


def _slice(run: Run, further: int = 0) -> slice:
    return slice(run.start + further, run.start + run.length + further)


chunked_attention = register("chunked", _forward, _backward, keeps_sums=False)
