"""Draws the figures of docs/attention.md from the code that they explain.

    python tools/draw_attention.py                      into docs/figures/, a few seconds
    python tools/draw_attention.py --folder FOLDER      elsewhere

Nothing is drawn by hand. Which keys a query sees is read from the definition, `vil/attention/local/dense.py`
(where its bias is finite); order and blocks of keys from the kernels, `fused.py`; strips from `strips.py`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from vil.attention.local import chunked
from vil.attention.local.dense import dense_bias
from vil.attention.local.geometry import AROUND, Inputs, Mask, Window
from vil.attention.local.strips import Strip
from vil.attention.local.strips import strips as strip_layout
from vil.command_line import ToolParser, main
from vil.config import ConfigError
from vil.runtime.files import write_durably

ROOT = Path(__file__).resolve().parents[1]
Position = tuple[int, int]
"""Row and column."""

MASKS: tuple[Mask, ...] = ("chunk", "exact", "cyclic")
LINES = "#343a40"
FAINT = "#adb5bd"
MARK = "#d7263d"
BLOCKS = ("#a9d0ea", "#cfe8cf", "#f7dfb0", "#dcd0ee")
"""Colours of blocks, strips and rows of chunks, one after the other."""
GLOBAL = "#f6bd60"


class Cell(IntEnum):
    """What a position of the padded map is to a query."""

    HIDDEN = 0
    SEEN = 1
    OWN = 2
    QUERY = 3
    PADDING = 4
    SEEN_PADDING = 5


CELLS = {
    Cell.QUERY: (MARK, "the query"),
    Cell.OWN: ("#4a90c4", "keys of its own chunk"),
    Cell.SEEN: ("#a9d0ea", "keys of other chunks"),
    Cell.HIDDEN: ("#e9ecef", "not seen"),
    Cell.PADDING: ("#ffffff", "padding, not seen"),
    Cell.SEEN_PADDING: ("#fdcb8a", "padding, seen as keys and values of 0"),
}
"""Colour and meaning, in the order of the legend."""


def draw(words: Sequence[str]) -> None:
    """Draws every figure and writes its file."""
    parser = ToolParser(prog="draw_attention.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "docs" / "figures", help="default: docs/figures"
    )
    folder = parser.parse_args(words).folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in FIGURES.items():
            path, content = folder / f"{name}.png", io.BytesIO()
            make().savefig(content, dpi=110, format="png", facecolor="white", metadata={"Software": None})
            write_durably(path, content.getvalue())
            print(path)
    except OSError as error:
        raise ConfigError("--folder", f"cannot write there: {error}") from None


def draw_masks() -> Figure:
    """The three masks, for a query in the middle of a map, at a border and in a corner."""
    queries = {"in the middle": (7, 7), "at a border": (7, 1), "in a corner": (0, 14)}
    figure = _figure((8.2, 9.4))
    grid = figure.subplots(len(MASKS), len(queries))
    for mask, row in zip(MASKS, grid):
        row[0].set_ylabel(mask, fontsize=14)
        for (where, query), axes in zip(queries.items(), row):
            seen = draw_map(axes, Window((15, 15), 3, mask), query)
            axes.set_xlabel(f"{int(seen.sum())} keys")
            if mask == MASKS[0]:
                axes.set_title(where)
    _legend(figure, (Cell.QUERY, Cell.OWN, Cell.SEEN, Cell.HIDDEN))
    return figure


def draw_neighbors() -> Figure:
    """All neighbours, none, and each of the eight of the random shift."""
    figure = _figure((10.5, 5.2))
    window = Window((9, 9), 3)
    views: list[tuple[str, Window, int | None]] = [
        ("all", window, None),
        ("self", window._replace(neighbors="self"), None),
        *[(f"random: {n}", window._replace(neighbors="one"), n) for n in range(len(AROUND))],
    ]
    for (name, window, neighbor), axes in zip(views, figure.subplots(2, 5).flat):
        seen = draw_map(axes, window, (4, 4), neighbor)
        axes.set_title(name, fontsize=11)
        axes.set_xlabel(f"{int(seen.sum())} keys")
    _legend(figure, (Cell.QUERY, Cell.OWN, Cell.SEEN, Cell.HIDDEN))
    return figure


def draw_odd_map() -> Figure:
    """A map of 13 × 10 tokens, which chunks of 4 × 4 do not divide, from three queries."""
    queries = {"first token": (0, 0), "in the middle": (6, 5), "last token": (12, 9)}
    figure = _figure((8.2, 11.4))
    grid = figure.subplots(len(MASKS), len(queries))
    for mask, row in zip(MASKS, grid):
        row[0].set_ylabel(mask, fontsize=14)
        for (where, query), axes in zip(queries.items(), row):
            seen = draw_map(axes, Window((13, 10), 4, mask), query)
            padding = int(seen[13:].sum() + seen[:13, 10:].sum())
            keys = int(seen.sum()) - padding
            axes.set_xlabel(f"{keys} keys" + (f", {padding} of padding" if padding else ""))
            if mask == MASKS[0]:
                axes.set_title(where)
    _legend(figure, tuple(CELLS))
    return figure


def draw_kernel() -> Figure:
    """How programs of the kernels share queries, and in which order they meet keys."""
    figure = _figure((9.2, 9.8))
    (queries, middle), (corner, shifted) = figure.subplots(2, 2)
    blocks = query_blocks(15)
    _draw_blocks(queries, blocks, 15)
    _number_blocks(queries, blocks)
    queries.set_ylim(15, -15 * 2.4 / 21)  # as high as the others
    queries.set_title(f"w = 15: a chunk's 225 queries, in {int(blocks.max()) + 1} programs")
    for axes, title, chunk, neighbor in (
        (middle, "w = 7: 441 keys around a chunk", (4, 4), None),
        (corner, "the same for the chunk in the upper left corner", (0, 0), None),
        (shifted, "random shift, neighbour 2: 98 keys", (4, 4), 2),
    ):
        window = Window((56, 56), 7, "chunk", "all" if neighbor is None else "one")
        blocks, on_map = key_blocks(window, chunk, neighbor)
        _draw_blocks(axes, blocks, window.side)
        axes.set_title(title)
        for row, column in (~on_map & (blocks >= 0)).nonzero().tolist():
            axes.add_patch(Rectangle((column, row), 1, 1, fc="white", ec=FAINT, hatch="////", lw=0))
        _number_blocks(axes, blocks.where(on_map, -1))
        axes.add_patch(Rectangle((7, 7), 7, 7, fill=False, ec=MARK, lw=2.5))
        axes.add_patch(Rectangle((0, -2.2), 1, 1, fc=GLOBAL, ec=LINES, clip_on=False))
        axes.text(1.5, -1.7, "before them, in block 1: the global key", va="center", fontsize=10)
        axes.set_ylim(21, -2.4)
    figure.legend(
        handles=[
            Patch(fill=False, ec=MARK, lw=2.5, label="the chunk of the queries"),
            Patch(fc="white", ec=FAINT, hatch="////", label="off the map: read as 0, score −∞"),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def draw_strips() -> Figure:
    """What `chunked` works on at a time, and how the keys of a column of chunks are laid out."""
    figure = _figure((11.5, 6.4))
    on_map, layout = figure.subplots(1, 2, width_ratios=(1, 1.05))
    found = strips(8)
    for number, strip in enumerate(found):
        first, width = strip.columns.start, strip.width * strip.count
        on_map.add_patch(_rectangle(0, first, 56, width, fc=BLOCKS[number % len(BLOCKS)], ec="white", lw=3))
    strip = next(strip for strip in found if strip.count > 1)
    chunk = strip.chunks[3]
    for number, style in {strip.count - 1: "--", 0: "-"}.items():
        block = strip.blocks[0]
        corner = ((chunk.rows.start - 7), block.columns[0].start + number * 7)
        on_map.add_patch(_rectangle(*corner, 21, block.shape[1], fill=False, ec=LINES, ls=style, lw=2))
    corner = (chunk.rows.start, strip.columns.start)
    on_map.add_patch(_rectangle(*corner, 7, 7 * strip.count, fill=False, ec=MARK, lw=3))
    _draw_grid(on_map, (56, 56), 7)
    _frame(on_map, (56, 56))
    on_map.set_title("56 × 56 tokens, w = 7, 3 heads × 32, 8 images")
    on_map.set_xlabel(f"{len(found)} strips")
    _draw_layout(layout)
    figure.legend(
        handles=[
            Patch(fill=False, ec=MARK, lw=2.5, label="chunks worked on at a time"),
            Patch(fill=False, ec=LINES, lw=1.5, label="keys of the first"),
            Patch(fill=False, ec=LINES, lw=1.5, ls="--", label="keys of the last"),
            Patch(fc=GLOBAL, ec=LINES, label="global keys"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "masks": draw_masks,
    "neighbors": draw_neighbors,
    "odd_map": draw_odd_map,
    "kernel": draw_kernel,
    "strips": draw_strips,
}


def visible(window: Window, query: Position, neighbor: int | None = None) -> Tensor:
    """(P, Q): which positions of the padded map the query sees, as the definition has it."""
    height, width = window.size
    nothing = torch.empty(1, 1, height * width, 0)
    number = None if neighbor is None else torch.tensor(neighbor)
    inputs = Inputs(nothing, nothing, nothing, nothing, nothing, neighbor=number)
    bias = dense_bias(inputs, window)[0, query[0] * width + query[1]]  # (P·Q,)
    return bias.isfinite().view(-1, -(-width // window.side) * window.side)


def draw_map(axes: Axes, window: Window, query: Position, neighbor: int | None = None) -> Tensor:
    """Draws the padded map as `query` sees it, and returns what is visible, (P, Q)."""
    seen = visible(window, query, neighbor)
    (height, width), side = window.size, window.side
    cells = torch.where(seen, Cell.SEEN, Cell.HIDDEN)
    own = tuple(slice(q // side * side, q // side * side + side) for q in query)
    cells[own] = torch.where(seen[own], Cell.OWN, Cell.HIDDEN)
    cells[query] = Cell.QUERY
    for padding in ((slice(height, None),), (slice(height), slice(width, None))):
        cells[padding] = torch.where(seen[padding], Cell.SEEN_PADDING, Cell.PADDING)
    colors = ListedColormap([CELLS[cell][0] for cell in Cell])
    axes.pcolormesh(cells.numpy(), cmap=colors, vmin=-0.5, vmax=len(Cell) - 0.5, ec="white", lw=0.5)
    for corner, rows, columns in (
        ((height, 0), len(cells) - height, cells.shape[1]),
        ((0, width), height, cells.shape[1] - width),
    ):
        if rows and columns:
            axes.add_patch(_rectangle(*corner, rows, columns, fill=False, ec=FAINT, hatch="////", lw=0))
    _draw_grid(axes, cells.shape, side)
    axes.add_patch(_rectangle(0, 0, height, width, fill=False, ec="black", lw=2, clip_on=False))
    _frame(axes, cells.shape)
    return seen


def query_blocks(side: int) -> Tensor:
    """(w, w): the program that attends for each query of a chunk; head width 32, bfloat16."""
    fused, _ = _kernels()
    block = fused._blocks(side**2, 9 * side**2, 32, torch.bfloat16)[0]
    return (torch.arange(side**2) // block).view(side, side)


def key_blocks(window: Window, chunk: Position, neighbor: int | None = None) -> tuple[Tensor, Tensor]:
    """In which block a program of a chunk meets the keys around it; G = 1, head width 32, bfloat16.

    Returns:
        (3w, 3w) the number of the block, −1 where it goes to none; and whether the place is on the map.
    """
    (fused, kernels), side = _kernels(), window.side
    keys = len(window.seen(neighbor)) * side**2
    n = torch.arange(keys)
    step = (0, 0) if neighbor is None else window.seen(neighbor)[1]
    row, column = kernels._place.fn(n, *step, side, window.neighbors)
    numbers = torch.full((3 * side, 3 * side), -1)
    numbers[row, column] = (1 + n) // fused._blocks(side**2, keys, 32, torch.bfloat16)[1]
    inside = []
    for length, number in zip(window.size, chunk):
        position = (number - 1) * side + torch.arange(3 * side)
        inside.append(kernels._on_map.fn(position, length, -(-length // side), side, False)[1])
    return numbers, inside[0][:, None] & inside[1]


def strips(batch: int) -> tuple[Strip, ...]:
    """The strips in stage 1 of ViL-Small: 56 × 56 tokens, 3 heads × 32, w = 7, G = 1."""
    tokens = torch.empty(batch, 3, 56**2, 32, device="meta")
    memory = torch.empty(batch, 3, 1, 32, device="meta")
    inputs = Inputs(tokens, tokens, tokens, memory, memory)
    return chunked._Work(inputs, Window((56, 56), 7), None).strips


def _kernels() -> tuple[Any, Any]:
    try:
        from vil.attention.local import fused, kernels
    except ImportError:
        raise ConfigError("triton", "the figure of the kernels needs this package") from None
    return fused, kernels


def _figure(inches: tuple[float, float]) -> Figure:
    return Figure(figsize=inches, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def _draw_blocks(axes: Axes, blocks: Tensor, side: int) -> None:
    """Positions in the colours of their blocks; those of no block are grey."""
    colors = [CELLS[Cell.HIDDEN][0], *BLOCKS]
    axes.pcolormesh(
        torch.where(blocks < 0, 0, blocks % len(BLOCKS) + 1).numpy(),
        cmap=ListedColormap(colors), vmin=-0.5, vmax=len(BLOCKS) + 0.5, ec="white", lw=0.5,
    )  # fmt: skip
    _draw_grid(axes, blocks.shape, side)
    _frame(axes, blocks.shape)


def _number_blocks(axes: Axes, blocks: Tensor) -> None:
    """The number of each block, counted from 1, in the position next to its middle."""
    for number in blocks[blocks >= 0].unique().tolist():
        cells = (blocks == number).nonzero()
        middle = cells.float().mean(dim=0)
        row, column = cells[(cells - middle).square().sum(dim=1).argmin()].tolist()
        axes.text(
            column + 0.5, row + 0.5, str(number + 1), ha="center", va="center", fontsize=12, weight="bold"
        )


def _draw_layout(axes: Axes) -> None:
    """The keys of a strip of a 15 × 15 map, w = 3, one global key, from top to bottom; and every stretch."""
    window = Window((15, 15), 3)
    strip = strip_layout(window, window.seen(None), 1, columns=1, keys=10**6)[1]
    wide = strip.blocks[0].shape[1]
    tops = [0]  # of what is drawn for each key: nine in a row, a global one in a row of its own
    for at in range(strip.length):
        ends_row = at in strip.global_keys or any(
            at in range(b.keys.start, b.keys.stop) and (at - b.at) % wide == wide - 1 for b in strip.blocks
        )
        tops.append(tops[-1] + ends_row)
    for block in strip.blocks:
        for row in range(block.rows.length):
            color = BLOCKS[(block.rows.start + row) // 3 % len(BLOCKS)]
            for column in range(wide):
                axes.add_patch(_rectangle(tops[block.at] + row, column, 1, 1, fc=color, ec="white", lw=0.5))
    for at in strip.global_keys:
        axes.add_patch(_rectangle(tops[at], 0, 1, 1, fc=GLOBAL, ec=LINES))
    for number, chunk in enumerate(strip.chunks):
        top, stop, left = tops[chunk.keys.start], tops[chunk.keys.stop], wide + 1 + 2 * number
        axes.add_patch(_rectangle(top, left, stop - top, 1, fc=BLOCKS[number % len(BLOCKS)], ec=LINES))
        axes.add_patch(_rectangle(tops[chunk.keys.start + chunk.global_key], left, 1, 1, fc=GLOBAL, ec=LINES))
        axes.text(left + 0.5, top - 0.5, str(number + 1), ha="center", va="center", fontsize=10)
    axes.text(wide / 2, -0.5, "the keys, row by row", ha="center", va="center", fontsize=10)
    _frame(axes, (tops[-1], wide + 1 + 2 * len(strip.chunks)))
    axes.set_ylim(tops[-1], -1)
    axes.set_title("15 × 15 tokens, w = 3: a strip, and what its chunks see")


def _draw_grid(axes: Axes, shape: Sequence[int], side: int) -> None:
    """The chunks' edges."""
    height, width = shape
    axes.hlines(range(0, height + 1, side), 0, width, colors=LINES, lw=1)
    axes.vlines(range(0, width + 1, side), 0, height, colors=LINES, lw=1)


def _frame(axes: Axes, shape: Sequence[int]) -> None:
    """Rows from the top, squares, no ticks."""
    height, width = shape
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, cells: Sequence[Cell]) -> None:
    figure.legend(
        handles=list(_handles(cells)),
        loc="outside lower center",
        ncols=3 if len(cells) > 4 else 4,
        frameon=False,
    )


def _handles(cells: Sequence[Cell]) -> Iterator[Patch]:
    for cell, (color, meaning) in CELLS.items():
        if cell in cells:
            hatch = "////" if cell in (Cell.PADDING, Cell.SEEN_PADDING) else None
            yield Patch(fc=color, ec=FAINT, hatch=hatch, label=meaning)


def _rectangle(row: float, column: float, rows: int, columns: int, **style: Any) -> Rectangle:
    return Rectangle((column, row), columns, rows, **style)


if __name__ == "__main__":
    main(draw)
