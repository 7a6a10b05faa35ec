"""How `chunked` lays out keys: strips, in which what each chunk sees is one stretch.

Chunks that stand one below the other share most of their keys. So the keys of a column of chunks are laid out
once: three columns of chunks wide, row of chunks by row of chunks. The keys of a chunk are then three rows of
chunks that follow each other, and products of matrices read them there, without a copy for each chunk. Where
chunks see themselves alone, or one neighbour, little is shared, and the keys of each stand for themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from vil.attention.local.geometry import Run, Window, runs


class Block(NamedTuple):
    """Local keys that follow each other: rows of the map, of each the same columns."""

    rows: Run
    columns: tuple[Run, ...]
    at: int
    """Where the first stands."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.length, sum(run.length for run in self.columns)

    @property
    def keys(self) -> slice:
        """Where they stand."""
        return slice(self.at, self.at + math.prod(self.shape))

    def parts(self) -> Iterator[tuple[Run, slice]]:
        """Columns of the map, and which of the block's columns they are."""
        ends = list(itertools.accumulate((run.length for run in self.columns), initial=0))
        return zip(self.columns, map(slice, ends, ends[1:]))


class Chunk(NamedTuple):
    """One chunk of each column of a strip."""

    rows: slice
    """Of its queries, on the map."""
    keys: slice
    """The stretch that they see, among the keys of the strip."""
    global_key: int
    """Where in that stretch the first global key stands."""
    blocks: tuple[Block, ...]
    """The local keys, counted from the beginning of the stretch, at the places where this chunk sees them."""


@dataclass(frozen=True)
class Strip:
    """Columns of chunks side by side that see keys at the same places."""

    columns: slice
    """Of the first column's queries, on the map; each further column lies one window to the right."""
    count: int
    """Columns of chunks."""
    length: int
    """Keys for each column."""
    blocks: tuple[Block, ...]
    """The local ones of the first column."""
    global_keys: tuple[int, ...]
    """Where global keys begin, again and again: once in the stretch of every chunk."""
    chunks: tuple[Chunk, ...]

    def moved(self, by: int) -> Strip:
        """The strip so many columns of the map to the right."""
        return replace(
            self,
            columns=slice(self.columns.start + by, self.columns.stop + by),
            blocks=_moved(self.blocks, by),
            chunks=tuple(chunk._replace(blocks=_moved(chunk.blocks, by)) for chunk in self.chunks),
        )

    @cached_property
    def width(self) -> int:
        """Columns of queries of a chunk."""
        return self.columns.stop - self.columns.start

    def queries(self, chunk: Chunk) -> slice:
        """The queries of a chunk, among those of its column."""
        return slice(chunk.rows.start * self.width, chunk.rows.stop * self.width)

    def signature(self, chunk: Chunk) -> Hashable:
        """The same for chunks whose scores have the same biases."""
        places = [
            (block.at, block.rows.length, block.rows.place, *((r.length, r.place) for r in block.columns))
            for block in chunk.blocks
        ]
        return chunk.rows.stop - chunk.rows.start, self.width, chunk.global_key, *places


@lru_cache(maxsize=64)
def strips(
    window: Window, seen: tuple[tuple[int, int], ...], globals_: int, columns: int, keys: int
) -> tuple[Strip, ...]:
    """The strips of a map.

    Args:
        window: the map, and which keys its queries see.
        seen: (row, column) steps to the chunks that a chunk sees.
        globals_: number of global keys.
        columns: of chunks, in one strip at most.
        keys: of a strip at most, where one column of chunks has not more.
    """
    found: list[Strip] = []
    width, side = window.size[1], window.side
    for column in range(-(-width // side)):
        if window.neighbors == "all":
            strip = _overlapping(window, globals_, column)
        else:
            strip = _apart(window, seen, globals_, column)
        if column and found[-1].count < min(columns, keys // max(1, strip.length)):
            last = found[-1]
            if replace(last, count=1).moved(last.count * side) == strip:
                found[-1] = replace(last, count=last.count + 1)
                continue
        found.append(strip)
    return tuple(found)


def _overlapping(window: Window, globals_: int, column: int) -> Strip:
    """Every row of chunks once: the stretch of a chunk begins with the row above and ends with the one below.

    Global keys stand before every second row of chunks. A stretch includes what stands before its own row and
    before the next, of which one is even: so it has the global keys once.
    """
    height, side, mask = window.size[0], window.side, window.mask
    count = -(-height // side)
    columns = runs(window.size[1], side, mask, column, (-1, 0, 1))
    length, blocks, global_keys = 0, [], []
    rows: list[slice] = []  # where those from −1 to `count` stand; these two are the opposite edge, or empty
    for row in range(-1, count + 1):
        if row >= 0 and row % 2 == 0:
            global_keys.append(length)
            length += globals_
        seen_by = min(max(row, 0), count - 1)
        found = _blocks(runs(height, side, mask, seen_by, (row - seen_by,)), columns, length)
        blocks += found
        rows.append(slice(length, found[-1].keys.stop if found else length))
        length = rows[-1].stop
    chunks = []
    for row in range(count):
        around = rows[row : row + 3]
        start = around[0].start
        seen = [
            block
            for step, keys in zip((-1, 0, 1), around)
            for block in _blocks(runs(height, side, mask, row, (step,)), columns, keys.start - start)
        ]
        keys = slice(start, around[-1].stop)
        chunks.append(Chunk(_side(row, side, height), keys, global_keys[(row + 1) // 2] - start, tuple(seen)))
    return _strip(window, column, length, blocks, global_keys, chunks)


def _apart(window: Window, seen: tuple[tuple[int, int], ...], globals_: int, column: int) -> Strip:
    """The keys of each chunk for themselves, global ones first: where a chunk does not see all around it."""
    (height, width), side, mask = window.size, window.side, window.mask
    length, blocks, global_keys, chunks = 0, [], [], []
    for row in range(-(-height // side)):
        start = length
        global_keys.append(start)
        length += globals_
        own: list[Block] = []
        for row_step, column_step in seen:
            columns = runs(width, side, mask, column, (column_step,))
            found = _blocks(runs(height, side, mask, row, (row_step,)), columns, length)
            length = found[-1].keys.stop if found else length
            own += found
        blocks += own
        relative = tuple(block._replace(at=block.at - start) for block in own)
        chunks.append(Chunk(_side(row, side, height), slice(start, length), 0, relative))
    return _strip(window, column, length, blocks, global_keys, chunks)


def _strip(
    window: Window,
    column: int,
    length: int,
    blocks: list[Block],
    global_keys: list[int],
    chunks: list[Chunk],
) -> Strip:
    """One column of chunks."""
    columns = _side(column, window.side, window.size[1])
    return Strip(columns, 1, length, _joined(blocks), tuple(global_keys), tuple(chunks))


def _blocks(rows: Iterable[Run], columns: tuple[Run, ...], at: int) -> list[Block]:
    """Rows after rows, from a place on; none where there are no columns."""
    found: list[Block] = []
    for run in rows if columns else ():
        found.append(Block(run, columns, found[-1].keys.stop if found else at))
    return found


def _joined(blocks: list[Block]) -> tuple[Block, ...]:
    """The same, with fewer: those that follow each other on the map and in the strip are one."""
    found: list[Block] = []
    for block in blocks:
        if found and found[-1].rows.start >= 0:
            last = found[-1]
            rows = last.rows._replace(length=last.rows.length + block.rows.length)
            end = last.rows.start + last.rows.length
            if (block.rows.start, block.columns, block.at) == (end, last.columns, last.keys.stop):
                found[-1] = last._replace(rows=rows)
                continue
        found.append(block)
    return tuple(found)


def _moved(blocks: tuple[Block, ...], by: int) -> tuple[Block, ...]:
    return tuple(
        block._replace(columns=tuple(run._replace(start=run.start + by) for run in block.columns))
        for block in blocks
    )


def _side(chunk: int, side: int, length: int) -> slice:
    """The part of an axis of the map that chunk number `chunk` covers."""
    return slice(chunk * side, min((chunk + 1) * side, length))
