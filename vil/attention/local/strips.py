"""Memory layout of keys in `chunked`: strips, in which the keys of each chunk are contiguous.

Vertically adjacent chunks share most of their keys. A strip holds the keys of a column of chunks once, three
chunks wide, row of chunks by row of chunks. The keys of a chunk are three consecutive rows, read by matrix
products without another copy. If chunks see only themselves, or one neighbor, little is shared, and the
strip holds the keys of each chunk separately.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from vil.attention.local.geometry import KeyRange, LocalAttentionSpec, key_ranges


class Block(NamedTuple):
    """Consecutive local keys: rows of the map, with the same columns in each."""

    rows: KeyRange
    columns: tuple[KeyRange, ...]
    offset: int
    """Index of the first key."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows.length, sum(run.length for run in self.columns)

    @property
    def keys(self) -> slice:
        """Slice of the keys in the strip."""
        return slice(self.offset, self.offset + math.prod(self.shape))

    def parts(self) -> Iterator[tuple[KeyRange, slice]]:
        """Yield ranges of columns of the map, with their slices of the block's columns."""
        ends = list(itertools.accumulate((run.length for run in self.columns), initial=0))
        return zip(self.columns, map(slice, ends, ends[1:]))


class Chunk(NamedTuple):
    """One chunk of each column of a strip."""

    rows: slice
    """Rows of its queries on the map."""
    keys: slice
    """Slice of its keys in the strip."""
    global_key: int
    """Index of the first global key in that slice."""
    blocks: tuple[Block, ...]
    """Local keys, at their apparent positions; offsets are counted from the beginning of the slice."""


@dataclass(frozen=True)
class Strip:
    """Adjacent columns of chunks with the same layout of keys."""

    columns: slice
    """Columns of the first queries on the map; each further column of chunks is one window to the right."""
    count: int
    """Number of columns of chunks."""
    length: int
    """Keys per column of chunks."""
    blocks: tuple[Block, ...]
    """Local keys of the first column."""
    global_keys: tuple[int, ...]
    """Indices where copies of the global keys begin: one in the slice of every chunk."""
    chunks: tuple[Chunk, ...]

    def shifted(self, by: int) -> Strip:
        """Return the strip shifted to the right by a number of columns of the map."""
        return replace(
            self,
            columns=slice(self.columns.start + by, self.columns.stop + by),
            blocks=_shift_columns(self.blocks, by),
            chunks=tuple(chunk._replace(blocks=_shift_columns(chunk.blocks, by)) for chunk in self.chunks),
        )

    @cached_property
    def width(self) -> int:
        """Columns of queries per chunk."""
        return self.columns.stop - self.columns.start

    def queries(self, chunk: Chunk) -> slice:
        """Return the slice of a chunk's queries among those of its column."""
        return slice(chunk.rows.start * self.width, chunk.rows.stop * self.width)

    def signature(self, chunk: Chunk) -> Hashable:
        """Return a key that is equal for chunks with equal biases."""
        # Where the keys are on the map (`KeyRange.start`) does not matter.
        positions = [(b.offset, b.rows[1:], *(run[1:] for run in b.columns)) for b in chunk.blocks]
        return chunk.rows.stop - chunk.rows.start, self.width, chunk.global_key, *positions


@lru_cache(maxsize=64)
def strips(
    spec: LocalAttentionSpec, seen: tuple[tuple[int, int], ...], num_globals: int, columns: int, keys: int
) -> tuple[Strip, ...]:
    """Return the strips of a map.

    Args:
        spec: the map and the visible keys.
        seen: (row, column) offsets of the visible chunks.
        num_globals: number of global keys.
        columns: maximum number of columns of chunks in a strip.
        keys: maximum number of keys in a strip with more than one column.
    """
    result: list[Strip] = []
    width, side = spec.size[1], spec.window
    for column in range(-(-width // side)):
        if spec.neighbors == "all":
            strip = _overlapping_strip(spec, num_globals, column)
        else:
            strip = _separate_strip(spec, seen, num_globals, column)
        if column and result[-1].count < min(columns, keys // max(1, strip.length)):
            last = result[-1]
            if replace(last, count=1).shifted(last.count * side) == strip:
                result[-1] = replace(last, count=last.count + 1)
                continue
        result.append(strip)
    return tuple(result)


def _overlapping_strip(spec: LocalAttentionSpec, num_globals: int, column: int) -> Strip:
    """Lay out every row of chunks once: the keys of a chunk are the row above, its own, and the row below.

    Global keys precede every second row of chunks. The keys of a chunk include what precedes its own row and
    the next one, of which exactly one is even: so they contain the global keys once.
    """
    height, side, mask = spec.size[0], spec.window, spec.mask
    count = -(-height // side)
    columns = key_ranges(spec.size[1], side, mask, column, (-1, 0, 1))
    length, blocks, global_keys = 0, [], []
    rows: list[slice] = []  # from −1 to `count`, which are the opposite edge, or empty
    for row in range(-1, count + 1):
        if row >= 0 and row % 2 == 0:
            global_keys.append(length)
            length += num_globals
        seen_by = min(max(row, 0), count - 1)
        row_blocks = _blocks(key_ranges(height, side, mask, seen_by, (row - seen_by,)), columns, length)
        blocks += row_blocks
        rows.append(slice(length, row_blocks[-1].keys.stop if row_blocks else length))
        length = rows[-1].stop
    chunks = []
    for row in range(count):
        around = rows[row : row + 3]
        start = around[0].start
        seen = [
            block
            for step, keys in zip((-1, 0, 1), around)
            for block in _blocks(key_ranges(height, side, mask, row, (step,)), columns, keys.start - start)
        ]
        keys = slice(start, around[-1].stop)
        global_key = global_keys[(row + 1) // 2] - start
        chunks.append(Chunk(_chunk_slice(row, side, height), keys, global_key, tuple(seen)))
    queries = _chunk_slice(column, side, spec.size[1])
    return Strip(queries, 1, length, _merge_blocks(blocks), tuple(global_keys), tuple(chunks))


def _separate_strip(
    spec: LocalAttentionSpec, seen: tuple[tuple[int, int], ...], num_globals: int, column: int
) -> Strip:
    """Lay out the keys of each chunk separately, global ones first: for chunks that see few others."""
    (height, width), side, mask = spec.size, spec.window, spec.mask
    length, blocks, global_keys, chunks = 0, [], [], []
    for row in range(-(-height // side)):
        start = length
        global_keys.append(start)
        length += num_globals
        own: list[Block] = []
        for row_step, column_step in seen:
            columns = key_ranges(width, side, mask, column, (column_step,))
            visible_blocks = _blocks(key_ranges(height, side, mask, row, (row_step,)), columns, length)
            length = visible_blocks[-1].keys.stop if visible_blocks else length
            own += visible_blocks
        blocks += own
        relative = tuple(block._replace(offset=block.offset - start) for block in own)
        chunks.append(Chunk(_chunk_slice(row, side, height), slice(start, length), 0, relative))
    queries = _chunk_slice(column, side, width)
    return Strip(queries, 1, length, _merge_blocks(blocks), tuple(global_keys), tuple(chunks))


def _blocks(rows: Iterable[KeyRange], columns: tuple[KeyRange, ...], offset: int) -> list[Block]:
    """Return blocks of rows, one after the other from index `offset`; none without columns."""
    blocks: list[Block] = []
    for run in rows if columns else ():
        blocks.append(Block(run, columns, blocks[-1].keys.stop if blocks else offset))
    return blocks


def _merge_blocks(blocks: list[Block]) -> tuple[Block, ...]:
    """Merge blocks that are consecutive both on the map and in the strip."""
    merged: list[Block] = []
    for block in blocks:
        if merged and merged[-1].rows.start >= 0:
            last = merged[-1]
            rows = last.rows._replace(length=last.rows.length + block.rows.length)
            end = last.rows.start + last.rows.length
            if (block.rows.start, block.columns, block.offset) == (end, last.columns, last.keys.stop):
                merged[-1] = last._replace(rows=rows)
                continue
        merged.append(block)
    return tuple(merged)


def _shift_columns(blocks: tuple[Block, ...], by: int) -> tuple[Block, ...]:
    shifted = (tuple(run._replace(start=run.start + by) for run in block.columns) for block in blocks)
    return tuple(block._replace(columns=columns) for block, columns in zip(blocks, shifted))


def _chunk_slice(chunk: int, side: int, length: int) -> slice:
    """Return the slice of an axis of the map that chunk number `chunk` covers."""
    return slice(chunk * side, min((chunk + 1) * side, length))
