"""Figures of attention: weights and windows on the image, rollout, relative bias tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from vil.attention import Attention
from vil.attention.maps import AttentionWeights
from vil.attention.vision_longformer import VisionLongformerAttention
from vil.models.attention_maps import AttentionMap

PANEL_INCHES = 1.75
SEQUENTIAL_COLORS, DIVERGING_COLORS = "inferno", "RdBu_r"
WINDOW_COLOR, QUERY_COLOR = "#ffffff", "#22d3ee"
LABEL_SIZE, TITLE_SIZE = 8, 9
MAX_COLUMNS = 9
"""Panels per line; further heads of a block are on the next line."""

Position = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Canvas:
    """Background of all panels: the model input (H, W, 3) in 0..1, and the heading of the figures."""

    image: np.ndarray
    title: str


def query_figure(canvas: Canvas, blocks: Sequence[AttentionMap], index: int, pixel: Position) -> Figure:
    """Draw the attention of every head of some blocks of a stage, from query `index` at `pixel`."""
    rows = [(_block_name(block), block, block.from_queries, index) for block in blocks]
    title = f"from row {pixel[0]}, column {pixel[1]} of the image"
    return _heads_figure(canvas, rows, title, blocks[0].queries[index])


def global_token_figure(canvas: Canvas, blocks: Sequence[AttentionMap]) -> Figure:
    """Draw the attention of every head of some blocks of a stage, from each global token."""
    tokens, plural = range(len(blocks[0].from_globals.seen)), len(blocks[0].from_globals.seen) > 1
    rows = [
        (_block_name(block) + f", token {token + 1}" * plural, block, block.from_globals, token)
        for block in blocks
        for token in tokens
    ]
    return _heads_figure(canvas, rows, "from the global token" + "s" * plural, None)


def _block_name(block: AttentionMap) -> str:
    assert block.block is not None
    return f"block {block.block + 1}"


def rollout_figure(canvas: Canvas, rollout: AttentionMap, pixels: Sequence[Position]) -> Figure:
    """Draw the rollout over a stage, from each query and each global token."""
    panels: list[tuple[str, AttentionWeights, int, Position | None]] = [
        (f"from row {pixel[0]}, column {pixel[1]}", rollout.from_queries, index, position)
        for index, (pixel, position) in enumerate(zip(pixels, rollout.queries))
    ]
    panels += [
        (f"from global token {index + 1}", rollout.from_globals, index, None)
        for index in range(len(rollout.from_globals.seen))
    ]
    title = f"{canvas.title}\nstage {rollout.stage + 1}: attention rollout over its blocks"
    figure, (axes,) = _panel_grid(1, 1 + len(panels), title, scale=1.35)
    _draw_image(axes[0], canvas, rollout, rollout.queries)
    for panel, (name, weights, index, position) in zip(axes[1:], panels):
        panel.set_title(name, fontsize=TITLE_SIZE)
        _draw_weights(panel, canvas, rollout, weights, index, 0, position, hide_query=True)
    _add_colorbar(figure, axes[-1])
    return figure


def bias_figure(title: str, stage: int, blocks: Sequence[tuple[int, Attention]]) -> Figure | None:
    """Draw the relative bias tables of some blocks of a stage per head; return None if they have none."""
    tables = [(index, attention, bias_by_offset(attention)) for index, attention in blocks]
    if any(table is None for _, _, table in tables):
        return None
    title = f"{title}\nstage {stage + 1}: relative bias by offset"
    figure, grid = _panel_grid(len(tables), tables[0][1].heads, title, scale=1.2)
    for row, (index, attention, table) in zip(grid, tables):
        assert table is not None
        limit = table.abs().max().item() or 1.0
        down, right = table.shape[1] // 2, table.shape[2] // 2
        extent = (-right - 0.5, right + 0.5, down + 0.5, -down - 0.5)
        for head, axes in enumerate(row):
            biases = table[head].numpy()
            mesh = axes.imshow(biases, DIVERGING_COLORS, vmin=-limit, vmax=limit, extent=extent)
            axes.axhline(0, color="black", lw=0.4)
            axes.axvline(0, color="black", lw=0.4)
            axes.tick_params(labelsize=7)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator("auto", integer=True))
            axes.set_xlabel(_global_bias_label(attention, head), fontsize=LABEL_SIZE)
            if row is grid[0]:
                axes.set_title(f"head {head + 1}", fontsize=TITLE_SIZE)
        row[0].set_ylabel(f"block {index + 1}\nkey row − query row", fontsize=LABEL_SIZE)
        figure.colorbar(mesh, ax=row[-1], fraction=0.05, pad=0.03).ax.tick_params(labelsize=7)
    has_global_biases = any(_global_bias_label(attention, 0) for _, attention, _ in tables)
    label = "key column − query column"
    label += "; below each table the biases of global tokens" if has_global_biases else ""
    figure.supxlabel(label, fontsize=LABEL_SIZE)
    return figure


def bias_by_offset(attention: Attention) -> Tensor | None:
    """Return the biases by key − query, (h, 2r+1, 2c+1) with offset 0 in the center, rows first.

    With the exact mask, only visible offsets of at most w are included. Return None for absolute position.
    """
    table = getattr(attention, "bias_table", None)
    if table is None:
        return None
    table = table.detach().float().cpu().flip(1, 2)  # stored by query − key
    if isinstance(attention, VisionLongformerAttention) and attention.mask == "exact":
        hidden = attention.window - 1  # the table reaches offsets of 2w − 1
        table = table[:, hidden : table.shape[1] - hidden, hidden : table.shape[2] - hidden]
    return table


def outline(visible: Tensor) -> list[tuple[Position, Position]]:
    """Return the edges between visible and hidden positions, (H, W) bool, as pairs of points (x, y)."""
    padded = torch.nn.functional.pad(visible.to(torch.int8), (1, 1, 1, 1))
    vertical = padded[1:-1, 1:] != padded[1:-1, :-1]  # (H, W+1)
    horizontal = padded[1:, 1:-1] != padded[:-1, 1:-1]  # (H+1, W)
    edges = [((x, y), (x, y + 1)) for y, x in vertical.nonzero().tolist()]
    return edges + [((x, y), (x + 1, y)) for y, x in horizontal.nonzero().tolist()]


def _heads_figure(
    canvas: Canvas,
    rows: Sequence[tuple[str, AttentionMap, AttentionWeights, int]],
    title: str,
    query: Position | None,
) -> Figure:
    """Draw a row of panels per (label, block, weights, index of the query): image, heads, mean of heads."""
    stage, heads = rows[0][1].stage, rows[0][2].to_map.shape[1]
    lines = -(-(heads + 2) // MAX_COLUMNS)  # lines per row
    columns = -(-(heads + 2) // lines)
    title = f"{canvas.title}\nstage {stage + 1}, {title}"
    figure, grid = _panel_grid(len(rows) * lines, columns, title)
    for row, (label, block, weights, index) in enumerate(rows):
        panels = [axes for line in grid[row * lines :][:lines] for axes in line]
        _draw_image(panels[0], canvas, block, [] if query is None else [query])
        panels[0].set_ylabel(label, fontsize=TITLE_SIZE)
        for head, axes in zip([*range(heads), None], panels[1:]):
            _draw_weights(axes, canvas, block, weights, index, head, query)
            axes.set_title("mean of heads" if head is None else f"head {head + 1}", fontsize=TITLE_SIZE)
        for axes in panels[heads + 2 :]:
            axes.set_axis_off()
    _add_colorbar(figure, grid[0][-1])
    return figure


def _draw_image(axes: Axes, canvas: Canvas, block: AttentionMap, queries: Sequence[Position]) -> None:
    height, width = canvas.image.shape[:2]
    axes.imshow(canvas.image, extent=(0, width, height, 0), interpolation="nearest")
    _finish_panel(axes, canvas, block, queries)
    axes.set_title("image", fontsize=TITLE_SIZE)
    axes.set_xlabel(f"map of {block.size[0]} × {block.size[1]}", fontsize=LABEL_SIZE)


def _draw_weights(
    axes: Axes,
    canvas: Canvas,
    block: AttentionMap,
    weights: AttentionWeights,
    index: int,
    head: int | None,
    query: Position | None,
    hide_query: bool = False,
) -> None:
    """Draw the weights of a head, or the mean of all heads, with the outline of the visible positions.

    With `hide_query`, the position of the query, which has at least half of a rollout's weight, is not
    colored; its weight is in the label.
    """
    all_weights = (weights.to_map, weights.to_globals, weights.to_rest)
    parts = [part[0, :, index].float().cpu() for part in all_weights]
    to_map, to_globals, to_rest = (part.mean(dim=0) if head is None else part[head] for part in parts)
    height, width = canvas.image.shape[:2]
    gray = 0.25 + 0.5 * canvas.image.mean(axis=2)
    axes.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")
    visible, side = weights.seen[index].cpu(), block.patch * weights.cell
    hidden, query_weight = ~visible, None
    if hide_query and query is not None:
        query_weight, to_map = to_map[query], to_map.clone()
        to_map[query] = 0.0
        hidden[query] = True
    relative = np.ma.masked_array(to_map.numpy() / (to_map.max().item() or 1.0), hidden.numpy())
    extent = (0, visible.shape[1] * side, visible.shape[0] * side, 0)
    axes.imshow(
        relative, SEQUENTIAL_COLORS, vmin=0, vmax=1, alpha=0.8, extent=extent, interpolation="nearest"
    )
    lines = [[(x * side, y * side) for x, y in edge] for edge in outline(visible)]
    axes.add_collection(
        LineCollection(lines, colors=WINDOW_COLOR, lw=1.2, capstyle="projecting", clip_on=False)
    )
    _finish_panel(axes, canvas, block, [] if query is None else [query])
    label = "\n".join(_weight_labels(to_map, to_globals, to_rest, query_weight))
    axes.set_xlabel(label, fontsize=LABEL_SIZE)


def _weight_labels(
    to_map: Tensor, to_globals: Tensor, to_rest: Tensor, query_weight: Tensor | None
) -> Iterator[str]:
    """Yield lines with the total weights, which sum up to 100 %, and the largest single weight."""
    yield f"map {_percent(to_map.sum())}, max {_percent(to_map.max())}"
    totals = [] if query_weight is None else [f"query {_percent(query_weight)}"]
    if len(to_globals):
        tokens = f" ({', '.join(map(_percent, to_globals))})" if 1 < len(to_globals) <= 4 else ""
        totals.append(f"global {_percent(to_globals.sum())}{tokens}")
    if len(to_rest) and to_rest.sum() > 0:
        totals.append(f"padding {_percent(to_rest.sum())}")
    yield ", ".join(totals)


def _percent(weight: Tensor) -> str:
    """Return a weight in percent with two or three digits."""
    value = 100 * weight.item()
    return f"{value:.3g} %" if value >= 9.95 else f"{value:.2g} %"


def _global_bias_label(attention: Attention, head: int) -> str:
    biases = getattr(attention, "global_bias", None)
    if biases is None:
        return ""
    parts = {"to global": biases.from_local[head], "from global": biases.to_local[head]}
    lines = (f"{name} {', '.join(f'{v:+.2f}' for v in values.tolist())}" for name, values in parts.items())
    return "\n".join(lines).replace("-", "−")


def _finish_panel(axes: Axes, canvas: Canvas, block: AttentionMap, queries: Sequence[Position]) -> None:
    """Outline the queries and hide the axes."""
    for row, column in queries:
        corner, side = (column * block.patch, row * block.patch), block.patch
        axes.add_patch(Rectangle(corner, side, side, fill=False, ec=QUERY_COLOR, lw=1.5, clip_on=False))
    height, width = canvas.image.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def _panel_grid(rows: int, columns: int, title: str, scale: float = 1.0) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a title, and its panels by row."""
    figure = Figure(
        figsize=(max(columns, 3) * PANEL_INCHES * scale, rows * (PANEL_INCHES * scale + 0.4) + 0.55),
        layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05),
    )
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _add_colorbar(figure: Figure, axes: Axes) -> None:
    scale = ScalarMappable(Normalize(0, 1), SEQUENTIAL_COLORS)
    bar = figure.colorbar(scale, ax=axes, fraction=0.05, pad=0.03)
    bar.set_ticks([0, 1], labels=["0", "max"], fontsize=7)
