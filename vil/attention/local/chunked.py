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
from functools import lru_cache

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

    @property
    def queries(self) -> int:
        """Queries of one chunk."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def moved(self, by: int) -> _Tile:
        """The tile so many columns to the right."""
        keys = tuple((rows, run._replace(start=run.start + by)) for rows, run in self.keys)
        return replace(self, columns=slice(self.columns.start + by, self.columns.stop + by), keys=keys)


def _forward(inputs: Inputs, window: Window, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    work = _Work(inputs, window, seed)
    output = like_tokens(inputs.query)
    grid = work.grid(output)
    for tile, images in work.tiles():
        query, key, value = work.load(tile, images)
        weights, _ = work.drop(work.weights(tile, query, key))
        work.store(grid[images], tile, work.product("output", weights.to(value.dtype), value))
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
    of_query = work.grid(gradients[0])
    # Sums over tiles, in float32 for the half precisions.
    of_key, of_value, of_global_key, of_global_value = sums = [
        torch.zeros_like(x, dtype=inputs.score_dtype) for x in gradients[1:5]
    ]
    window_sum, global_sum = work.bias_sums()
    output_gradient = work.grid(gradient)
    for tile, images in work.tiles():
        query, key, value = work.load(tile, images)
        upstream = work.load_queries("upstream", output_gradient[images], tile)  # (B·h·c, t, D)
        weights = work.weights(tile, query, key)  # (B·h·c, t, k)
        dropped, kept = work.drop(weights)
        of_weights = work.product("of_weights", upstream, value.transpose(1, 2)).to(weights.dtype)
        if kept is not None:
            of_weights *= kept
        of_scores = work.buffer(
            "scores", *weights.shape, dtype=weights.dtype
        )  # the scores are not needed again
        torch.ops.aten._softmax_backward_data.out(
            of_weights, weights, -1, weights.dtype, grad_input=of_scores
        )
        if of_biases:
            work.add_biases(window_sum, global_sum, tile, of_scores)
        of_scores = of_scores.to(query.dtype)
        work.store(of_query[images], tile, work.product("output", of_scores, key).mul_(work.scale))
        for grid, memory, weight, vector in (
            (of_key, of_global_key, of_scores, query),
            (of_value, of_global_value, dropped.to(upstream.dtype), upstream),
        ):
            of_keys = work.product("of_keys", weight.transpose(1, 2), vector)
            work.add_keys(work.grid(grid)[images], memory[images], tile, of_keys)
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

    def tiles(self) -> Iterator[tuple[_Tile, slice]]:
        """Every tile, and a slice of images so short that their scores stay in cache."""
        neighbor = None if self.inputs.neighbor is None else int(self.inputs.neighbor)
        seen = self.window.seen(neighbor)
        per_chunk = self.heads * self.window.side**2 * (self.globals_ + len(seen) * self.window.side**2)
        most = max(1, SCORES_PER_TILE // (self.batch * per_chunk))
        images = max(1, SCORES_PER_TILE // per_chunk)
        for tile in _tiles(self.window, seen, most):
            for first in range(0, self.batch, images):
                yield tile, slice(first, first + images)

    def grid(self, tokens: Tensor) -> Tensor:
        """(B, h, H·W, D) → (B, h, H, W, D)."""
        return tokens.unflatten(2, self.window.size)

    def load(self, tile: _Tile, images: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries (B·h·c, t, D), and keys and values (B·h·c, k, D) of a tile."""
        inputs = self.inputs
        return (
            self.load_queries("query", self.grid(inputs.query[images]), tile).mul_(self.scale),
            self._load_keys("key", self.grid(inputs.key[images]), inputs.global_key[images], tile),
            self._load_keys("value", self.grid(inputs.value[images]), inputs.global_value[images], tile),
        )

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of that name, used again for every tile: fresh memory costs more than the work on it."""
        count = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < count:
            self.memory[name] = self.inputs.query.new_empty(count, dtype=dtype or self.inputs.query.dtype)
        return self.memory[name][:count].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """(n, a, b) and (n, b, c) → (n, a, c), in the buffer of that name."""
        return torch.bmm(left, right, out=self.buffer(name, *left.shape[:2], right.shape[2]))

    def load_queries(self, name: str, grid: Tensor, tile: _Tile) -> Tensor:
        """What stands at a tile's queries: (B, h, H, W, D) → (B·h·c, t, D)."""
        source = self._chunks(grid, tile.rows, tile.columns, tile.chunks)
        return self.buffer(name, *source.shape).copy_(source).flatten(3, 4).flatten(0, 2)

    def store(self, grid: Tensor, tile: _Tile, values: Tensor) -> None:
        """The inverse of `load_queries`."""
        place = self._chunks(grid, tile.rows, tile.columns, tile.chunks)
        place.copy_(values.view(place.shape))

    def _load_keys(self, name: str, grid: Tensor, memory: Tensor, tile: _Tile) -> Tensor:
        """(B, h, H, W, D) and (B, h, G, D) → (B·h·c, k, D)."""
        count = self.globals_ + sum(rows.length * columns.length for rows, columns in tile.keys)
        keys = self.buffer(name, *grid.shape[:2], tile.chunks, count, self.width)
        keys[:, :, :, : self.globals_] = memory[:, :, None]
        for (rows, columns), place in self._places(tile):
            if rows.start < 0 or columns.start < 0:
                keys[:, :, :, place] = 0
            else:
                target = keys[:, :, :, place].unflatten(3, (rows.length, columns.length))
                target.copy_(self._chunks(grid, _slice(rows), _slice(columns), tile.chunks))
        return keys.flatten(0, 2)

    def add_keys(self, grid: Tensor, memory: Tensor, tile: _Tile, values: Tensor) -> None:
        """Adds (B·h·c, k, D) to where `_load_keys` took keys from."""
        values = values.view(*grid.shape[:2], tile.chunks, -1, self.width)  # (B, h, c, k, D)
        memory += values[:, :, :, : self.globals_].sum(dim=2)
        for (rows, columns), place in self._places(tile):
            if rows.start < 0 or columns.start < 0:
                continue
            shape = (rows.length, columns.length)
            for chunk, part in enumerate(values[:, :, :, place].unflatten(3, shape).unbind(2)):
                grid[:, :, _slice(rows), _slice(columns, chunk * self.window.side)] += part

    def weights(self, tile: _Tile, query: Tensor, key: Tensor) -> Tensor:
        """Attention weights (B·h·c, t, k)."""
        dtype = self.inputs.score_dtype
        scores = self.product("scores" if dtype == query.dtype else "product", query, key.transpose(1, 2)).to(
            dtype
        )
        bias = self._bias(tile)
        if bias is not None:
            scores.view(-1, self.heads, tile.chunks, *scores.shape[1:]).add_(bias[:, None])
        return torch.softmax(scores, -1, out=self.buffer("weights", *scores.shape, dtype=dtype))

    def drop(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights after dropout, and what each was multiplied by. Call it once per tile, in order."""
        if self.generator is None:
            return weights, None
        keep = 1 - self.window.dropout
        kept = torch.empty_like(weights).bernoulli_(keep, generator=self.generator).div_(keep or 1)
        return weights * kept, kept

    def _bias(self, tile: _Tile) -> Tensor | None:
        """(h, t, k): what is added to scores; the same for all tiles that see keys at the same places."""
        if self.window_bias is None and self.inputs.global_bias is None:
            return None
        signature = (tile.queries, *[(r.length, r.place, c.length, c.place) for r, c in tile.keys])
        if signature not in self.biases:
            places = self._places(tile)
            count = places[-1][1].stop
            bias = self.inputs.query.new_zeros(self.heads, tile.queries, count, dtype=self.inputs.score_dtype)
            if self.inputs.global_bias is not None:
                bias[:, :, : self.globals_] = self.inputs.global_bias[:, None]
            if self.window_bias is not None:
                for rectangle, place in places:
                    part = self._part(self.window_bias, tile, rectangle)
                    bias[:, :, place].view(self.heads, *part.shape[1:]).copy_(part)
            self.biases[signature] = bias
        return self.biases[signature]

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
        for rectangle, place in self._places(tile):
            part = self._part(window_sum, tile, rectangle)
            part += total[:, :, place].reshape(part.shape)

    def _places(self, tile: _Tile) -> list[tuple[Rectangle, slice]]:
        """Where each rectangle of keys stands among the k keys of a tile."""
        ends = list(itertools.accumulate((r.length * c.length for r, c in tile.keys), initial=self.globals_))
        return [(rectangle, slice(*ends[i : i + 2])) for i, rectangle in enumerate(tile.keys)]

    @staticmethod
    def _part(by_place: Tensor, tile: _Tile, rectangle: Rectangle) -> Tensor:
        """The part of (h, w, w, 3w, 3w) for a tile's queries and a rectangle of its keys."""
        queries = [slice(side.stop - side.start) for side in (tile.rows, tile.columns)]
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
