"""The charts of the report, as Plotly figures without colours, which tools/reporting/page.js adds.

Each trace says in its `meta` what it belongs to, a run by its number or a group of the paper's models, so
that the page can colour it for a light or a dark screen, hide it, and count its steps otherwise. Everything
in a figure may come from a user's file: `plain_text` keeps it from being read as markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tools.paper_tables import read_paper
from tools.reporting.mistakes import Evaluated
from tools.reporting.runs import Run, number

MOST_POINTS = 1000
"""Points of a curve; one with more is drawn by the means of equal stretches."""
MOST_CLASSES = 40
"""Classes of a chart of classes; of more, the least accurate ones are shown."""
MOST_CONFUSED = 30
"""Rows of a confusion matrix; of more classes, those that are confused most are shown."""
NUMBERED = 20
"""Rows up to which the counts of a confusion matrix are written into it."""

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """A figure of the page.

    Attributes:
        key: the id of its element.
        title: its heading.
        caption: what its signs mean; may be empty.
        figure: the figure; None where no run has the data.
        wide: takes more than its share of a row.
    """

    key: str
    title: str
    caption: str
    figure: go.Figure | None
    wide: bool = False


def plain_text(value: Any, most: int = 60) -> str:
    """A text as Plotly shows it letter by letter: its labels know some HTML."""
    text = " ".join(str(value).split())
    return html.escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


# --- Curves -------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run]) -> list[Chart]:
    """What was logged in the course of training, a chart per quantity."""
    return [
        _curve_chart("loss", "Loss", _loss(runs), "Thin: training. Thick: validation, dashed for the average "
                     "of the weights (EMA). Crosses: spikes.", wide=True),
        _curve_chart("top1", "Top-1, %", _top1(runs), "On the validation images. Dashed: average of the "
                     "weights (EMA). Star: the best.", wide=True),
        _of_training(runs, "lr", "Learning rate"),
        _of_training(runs, "grad_norm", "Gradient norm", spread=True),
        _of_training(runs, "images_per_second", "Images per second"),
        _curve_chart("data-wait", "Waiting for data, % of a step", _data_wait(runs)),
        _of_training(runs, "skipped_steps", "Skipped steps, in total", shape="hv"),
    ]  # fmt: skip


def thin(points: Points, most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Steps and values; of many, the means of equal numbers of neighbours, the last ones maybe fewer."""
    size = -(-len(points) // most) or 1
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    means = [[sum(column) / len(stretch) for column in zip(*stretch)] for stretch in stretches]
    return [_short(step) for step, _ in means], [_short(value) for _, value in means]


def _short(value: float) -> float:
    """Six significant digits, which no screen shows more of; whole numbers stay what they are."""
    if not math.isfinite(value):
        return value
    return int(value) if value == int(value) else float(f"{value:.6g}")


def _line(run: int, runs: Sequence[Run], points: Points, what: str, **style: Any) -> go.Scatter:
    """A curve of a run; `what` is its name in hover texts."""
    steps, values = thin(points)
    style = {"mode": "lines", **style}
    if len(steps) == 1 and style["mode"] == "lines":
        style["mode"] = "markers"  # a line through one point is invisible
    return go.Scatter(
        x=steps,
        y=values,
        name=plain_text(runs[run].name),
        meta={"run": run, "of_steps": True},
        hovertemplate=f"%{{fullData.name}}<br>{what} %{{y:.5g}} at %{{x:,.5~g}}<extra></extra>",
        **style,
    )


def _curve_chart(
    key: str, title: str, traces: Sequence[go.Scatter], caption: str = "", wide: bool = False
) -> Chart:
    if not traces:
        return Chart(key, title, caption, None, wide)
    figure = _figure(traces)
    figure.update_xaxes(title_text="steps", rangemode="tozero")
    return Chart(key, title, caption, figure, wide)


def _of_training(
    runs: Sequence[Run],
    key: str,
    title: str,
    spread: bool = False,
    shape: str = "linear",
) -> Chart:
    """A chart of one field of the training records; `spread` has a logarithmic axis where values need it."""
    found = [(run, points) for run in range(len(runs)) if (points := runs[run].points("train", key))]
    traces = [_line(run, runs, points, title, line={"width": 1.5, "shape": shape}) for run, points in found]
    chart = _curve_chart(key.replace("_", "-"), title, traces)
    values = [value for trace in traces for value in trace.y]
    if spread and values and min(values) > 0 and max(values) > 30 * min(values):
        chart.figure.update_yaxes(**_logarithmic(values))
    elif chart.figure is not None:
        chart.figure.update_yaxes(rangemode="tozero")
    return chart


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """An axis with ticks at powers of ten, or also at 2 and 5 where there would be too few."""
    return {"type": "log", "dtick": 1 if max(values) > 100 * min(values) else "D2"}


def _loss(runs: Sequence[Run]) -> list[go.Scatter]:
    traces = []
    for run, read in enumerate(runs):
        if points := read.points("train", "loss"):
            traces.append(_line(run, runs, points, "training loss", line={"width": 1.2}, opacity=0.65))
        for key, what, dash in (("loss", "validation loss", "solid"), ("ema_loss", "EMA loss", "dash")):
            if points := read.points("validation", key):
                traces.append(_evaluations(run, runs, points, what, dash))
        if points := read.points("spike", "loss"):
            marker = {"symbol": "x", "size": 10, "line": {"width": 1}}
            trace = _line(run, runs, points, "", mode="markers", marker=marker)
            steps = {step for step, _ in points}
            trace.customdata = [_samples(r) for r in read.records["spike"] if r["step"] in steps]
            trace.hovertemplate = "%{fullData.name}<br>spike to %{y:.5g} at %{x}%{customdata}<extra></extra>"
            trace.meta["spike"] = True
            traces.append(trace)
    return traces


def _samples(record: Mapping[str, Any]) -> str:
    """The images of a spike's batch, as far as a hover text has room."""
    samples = record.get("samples")
    if not isinstance(samples, list) or not samples:
        return ""
    some = ", ".join(str(sample) for sample in samples[:8])
    return f"<br>samples {plain_text(some, 80)}" + (
        f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    )


def _evaluations(run: int, runs: Sequence[Run], points: Points, what: str, dash: str) -> go.Scatter:
    mode = "lines+markers" if len(points) <= 40 else "lines"
    return _line(run, runs, points, what, mode=mode, line={"width": 2, "dash": dash}, marker={"size": 4})


def _top1(runs: Sequence[Run]) -> list[go.Scatter]:
    traces = []
    for run, read in enumerate(runs):
        points = read.points("validation", "top1"), read.points("validation", "ema_top1")
        for found, what, dash in ((points[0], "Top-1", "solid"), (points[1], "EMA Top-1", "dash")):
            if found:
                traces.append(_evaluations(run, runs, found, what, dash))
        if points[0] or points[1]:
            best = max([*points[0], *points[1]], key=lambda point: point[1])
            marker = {"symbol": "star", "size": 12}
            traces.append(_line(run, runs, [best], "best Top-1", mode="markers", marker=marker))
    return traces


def _data_wait(runs: Sequence[Run]) -> list[go.Scatter]:
    """The share of a step that the loop waited for images."""
    traces = []
    for run, read in enumerate(runs):
        whole = dict(read.points("train", "step_time"))
        waits = read.points("train", "data_wait")
        points = [(step, 100 * wait / whole[step]) for step, wait in waits if whole.get(step, 0) > 0]
        if points:
            traces.append(_line(run, runs, points, "% of a step", line={"width": 1.5}))
    return traces


def clock(run: Run) -> tuple[list[float], list[float]]:
    """Steps and hours since the first logged one, pauses included; empty without times."""
    points = sorted(run.points("train", "time") + run.points("validation", "time"))
    if not points:
        return [], []
    start = points[0][1]
    return thin([(step, (time - start) / 3600) for step, time in points], MOST_POINTS // 2)


# --- Accuracy against cost ----------------------------------------------------------------------------------

PAPER_GROUPS: dict[str, tuple[str, str]] = {  # key: name, symbol
    "flat": ("flat: DeiT, E-ViT", "triangle-up-open"),
    "full": ("multi-scale, full attention", "square-open"),
    "vil": ("multi-scale, ViL", "circle-open"),
    "other": ("multi-scale, other attentions", "diamond-open"),
    "large": ("ViL, IN-22K, 384²", "hexagon-open"),
}
"""What stands together among the paper's models, on ImageNet at 224² unless stated."""


@dataclass(frozen=True)
class PaperPoint:
    """A printed model: its accuracy in per cent, 10⁹ multiply-adds, and MB per image where printed."""

    group: str
    name: str
    top1: float
    std: float | None
    gflops: float
    memory_mb: float | None


def paper_points() -> list[PaperPoint]:
    """Every accuracy of Table 2 and of the published models that has a cost beside it."""
    paper = read_paper()
    found = []
    for row in [*paper["table2"], *paper["released_models"]]:
        name = row.get("model") or f"{row['name']}, {row['position']}"
        accuracies = row["top1"] if isinstance(row["top1"], list) else [row["top1"]]
        for top1 in accuracies:
            if top1 is not None:
                std, memory = row.get("top1_std"), row.get("memory_mb")
                found.append(
                    PaperPoint(
                        _group(row), name, float(top1), std and float(std),
                        float(row["gflops"]), memory and float(memory),
                    )
                )  # fmt: skip
    return found


def _group(row: Mapping[str, Any]) -> str:
    if row.get("kind") == "flat":
        return "flat"
    if row.get("pretrained_on", "IN-1K") != "IN-1K":
        return "large"
    return {"full": "full", "vision longformer": "vil", "longformerhand": "vil"}.get(
        row["attention"], "other"
    )


def costs(runs: Sequence[Run]) -> list[Chart]:
    """Best Top-1 against multiply-adds and against memory, with the paper's models."""
    points = paper_points()
    return [
        _cost_chart(
            "flops", "Top-1 against FLOPs", "10⁹ multiply-adds of an image", runs,
            [number(run.cost("flops")) for run in runs], 1e9, points, lambda point: point.gflops,
        ),
        _cost_chart(
            "memory", "Top-1 against training memory", "MB of an image in training", runs,
            [number(run.cost("train_memory_mb")) for run in runs], 1, points, lambda point: point.memory_mb,
        ),
    ]  # fmt: skip


def _cost_chart(
    key: str,
    title: str,
    axis: str,
    runs: Sequence[Run],
    values: Sequence[float | None],
    unit: float,
    points: Sequence[PaperPoint],
    cost: Callable[[PaperPoint], float | None],
) -> Chart:
    traces = []
    for group, (name, symbol) in PAPER_GROUPS.items():
        members = [point for point in points if point.group == group and cost(point)]
        if members:
            spread = [point.std or 0 for point in members]
            traces.append(
                go.Scatter(
                    x=[cost(point) for point in members],
                    y=[point.top1 for point in members],
                    error_y={"array": spread, "width": 2, "thickness": 1} if any(spread) else None,
                    mode="markers",
                    name=name,
                    text=[point.name for point in members],
                    marker={"symbol": symbol, "size": 8, "line": {"width": 1.5}},
                    meta={"paper": group},
                    hovertemplate=f"%{{text}} (the paper)<br>Top-1 %{{y}} %<br>%{{x}} {axis}<extra></extra>",
                )
            )
    for run, (read, value) in enumerate(zip(runs, values)):
        if value and read.best is not None:
            traces.append(
                go.Scatter(
                    x=[value / unit],
                    y=[read.best.top1],
                    mode="markers",
                    name=plain_text(read.name, 24),
                    text=[plain_text(read.data)],
                    marker={"symbol": "star", "size": 14, "line": {"width": 1}},
                    showlegend=False,
                    meta={"run": run},
                    hovertemplate="%{fullData.name}, on %{text}<br>Top-1 %{y:.2f} %<br>%{x:.4g} "
                    + axis
                    + "<extra></extra>",
                )
            )
    figure = _figure(traces)
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title_text=axis, **_logarithmic([x for trace in traces for x in trace.x]))
    figure.update_yaxes(title_text="Top-1, %")
    ours = sum("run" in trace.meta for trace in traces)
    lacking = len(runs) - ours
    caption = f"{lacking} of {len(runs)} runs: not measured yet." if lacking else ""
    return Chart(key, title, caption, figure, wide=True)


# --- Classes ------------------------------------------------------------------------------------------------


def class_accuracy(key: str, runs: Sequence[Run], found: Mapping[int, Evaluated]) -> Chart:
    """Accuracy by class of the runs (number → evaluation) that share these classes."""
    names = next(iter(found.values())).class_names
    columns = {run: evaluated.predictions.class_accuracy for run, evaluated in found.items()}
    means = []
    for place in range(len(names)):
        known = [column[place] for column in columns.values() if column[place] is not None]
        means.append(sum(known) / len(known) if known else math.inf)
    shown = [place for place in range(len(names)) if means[place] < math.inf]
    caption = ""
    if len(shown) > MOST_CLASSES:
        caption = f"The {MOST_CLASSES} classes of {len(names)} that are recognised least."
        shown = sorted(sorted(shown, key=lambda place: means[place])[:MOST_CLASSES])
    labels = [plain_text(names[place], 24) for place in shown]
    traces = [
        go.Scatter(
            x=[column[place] for place in shown],
            y=[place + 0.5 * ((rank + 0.5) / len(columns) - 0.5) for place in range(len(shown))],
            mode="markers",
            name=plain_text(runs[run].name),
            text=[plain_text(names[place]) for place in shown],
            customdata=[int(found[run].predictions.images[place]) for place in shown],
            marker={"size": 10, "opacity": 0.8},
            meta={"run": run},
            hovertemplate="%{fullData.name}<br>%{text}: %{x:.1f} % of %{customdata}<extra></extra>",
        )
        for rank, (run, column) in enumerate(columns.items())  # in rows of their own, or they hide another
    ]
    figure = _figure(traces)
    figure.update_layout(height=110 + 24 * len(shown))
    figure.update_xaxes(title_text="of the images of a class, %")
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(shown))), ticktext=labels, zeroline=False,
                        range=[len(shown) - 0.5, -0.5], automargin=True)  # fmt: skip
    return Chart(key, "Accuracy by class", caption, figure)


def confusion(key: str, evaluated: Evaluated) -> Chart:
    """The confusion matrix, of many classes the part where most goes wrong."""
    counts = evaluated.predictions.confusion[:, : len(evaluated.class_names)]
    names = evaluated.class_names
    shown = list(range(len(names)))
    caption = "Rows: the class of an image. Columns: what it was taken for. Colour: share of the row."
    if len(shown) > MOST_CONFUSED:
        wrong = counts.clone().fill_diagonal_(0)
        order = (wrong.sum(dim=0) + wrong.sum(dim=1)).argsort(descending=True, stable=True)
        shown = sorted(order[:MOST_CONFUSED].tolist())
        caption += f" The {MOST_CONFUSED} classes of {len(names)} that are confused most."
    part = counts[shown][:, shown]
    images = evaluated.predictions.images[shown].clamp(min=1)[:, None]
    share = (100 * part / images).tolist()
    labels = [plain_text(names[place], 16) for place in shown]
    places = list(range(len(shown)))
    figure = _figure(
        [
            go.Heatmap(
                z=[[round(value, 2) if value else None for value in row] for row in share],
                customdata=part.tolist(),
                text=[[str(count) if count else "" for count in row] for row in part.tolist()],
                texttemplate="%{text}" if len(shown) <= NUMBERED else None,
                x=places,
                y=places,
                zmin=0,
                zmax=100,
                xgap=1,
                ygap=1,
                hoverongaps=False,
                showscale=False,
                meta={"heatmap": True},
                hovertemplate="class %{y}, taken for %{x}<br>%{customdata} images, %{z:.1f} %<extra></extra>",
            )
        ]
    )
    ticks = {
        "tickmode": "array",
        "tickvals": places,
        "ticktext": labels,
        "automargin": True,
        "zeroline": False,
    }
    figure.update_layout(height=min(760, 200 + 24 * len(shown)))
    figure.update_xaxes(title_text="taken for", showgrid=False, **ticks)
    figure.update_yaxes(title_text="class", showgrid=False, range=[len(shown) - 0.5, -0.5], **ticks)
    return Chart(key, "Confusion matrix", caption, figure)


def confused_pairs(evaluated: Evaluated, most: int = 10) -> list[tuple[str, str, int, float]]:
    """(class, taken for, images, share of the class in per cent), the largest numbers of images first."""
    counts, names = evaluated.predictions.confusion, evaluated.class_names
    wrong = counts.clone().fill_diagonal_(0)
    columns = wrong.shape[1]
    pairs = []
    for place in wrong.flatten().argsort(descending=True, stable=True)[:most].tolist():
        row, column = divmod(place, columns)
        count = int(wrong[row, column])
        if count:
            taken = names[column] if column < len(names) else f"row {column} of the head"
            pairs.append((names[row], taken, count, 100 * count / int(evaluated.predictions.images[row])))
    return pairs


def _figure(traces: Sequence[Any]) -> go.Figure:
    return go.Figure(
        list(traces),
        {
            "template": go.layout.Template(),  # or the default one, of 7 kB, is written into every figure
            "showlegend": False,
            "hovermode": "closest",
            "margin": {"l": 48, "r": 12, "t": 8, "b": 40},
        },
    )
