"""Sheets of attention: weights and windows in their place on the image, rollout, bias tables."""

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
from torch import Tensor

from vil.attention import Attention
from vil.attention.vision_longformer import VisionLongformerAttention
from vil.attention.weights import AttentionWeights
from vil.models.attention_maps import AttentionMap

PANEL = 1.75
"""Side of a panel, in inches."""
HEAT, SIGNED = "inferno", "RdBu_r"
OUTLINE, QUERY = "#ffffff", "#22d3ee"
SMALL = 8
MOST_COLUMNS = 9
"""Panels in a line; the heads of a block go on in the next."""


@dataclass(frozen=True)
class Shown:
    """What panels are drawn on.

    Attributes:
        picture: (height, width, 3) in 0..1, the image as the model sees it.
        title: what the model is, for the head of a sheet.
    """

    picture: np.ndarray
    title: str


def query_sheet(shown: Shown, blocks: Sequence[AttentionMap], number: int, pixel: tuple[int, int]) -> Figure:
    """What every head of some blocks of a stage attends to from query `number`, whose pixel is given."""
    position = blocks[0].queries[number]
    rows = [(f"block {block.block + 1}", block, block.from_queries, number) for block in blocks]
    title = f"from row {pixel[0]}, column {pixel[1]} of the image"
    return _weights_sheet(shown, rows, title, position)


def globals_sheet(shown: Shown, blocks: Sequence[AttentionMap]) -> Figure:
    """What the global tokens of some blocks of a stage look at over the whole map, per head."""
    several = blocks[0].from_globals.seen.shape[0] > 1
    rows = [
        (f"block {block.block + 1}" + (f", token {token + 1}" if several else ""), block,
         block.from_globals, token)
        for block in blocks for token in range(block.from_globals.seen.shape[0])
    ]  # fmt: skip
    return _weights_sheet(shown, rows, "from the global token" + "s" * several, None)


def rollout_sheet(shown: Shown, rollout: AttentionMap, pixels: Sequence[tuple[int, int]]) -> Figure:
    """Where the stage's blocks together bring the output of queries and global tokens from."""
    views = [
        (f"from row {pixel[0]}, column {pixel[1]}", rollout.from_queries, number, position)
        for number, (pixel, position) in enumerate(zip(pixels, rollout.queries))
    ]
    globals_ = rollout.from_globals.seen.shape[0]
    views += [(f"from global token {n + 1}", rollout.from_globals, n, None) for n in range(globals_)]
    title = f"{shown.title}\nstage {rollout.stage + 1}: attention rollout over its blocks"
    figure, (axes,) = _grid(1, 1 + len(views), title, wide=1.35)
    _draw_image(axes[0], shown, rollout, rollout.queries)
    for panel, (name, weights, number, position) in zip(axes[1:], views):
        panel.set_title(name, fontsize=9)
        _draw_weights(panel, shown, rollout, weights, number, 0, position, itself=True)
    _heat_bar(figure, axes[-1])
    return figure


def bias_sheet(title: str, stage: int, blocks: Sequence[tuple[int, Attention]]) -> Figure | None:
    """The learned relative bias tables of some blocks of a stage, per head; None where they have none."""
    tables = [(number, attention, offsets(attention)) for number, attention in blocks]
    if any(table is None for _, _, table in tables):
        return None
    heads = tables[0][1].heads
    figure, grid = _grid(len(tables), heads, f"{title}\nstage {stage + 1}: relative bias by offset", wide=1.2)
    for row, (number, attention, table) in zip(grid, tables):
        assert table is not None
        largest = table.abs().max().item() or 1.0
        down, right = table.shape[1] // 2, table.shape[2] // 2
        extent = (-right - 0.5, right + 0.5, down + 0.5, -down - 0.5)
        for head, axes in enumerate(row):
            mesh = axes.imshow(table[head].numpy(), cmap=SIGNED, vmin=-largest, vmax=largest, extent=extent)
            axes.axhline(0, color="black", lw=0.4)
            axes.axvline(0, color="black", lw=0.4)
            axes.tick_params(labelsize=7)
            axes.set_xlabel(_global_biases(attention, head), fontsize=SMALL)
            if row is grid[0]:
                axes.set_title(f"head {head + 1}", fontsize=9)
        row[0].set_ylabel(f"block {number + 1}\nkey row − query row", fontsize=SMALL)
        bar = figure.colorbar(mesh, ax=row[-1], fraction=0.05, pad=0.03)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel("key column − query column; below each table the biases that go with global tokens",
                     fontsize=SMALL)  # fmt: skip
    return figure


def offsets(attention: Attention) -> Tensor | None:
    """The biases of an attention by the key's offset from the query, (h, 2r+1, 2c+1), 0 in the middle.

    Rows come first. Of the exact mask only the offsets that it shows, up to w. None where position is
    absolute.
    """
    table = getattr(attention, "bias_table", None)
    if table is None:
        return None
    table = table.detach().float().cpu().flip(1, 2)  # stored by query − key
    if isinstance(attention, VisionLongformerAttention) and attention.mask == "exact":
        hidden = attention.window - 1  # of offsets up to 2w − 1
        table = table[:, hidden : table.shape[1] - hidden, hidden : table.shape[2] - hidden]
    return table


def outline(seen: Tensor) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges between positions that are seen and those that are not, (H, W) bool, as ((x, y), (x, y))."""
    framed = torch.nn.functional.pad(seen.to(torch.int8), (1, 1, 1, 1))
    vertical = framed[1:-1, 1:] != framed[1:-1, :-1]  # (H, W+1)
    horizontal = framed[1:, 1:-1] != framed[:-1, 1:-1]  # (H+1, W)
    edges = [((x, y), (x, y + 1)) for y, x in vertical.nonzero().tolist()]
    return edges + [((x, y), (x + 1, y)) for y, x in horizontal.nonzero().tolist()]


def _weights_sheet(
    shown: Shown,
    rows: Sequence[tuple[str, AttentionMap, AttentionWeights, int]],
    title: str,
    query: tuple[int, int] | None,
) -> Figure:
    """One row of panels per (label, block, its weights, number of the query): image, heads, their mean."""
    stage, heads = rows[0][1].stage, rows[0][2].to_map.shape[1]
    lines = -(-(heads + 2) // MOST_COLUMNS)  # of each row
    columns = -(-(heads + 2) // lines)
    figure, grid = _grid(len(rows) * lines, columns, f"{shown.title}\nstage {stage + 1}, {title}")
    for number_of_row, (label, block, weights, number) in enumerate(rows):
        panels = [axes for line in grid[number_of_row * lines :][:lines] for axes in line]
        _draw_image(panels[0], shown, block, [] if query is None else [query])
        panels[0].set_ylabel(label, fontsize=9)
        for head, axes in zip([*range(heads), None], panels[1:]):
            _draw_weights(axes, shown, block, weights, number, head, query)
            axes.set_title("mean of heads" if head is None else f"head {head + 1}", fontsize=9)
        for axes in panels[heads + 2 :]:
            axes.set_axis_off()
    _heat_bar(figure, grid[0][-1])
    return figure


def _draw_image(axes: Axes, shown: Shown, block: AttentionMap, queries: Sequence[tuple[int, int]]) -> None:
    height, width = shown.picture.shape[:2]
    axes.imshow(shown.picture, extent=(0, width, height, 0), interpolation="nearest")
    _mark(axes, block, queries)
    _frame(axes, shown)
    axes.set_title("image", fontsize=9)
    rows, columns = block.size
    axes.set_xlabel(f"map of {rows} × {columns}", fontsize=SMALL)


def _draw_weights(
    axes: Axes,
    shown: Shown,
    block: AttentionMap,
    weights: AttentionWeights,
    number: int,
    head: int | None,
    query: tuple[int, int] | None,
    itself: bool = False,
) -> None:
    """One panel: weights over what is seen, outlined, and below it what they add up to.

    With `itself`, the query's own position, which a rollout leaves half of the sum and more, has no colour,
    and what it has is written.
    """
    of_query = [
        part[0, :, number].float().cpu() for part in (weights.to_map, weights.to_globals, weights.to_rest)
    ]
    local, globals_, rest = (part.mean(dim=0) if head is None else part[head] for part in of_query)
    height, width = shown.picture.shape[:2]
    grey = 0.25 + 0.5 * shown.picture.mean(axis=2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), interpolation="nearest")
    seen, side = weights.seen[number].cpu(), block.patch * weights.cell
    own, hidden = None, ~seen
    if itself and query is not None:
        own, local = local[query], local.clone()
        local[query] = 0.0
        hidden[query] = True
    largest = local.max().item()
    heat = np.ma.masked_array(local.numpy() / (largest or 1.0), hidden.numpy())
    extent = (0, seen.shape[1] * side, seen.shape[0] * side, 0)
    axes.imshow(heat, cmap=HEAT, vmin=0, vmax=1, alpha=0.8, extent=extent, interpolation="nearest")
    lines = [[(x * side, y * side) for x, y in edge] for edge in outline(seen)]
    axes.add_collection(LineCollection(lines, colors=OUTLINE, lw=1.2, capstyle="projecting", clip_on=False))
    _mark(axes, block, [] if query is None else [query])
    _frame(axes, shown)
    axes.set_xlabel("\n".join(_sums(local, globals_, rest, own)), fontsize=SMALL)


def _sums(local: Tensor, globals_: Tensor, rest: Tensor, own: Tensor | None) -> Iterator[str]:
    yield f"map {_percent(local.sum())}, most {_percent(local.max())}"
    shares = []
    if own is not None:
        shares.append(f"itself {_percent(own)}")
    if len(globals_):
        tokens = f" ({', '.join(map(_percent, globals_))})" if 1 < len(globals_) <= 4 else ""
        shares.append(f"global {_percent(globals_.sum())}{tokens}")
    if len(rest) and rest.sum() > 0:
        shares.append(f"padding {_percent(rest.sum())}")
    yield ", ".join(shares)


def _percent(share: Tensor) -> str:
    """A share in percent, to two or three digits."""
    value = 100 * share.item()
    return f"{value:.3g} %" if value >= 9.95 else f"{value:.2g} %"


def _global_biases(attention: Attention, head: int) -> str:
    biases = getattr(attention, "global_bias", None)
    if biases is None:
        return ""
    parts = (("to global", biases.from_local[head]), ("from global", biases.to_local[head]))
    lines = (f"{name} {', '.join(f'{v:+.2f}' for v in values.tolist())}" for name, values in parts)
    return "\n".join(lines).replace("-", "−")


def _mark(axes: Axes, block: AttentionMap, queries: Sequence[tuple[int, int]]) -> None:
    for row, column in queries:
        corner = (column * block.patch, row * block.patch)
        axes.add_patch(
            Rectangle(corner, block.patch, block.patch, fill=False, ec=QUERY, lw=1.5, clip_on=False)
        )


def _frame(axes: Axes, shown: Shown) -> None:
    height, width = shown.picture.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)


def _grid(rows: int, columns: int, title: str, wide: float = 1.0) -> tuple[Figure, list[list[Axes]]]:
    """A figure with its title and rows of panels."""
    figure = Figure(
        figsize=(max(columns, 3) * PANEL * wide, rows * (PANEL * wide + 0.4) + 0.55),
        layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05),
    )
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _heat_bar(figure: Figure, axes: Axes) -> None:
    """What the colours say, beside a panel."""
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), HEAT), ax=axes, fraction=0.05, pad=0.03)
    bar.set_ticks([0, 1], labels=["0", "most"], fontsize=7)
