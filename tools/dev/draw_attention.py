"""Draw the figures of visible keys of docs/attention.md from the code of the local attention.

    python -m tools.dev.draw_attention                      into docs/figures/, a few seconds
    python -m tools.dev.draw_attention --folder FOLDER      into another folder

The visible keys are read from the definition, vil/attention/local/dense.py: its bias is finite there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from tools.png import as_png
from vil import command_line
from vil.attention.local.dense import dense_bias
from vil.attention.local.geometry import NEIGHBOR_OFFSETS, Inputs, LocalAttentionSpec, Mask
from vil.command_line import ToolParser
from vil.runtime.console import print_text
from vil.runtime.files import write_output

ROOT = Path(__file__).resolve().parents[2]
Position = tuple[int, int]
"""Row and column."""

MASKS: tuple[Mask, ...] = ("chunk", "exact", "cyclic")
DARK, LIGHT, HATCH = "#343a40", "#adb5bd", "////"


class Cell(IntEnum):
    """State of a position of the padded map for a query."""

    HIDDEN = 0
    VISIBLE = 1
    SAME_CHUNK = 2
    QUERY = 3
    PADDING = 4
    VISIBLE_PADDING = 5


LEGEND = {
    Cell.QUERY: ("#d7263d", "query"),
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
    _add_legend(figure, has_padding)
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
    _add_legend(figure)
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
    colors = ListedColormap([LEGEND[cell][0] for cell in Cell])
    axes.pcolormesh(cells.numpy(), cmap=colors, vmin=-0.5, vmax=len(Cell) - 0.5, ec="white", lw=0.5)
    for row, column, end_row, end_column in ((height, 0, rows, columns), (0, width, height, columns)):
        if end_row > row and end_column > column:
            corner, sides = (column, row), (end_column - column, end_row - row)
            axes.add_patch(Rectangle(corner, *sides, fill=False, ec=LIGHT, hatch=HATCH, lw=0))
    axes.hlines(range(0, rows + 1, side), 0, columns, colors=DARK, lw=1)
    axes.vlines(range(0, columns + 1, side), 0, rows, colors=DARK, lw=1)
    axes.add_patch(Rectangle((0, 0), width, height, fill=False, ec="black", lw=2, clip_on=False))
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    return visible


def _new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def _add_legend(figure: Figure, has_padding: bool = False) -> None:
    padding = (Cell.PADDING, Cell.VISIBLE_PADDING)
    patches = [
        Patch(fc=color, ec=LIGHT, hatch=HATCH if cell in padding else None, label=label)
        for cell, (color, label) in LEGEND.items()
        if has_padding or cell not in padding
    ]
    columns = 3 if has_padding else 4
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False)


def main(argv: Sequence[str]) -> None:
    """Draw all figures and write their files."""
    parser = ToolParser(prog="python -m tools.dev.draw_attention", description=__doc__.splitlines()[0])
    folder = ROOT / "docs" / "figures"
    parser.add_argument("--folder", type=Path, default=folder, help="default: docs/figures")
    folder = parser.parse_args(argv).folder
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        write_output(path, as_png(draw()), "--folder")
        print_text(path)


if __name__ == "__main__":
    command_line.main(main)
