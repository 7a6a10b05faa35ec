"""Draw the figures of docs/attention.md from the code of the local attention.

    python -m tools.dev.draw_attention                      into docs/figures/, a few seconds
    python -m tools.dev.draw_attention --folder FOLDER      into another folder

The visible keys are read from the definition, vil/attention/local/dense.py (where its bias is finite), the
order and blocks of keys from the kernels (fused.py), the strips from strips.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from tools.png import as_png
from vil import command_line
from vil.attention.local import chunked
from vil.attention.local.dense import dense_bias
from vil.attention.local.geometry import NEIGHBOR_OFFSETS, Inputs, LocalAttentionSpec, Mask
from vil.attention.local.strips import Strip
from vil.attention.local.strips import strips as strip_layout
from vil.command_line import ToolParser
from vil.runtime.files import write_output

ROOT = Path(__file__).resolve().parents[2]
Position = tuple[int, int]
"""Row and column."""

MASKS: tuple[Mask, ...] = ("chunk", "exact", "cyclic")
DARK, LIGHT, RED, ORANGE = "#343a40", "#adb5bd", "#d7263d", "#f6bd60"
BLOCK_COLORS = ("#a9d0ea", "#cfe8cf", "#f7dfb0", "#dcd0ee")
"""Colors of blocks, strips and rows of chunks, in turn."""
HATCH = "////"


class Cell(IntEnum):
    """State of a position of the padded map for a query."""

    HIDDEN = 0
    VISIBLE = 1
    SAME_CHUNK = 2
    QUERY = 3
    PADDING = 4
    VISIBLE_PADDING = 5


LEGEND = {
    Cell.QUERY: (RED, "query"),
    Cell.SAME_CHUNK: ("#4a90c4", "keys of the query's chunk"),
    Cell.VISIBLE: ("#a9d0ea", "keys of other chunks"),
    Cell.HIDDEN: ("#e9ecef", "not visible"),
    Cell.PADDING: ("#ffffff", "padding, not visible"),
    Cell.VISIBLE_PADDING: ("#fdcb8a", "padding, visible as keys and values of 0"),
}
"""Color and label, in the order of the legend."""


def draw_masks(
    size: Position, window: int, queries: dict[str, Position], height: float, has_padding: bool = False
) -> Figure:
    """Draw the keys that are visible to each of `queries` with each mask."""
    figure = _new_figure(8.2, height)
    for mask, row in zip(MASKS, figure.subplots(len(MASKS), len(queries))):
        row[0].set_ylabel(mask, fontsize=14)
        for (title, query), axes in zip(queries.items(), row):
            visible = draw_map(axes, LocalAttentionSpec(size, window, mask), query)
            keys = int(visible[: size[0], : size[1]].sum())
            padding = int(visible.sum()) - keys
            axes.set_xlabel(f"{keys} keys" + (f", {padding} of padding" if padding else ""))
            if mask == MASKS[0]:
                axes.set_title(title)
    _add_cell_legend(figure, has_padding)
    return figure


def draw_neighbors() -> Figure:
    """Draw the visible keys with all neighbors, with none, and with each of the eight of random shift."""
    figure = _new_figure(10.5, 5.2)
    spec = LocalAttentionSpec((9, 9), 3)
    maps: list[tuple[str, LocalAttentionSpec, int | None]] = [
        ("all", spec, None),
        ("self", spec._replace(neighbors="self"), None),
        *[(f"random: {n}", spec._replace(neighbors="one"), n) for n in range(len(NEIGHBOR_OFFSETS))],
    ]
    for (title, spec, neighbor), axes in zip(maps, figure.subplots(2, 5).flat):
        visible = draw_map(axes, spec, (4, 4), neighbor)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"{int(visible.sum())} keys")
    _add_cell_legend(figure)
    return figure


def draw_kernel() -> Figure:
    """Draw how programs of the kernels divide the queries, and the order in which they process keys."""
    figure = _new_figure(9.2, 9.8)
    (query_axes, *axes_of_keys) = figure.subplots(2, 2).flat
    blocks = query_blocks(15)
    _draw_blocks(query_axes, blocks, blocks, 15)
    query_axes.set_ylim(15, -15 * 2.4 / 21)  # as high as the others
    query_axes.set_title(f"w = 15: a chunk's 225 queries, in {int(blocks.max()) + 1} programs")
    for axes, title, chunk, neighbor in zip(
        axes_of_keys,
        (
            "w = 7: 441 keys around a chunk",
            "the same for the chunk in the upper left corner",
            "random shift, neighbor 2: 98 keys",
        ),
        ((4, 4), (0, 0), (4, 4)),
        (None, None, 2),
    ):
        spec = LocalAttentionSpec((56, 56), 7, "chunk", "all" if neighbor is None else "one")
        blocks, is_on_map = key_blocks(spec, chunk, neighbor)
        _draw_blocks(axes, blocks, blocks.where(is_on_map, -1), 7)
        axes.set_title(title)
        for row, column in (~is_on_map & (blocks >= 0)).nonzero().tolist():
            _draw_rectangle(axes, row, column, fc="white", ec=LIGHT, hatch=HATCH, lw=0)
        _draw_rectangle(axes, 7, 7, 7, 7, fill=False, ec=RED, lw=2.5)
        _draw_rectangle(axes, -2.2, 0, fc=ORANGE, ec=DARK, clip_on=False)
        axes.text(1.5, -1.7, "before them, in block 1: the global key", va="center", fontsize=10)
        axes.set_ylim(21, -2.4)
    _add_legend(
        figure,
        Patch(fill=False, ec=RED, lw=2.5, label="the chunk of the queries"),
        Patch(fc="white", ec=LIGHT, hatch=HATCH, label="off the map: read as 0, score −∞"),
    )
    return figure


def draw_strips() -> Figure:
    """Draw the strips that `chunked` computes at a time, and the layout of the keys of a strip."""
    figure = _new_figure(11.5, 6.4)
    map_axes, layout_axes = figure.subplots(1, 2, width_ratios=(1, 1.05))
    strips = stage_strips(8)
    for index, strip in enumerate(strips):
        color = BLOCK_COLORS[index % len(BLOCK_COLORS)]
        width = strip.width * strip.count
        _draw_rectangle(map_axes, 0, strip.columns.start, 56, width, fc=color, ec="white", lw=3)
    strip = next(strip for strip in strips if strip.count > 1)
    top, block = strip.chunks[3].rows.start, strip.blocks[0]
    for index, style in (strip.count - 1, "--"), (0, "-"):
        left = block.columns[0].start + index * 7
        _draw_rectangle(map_axes, top - 7, left, 21, block.shape[1], fill=False, ec=DARK, ls=style, lw=2)
    _draw_rectangle(map_axes, top, strip.columns.start, 7, 7 * strip.count, fill=False, ec=RED, lw=3)
    _draw_chunks(map_axes, (56, 56), 7)
    map_axes.set_title("56 × 56 tokens, w = 7, 3 heads × 32, 8 images")
    map_axes.set_xlabel(f"{len(strips)} strips")
    _draw_strip_layout(layout_axes)
    _add_legend(
        figure,
        Patch(fill=False, ec=RED, lw=2.5, label="chunks computed at a time"),
        Patch(fill=False, ec=DARK, lw=1.5, label="keys of the first"),
        Patch(fill=False, ec=DARK, lw=1.5, ls="--", label="keys of the last"),
        Patch(fc=ORANGE, ec=DARK, label="global keys"),
    )
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "masks": partial(
        draw_masks, (15, 15), 3, {"in the middle": (7, 7), "at a border": (7, 1), "in a corner": (0, 14)}, 9.4
    ),
    "neighbors": draw_neighbors,
    "odd_map": partial(
        draw_masks,
        (13, 10),  # not divisible by 4
        4,
        {"first token": (0, 0), "in the middle": (6, 5), "last token": (12, 9)},
        11.4,
        has_padding=True,
    ),
    "kernel": draw_kernel,
    "strips": draw_strips,
}


def visible_keys(spec: LocalAttentionSpec, query: Position, neighbor: int | None = None) -> Tensor:
    """Return (P, Q), True where the definition lets the query see a position of the padded map."""
    height, width = spec.size
    empty = torch.empty(1, 1, height * width, 0)
    index = None if neighbor is None else torch.tensor(neighbor)
    inputs = Inputs(empty, empty, empty, empty, empty, neighbor=index)
    bias = dense_bias(inputs, spec)[0, query[0] * width + query[1]]  # (P·Q,)
    return bias.isfinite().view(-1, -(-width // spec.window) * spec.window)


def draw_map(axes: Axes, spec: LocalAttentionSpec, query: Position, neighbor: int | None = None) -> Tensor:
    """Draw the padded map for a query; return (P, Q), True where it is visible."""
    visible = visible_keys(spec, query, neighbor)
    (height, width), side = spec.size, spec.window
    cells = torch.where(visible, Cell.VISIBLE, Cell.HIDDEN)
    chunk = tuple(slice(q // side * side, q // side * side + side) for q in query)
    cells[chunk] = torch.where(visible[chunk], Cell.SAME_CHUNK, Cell.HIDDEN)
    cells[query] = Cell.QUERY
    rows, columns = cells.shape
    for padding in ((slice(height, None),), (slice(height), slice(width, None))):
        cells[padding] = torch.where(visible[padding], Cell.VISIBLE_PADDING, Cell.PADDING)
    _draw_cells(axes, cells, [LEGEND[cell][0] for cell in Cell])
    for row, column, end_row, end_column in ((height, 0, rows, columns), (0, width, height, columns)):
        if end_row > row and end_column > column:
            style = {"fill": False, "ec": LIGHT, "hatch": HATCH, "lw": 0}
            _draw_rectangle(axes, row, column, end_row - row, end_column - column, **style)
    _draw_chunks(axes, cells.shape, side)
    _draw_rectangle(axes, 0, 0, height, width, fill=False, ec="black", lw=2, clip_on=False)
    return visible


def query_blocks(side: int) -> Tensor:
    """Return (w, w), the program that computes each query of a chunk; head width 32, bfloat16."""
    from vil.attention.local import fused  # needs Triton

    block = fused._blocks(side**2, 9 * side**2, 32, torch.bfloat16)[0]
    return (torch.arange(side**2) // block).view(side, side)


def key_blocks(
    spec: LocalAttentionSpec, chunk: Position, neighbor: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the block in which a program of a chunk processes each key; G = 1, head width 32, bfloat16.

    Returns:
        (3w, 3w) the index of the block, −1 for no block; and (3w, 3w), True on the map.
    """
    from vil.attention.local import fused, kernels  # need Triton

    side = spec.window
    count = len(spec.chunk_offsets(neighbor)) * side**2
    keys = torch.arange(count)
    step = (0, 0) if neighbor is None else spec.chunk_offsets(neighbor)[1]
    row, column = kernels._chunk_position.fn(keys, *step, side, spec.neighbors)
    blocks = torch.full((3 * side, 3 * side), -1)
    blocks[row, column] = (1 + keys) // fused._blocks(side**2, count, 32, torch.bfloat16)[1]
    is_inside = []
    for length, index in zip(spec.size, chunk):
        positions = (index - 1) * side + torch.arange(3 * side)
        is_inside.append(kernels._on_map.fn(positions, length, -(-length // side), side, False)[1])
    return blocks, is_inside[0][:, None] & is_inside[1]


def stage_strips(batch_size: int) -> tuple[Strip, ...]:
    """Return the strips of stage 1 of ViL-Small: 56 × 56 tokens, 3 heads × 32, w = 7, G = 1."""
    tokens = torch.empty(batch_size, 3, 56**2, 32, device="meta")
    global_tokens = torch.empty(batch_size, 3, 1, 32, device="meta")
    inputs = Inputs(tokens, tokens, tokens, global_tokens, global_tokens)
    return chunked._ChunkedAttention(inputs, LocalAttentionSpec((56, 56), 7), None).strips


def _draw_blocks(axes: Axes, blocks: Tensor, numbered: Tensor, side: int) -> None:
    """Draw positions in the colors of their blocks, gray for −1, and the numbers of `numbered` from 1."""
    _draw_cells(
        axes,
        torch.where(blocks < 0, 0, blocks % len(BLOCK_COLORS) + 1),
        [LEGEND[Cell.HIDDEN][0], *BLOCK_COLORS],
    )
    _draw_chunks(axes, blocks.shape, side)
    for block in numbered[numbered >= 0].unique().tolist():
        cells = (numbered == block).nonzero()
        row, column = cells[(cells - cells.float().mean(dim=0)).square().sum(dim=1).argmin()].tolist()
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 12, "weight": "bold"}
        axes.text(column + 0.5, row + 0.5, str(block + 1), **style)


def _draw_strip_layout(axes: Axes) -> None:
    """Draw the keys of a strip of a 15 × 15 map (w = 3, one global key), and those of each chunk."""
    spec = LocalAttentionSpec((15, 15), 3)
    strip = strip_layout(spec, spec.chunk_offsets(None), 1, columns=1, keys=10**6)[1]
    width = strip.blocks[0].shape[1]
    tops = [0]  # row of the drawing for each key: nine keys in a row, a global one in a separate row
    for index in range(strip.length):
        is_row_end = index in strip.global_keys or any(
            b.keys.start <= index < b.keys.stop and (index - b.offset) % width == width - 1
            for b in strip.blocks
        )
        tops.append(tops[-1] + is_row_end)
    for block in strip.blocks:
        for row in range(block.rows.length):
            color = BLOCK_COLORS[(block.rows.start + row) // 3 % len(BLOCK_COLORS)]
            for column in range(width):
                _draw_rectangle(axes, tops[block.offset] + row, column, fc=color, ec="white", lw=0.5)
    for index in strip.global_keys:
        _draw_rectangle(axes, tops[index], 0, fc=ORANGE, ec=DARK)
    for index, chunk in enumerate(strip.chunks):
        top, stop, left = tops[chunk.keys.start], tops[chunk.keys.stop], width + 1 + 2 * index
        color = BLOCK_COLORS[index % len(BLOCK_COLORS)]
        _draw_rectangle(axes, top, left, stop - top, fc=color, ec=DARK)
        _draw_rectangle(axes, tops[chunk.keys.start + chunk.global_key], left, fc=ORANGE, ec=DARK)
        axes.text(left + 0.5, top - 0.5, str(index + 1), ha="center", va="center", fontsize=10)
    axes.text(width / 2, -0.5, "the keys, row by row", ha="center", va="center", fontsize=10)
    _set_frame(axes, (tops[-1], width + 1 + 2 * len(strip.chunks)))
    axes.set_ylim(tops[-1], -1)
    axes.set_title("15 × 15 tokens, w = 3: a strip, and the visible keys of its chunks")


def _new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def _draw_cells(axes: Axes, cells: Tensor, colors: Sequence[str]) -> None:
    style: dict[str, Any] = {"vmin": -0.5, "vmax": len(colors) - 0.5, "ec": "white", "lw": 0.5}
    axes.pcolormesh(cells.numpy(), cmap=ListedColormap(colors), **style)


def _draw_chunks(axes: Axes, shape: Sequence[int], side: int) -> None:
    """Draw the edges of the chunks."""
    height, width = shape
    axes.hlines(range(0, height + 1, side), 0, width, colors=DARK, lw=1)
    axes.vlines(range(0, width + 1, side), 0, height, colors=DARK, lw=1)
    _set_frame(axes, shape)


def _set_frame(axes: Axes, shape: Sequence[int]) -> None:
    """Draw rows from the top, square cells, no ticks."""
    height, width = shape
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def _draw_rectangle(
    axes: Axes, row: float, column: float, rows: int = 1, columns: int = 1, **style: Any
) -> None:
    axes.add_patch(Rectangle((column, row), columns, rows, **style))


def _add_cell_legend(figure: Figure, has_padding: bool = False) -> None:
    padding = (Cell.PADDING, Cell.VISIBLE_PADDING)
    patches = [
        Patch(fc=color, ec=LIGHT, hatch=HATCH if cell in padding else None, label=label)
        for cell, (color, label) in LEGEND.items()
        if has_padding or cell not in padding
    ]
    _add_legend(figure, *patches, columns=3 if has_padding else 4)


def _add_legend(figure: Figure, *patches: Patch, columns: int = 4) -> None:
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False)


def main(argv: Sequence[str]) -> None:
    """Draw all figures and write their files."""
    parser = ToolParser(prog="python -m tools.dev.draw_attention", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "docs" / "figures", help="default: docs/figures"
    )
    folder = parser.parse_args(argv).folder
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        write_output(path, as_png(draw()), "--folder")
        print(path)


if __name__ == "__main__":
    command_line.main(main)
