"""Plotly figures of the report; page.js adds the colors of the light or dark scheme.

The `meta` of a trace holds its run (an index) or its group of the paper's models, by which page.js colors,
hides and rescales it. Texts come from files of unknown origin: `plain_text` escapes them for Plotly.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tools.paper_results import read_paper_results
from tools.report_page.evaluation import Evaluation
from tools.report_page.runs import Record, Run
from vil.evaluation.metrics import METRICS

MAX_CONFUSIONS = 10
"""Rows of the list of confusions."""
MAX_POINTS = 1000
"""Points of a curve; longer curves show means of consecutive points."""
MAX_CLASSES = 40
"""Classes of the accuracy chart; the least accurate ones are shown."""
MAX_CONFUSED_CLASSES = 30
"""Rows of a confusion matrix; the classes with the most confusions are shown."""
MAX_ANNOTATED_CLASSES = 20
"""Rows up to which the cells of a confusion matrix show their counts."""

METRIC_CAPTIONS = {
    "top1": "On the validation images. Star: best.",
    "loss": "Thin: training. Thick: validation. Crosses: loss spikes.",
}
TRAINING_CURVES = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
    "data_wait": "Waiting for data, % of a step",
    "skipped_steps": "Skipped steps, in total",
}
PAPER_GROUPS = {
    "flat": ("flat: DeiT, E-ViT", "triangle-up-open"),
    "full": ("multi-scale, full attention", "square-open"),
    "vil": ("multi-scale, ViL", "circle-open"),
    "other": ("multi-scale, other attentions", "diamond-open"),
    "large": ("ViL, IN-22K, 384²", "hexagon-open"),
}
"""Group of the paper's models → legend, symbol; on ImageNet at 224² unless noted."""

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Chart:
    """A figure, None if no run has the data, and its heading; `key` is the id of its HTML element."""

    key: str
    title: str
    figure: go.Figure | None
    caption: str = ""
    is_wide: bool = False


def plain_text(value: Any, max_length: int = 60) -> str:
    """Return a text, shortened, with the HTML escaped that Plotly's labels interpret."""
    text = " ".join(str(value).split())
    return html.escape(text if len(text) <= max_length else text[: max_length - 1] + "…", quote=False)


def average_points(points: Points, max_points: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Return steps and values; of a longer curve, means of equal numbers of consecutive points."""
    size = -(-len(points) // max_points) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    steps = [_round(sum(step for step, _ in group) / len(group)) for group in groups]
    return steps, [_round(sum(value for _, value in group) / len(group)) for group in groups]


def _round(value: float) -> float:
    """Round to six significant digits; keep integers."""
    if not math.isfinite(value):
        return value
    return int(value) if value == int(value) else float(f"{value:.6g}")


def clock(run: Run) -> tuple[list[float], list[float]]:
    """Return steps and hours since the first logged step, pauses included; empty without times."""
    points = sorted(run.points("train", "time") + run.points("validation", "time"))
    return average_points([(step, (time - points[0][1]) / 3600) for step, time in points], MAX_POINTS // 2)


# --- Curves -------------------------------------------------------------------------------------------------


def curve_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for each metric of the validation and each logged quantity of the training."""
    charts = []
    for key, metric in METRICS.items():
        if "page" not in metric.shown_in:
            continue
        curves = []
        for index, run in enumerate(runs):
            if key == "loss":
                curves += _training_loss_curves(index, run)
            curves += _evaluation_curves(index, run, key, metric.heading)
            if key == "top1":
                curves += _best_marker(index, run)
        title, caption = metric.heading_with_unit, METRIC_CAPTIONS.get(key, "On the validation images.")
        caption += " Dashed: averaged weights (EMA)."
        charts.append(Chart(key, title[0].upper() + title[1:], _curve_figure(curves), caption, is_wide=True))
    for key, title in TRAINING_CURVES.items():
        line = {"width": 1.5, "shape": "hv" if key == "skipped_steps" else "linear"}
        traces = [
            _curve(index, run, points, title, line=line)
            for index, run in enumerate(runs)
            if (points := _training_points(run, key))
        ]
        figure = _curve_figure(traces)
        values = [value for trace in traces for value in trace.y]
        if figure is not None:
            is_log = key == "grad_norm" and max(values) > 30 * min(values) > 0
            figure.update_yaxes(**(_log_axis(values) if is_log else {"rangemode": "tozero"}))
        charts.append(Chart(key.replace("_", "-"), title, figure))
    return charts


def _best_marker(index: int, run: Run) -> list[go.Scatter]:
    points = sorted(run.points("validation", "top1") + run.points("validation", "ema_top1"))
    best = [point for point in points if run.best and point[1] == run.best.top1][:1]
    marker = {"symbol": "star", "size": 12}
    return [_curve(index, run, best, "best Top-1", mode="markers", marker=marker)] if best else []


def _training_points(run: Run, key: str) -> list[tuple[int, float]]:
    points = run.points("train", key)
    if key != "data_wait":
        return points
    seconds = dict(run.points("train", "step_time"))
    return [(step, 100 * wait / seconds[step]) for step, wait in points if seconds.get(step, 0) > 0]


def _curve(index: int, run: Run, points: Points, label: str, **style: Any) -> go.Scatter:
    steps, values = average_points(points)
    # A line through a single point is invisible.
    mode = style.pop("mode", "lines" if len(steps) > 1 else "markers")
    return go.Scatter(
        x=steps,
        y=values,
        mode=mode,
        name=plain_text(run.name),
        meta={"run": index, "has_steps": True},
        hovertemplate=f"%{{fullData.name}}<br>{label} %{{y:.5g}} at %{{x:,.5~g}}<extra></extra>",
        **style,
    )


def _evaluation_curves(index: int, run: Run, key: str, label: str) -> list[go.Scatter]:
    """Return the curves of a validation metric, of the weights and of their average (dashed)."""
    curves = []
    for prefix, dash in (("", "solid"), ("ema_", "dash")):
        if points := run.points("validation", f"{prefix}{key}"):
            mode = "lines+markers" if len(points) <= 40 else "lines"
            style = {"mode": mode, "line": {"width": 2, "dash": dash}, "marker": {"size": 4}}
            curves.append(_curve(index, run, points, f"EMA {label}" if prefix else label, **style))
    return curves


def _training_loss_curves(index: int, run: Run) -> list[go.Scatter]:
    curves = []
    if points := run.points("train", "loss"):
        curves.append(_curve(index, run, points, "training loss", line={"width": 1.2}, opacity=0.65))
    if points := run.points("spike", "loss"):
        marker = {"symbol": "x", "size": 10, "line": {"width": 1}}
        curve = _curve(index, run, points, "", mode="markers", marker=marker)
        steps = {step for step, _ in points}
        curve.customdata = [_sample_list(r) for r in run.records["spike"] if r["step"] in steps]
        curve.hovertemplate = "%{fullData.name}<br>spike to %{y:.5g} at %{x}%{customdata}<extra></extra>"
        curves.append(curve)
    return curves


def _sample_list(record: Record) -> str:
    """Return the first samples of a spike's batch as HTML."""
    samples = record.get("samples")
    if not isinstance(samples, list) or not samples:
        return ""
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return f"<br>samples {plain_text(', '.join(map(str, samples[:8])), 80)}{more}"


def _curve_figure(curves: Sequence[go.Scatter]) -> go.Figure | None:
    return _figure(curves).update_xaxes(title_text="steps", rangemode="tozero") if curves else None


# --- Accuracy and cost --------------------------------------------------------------------------------------


def paper_models() -> list[dict[str, Any]]:
    """Return the accuracies of Table 2 and of the published models: group, name, top1, std and costs."""
    paper = read_paper_results()
    models = []
    for row in [*paper["table2"], *paper["released_models"]]:
        is_in1k = row.get("pretrained_on", "IN-1K") == "IN-1K"
        groups = {"full": "full", "vision longformer": "vil", "longformerhand": "vil"}
        group = groups.get(row.get("attention"), "other") if is_in1k else "large"
        model = {
            "group": "flat" if row.get("kind") == "flat" else group,
            "name": row.get("model") or f"{row['name']}, {row['position']}",
            "std": float(row.get("top1_std") or 0),
            "flops": float(row["gflops"]) * 1e9,
            "train_memory_mb": row.get("memory_mb") and float(row["memory_mb"]),
        }
        accuracies = row["top1"] if isinstance(row["top1"], list) else [row["top1"]]
        models += [{**model, "top1": float(top1)} for top1 in accuracies if top1 is not None]
    return models


def cost_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return best Top-1 against multiply-adds and against memory; beside a run on ImageNet, the paper's."""
    models = paper_models() if any(run.is_imagenet for run in runs) else []
    return [
        _cost_chart("flops", "FLOPs", "10⁹ multiply-adds per image", 1e9, runs, models),
        _cost_chart("train_memory_mb", "training memory", "MB per image in training", 1, runs, models),
    ]


def _cost_chart(
    key: str, cost_name: str, axis: str, unit: float, runs: Sequence[Run], models: Sequence[dict[str, Any]]
) -> Chart:
    traces = []
    style: dict[str, Any]
    for group, (name, symbol) in PAPER_GROUPS.items():
        members = [model for model in models if model["group"] == group and model[key]]
        stds = [model["std"] for model in members]
        style = {"error_y": {"array": stds, "width": 2, "thickness": 1}} if any(stds) else {}
        trace = go.Scatter(
            x=[model[key] / unit for model in members],
            y=[model["top1"] for model in members],
            mode="markers",
            name=name,
            text=[model["name"] for model in members],
            marker={"symbol": symbol, "size": 8, "line": {"width": 1.5}},
            meta={"paper": group},
            hovertemplate=f"%{{text}} (the paper)<br>Top-1 %{{y}} %<br>%{{x}} {axis}<extra></extra>",
            **style,
        )
        traces += [trace] if members else []
    for index, run in enumerate(runs):
        if (cost := run.cost(key)) and run.best:
            hover = "%{fullData.name}, on %{text}<br>Top-1 %{y:.2f} %<br>%{x:.4g} " + axis
            style = {"symbol": "star", "size": 14, "line": {"width": 1}}
            trace = go.Scatter(x=[cost / unit], y=[run.best.top1], mode="markers", marker=style)
            trace.update(name=plain_text(run.name, 24), text=[plain_text(run.data)], meta={"run": index})
            traces.append(trace.update(showlegend=False, hovertemplate=f"{hover}<extra></extra>"))
    figure = None
    if traces:
        figure = _figure(traces, showlegend=bool(models))
        figure.update_xaxes(title_text=axis, **_log_axis([x for trace in traces for x in trace.x]))
        figure.update_yaxes(title_text="Top-1, %")
    missing = sum(not run.cost(key) or not run.best for run in runs)
    caption = f"{missing} of {len(runs)} runs: not measured yet." if missing else ""
    return Chart(key.replace("_", "-"), f"Top-1 against {cost_name}", figure, caption, is_wide=True)


# --- Classes ------------------------------------------------------------------------------------------------


def class_accuracy_chart(key: str, runs: Sequence[Run], evaluations: Mapping[int, Evaluation]) -> Chart:
    """Return the accuracy by class of runs (index → evaluation) that have the same classes.

    The title names these runs if the page has others.
    """
    names = next(iter(evaluations.values())).class_names
    columns = {index: e.predictions.class_accuracy for index, e in evaluations.items()}
    means = {}
    for row, values in enumerate(zip(*columns.values())):
        if known := [value for value in values if value is not None]:
            means[row] = statistics.fmean(known)
    rows, caption = list(means), ""
    if len(rows) > MAX_CLASSES:
        caption = f"The {MAX_CLASSES} classes of {len(names)} with the lowest accuracy."
        rows = sorted(sorted(rows, key=means.__getitem__)[:MAX_CLASSES])
    traces = [
        go.Scatter(
            x=[column[row] for row in rows],
            # Runs are offset vertically so that equal values do not hide each other.
            y=[y + 0.5 * ((rank + 0.5) / len(columns) - 0.5) for y in range(len(rows))],
            mode="markers",
            name=plain_text(runs[index].name),
            text=[plain_text(names[row]) for row in rows],
            customdata=[int(evaluations[index].predictions.images[row]) for row in rows],
            marker={"size": 10, "opacity": 0.8},
            meta={"run": index},
            hovertemplate="%{fullData.name}<br>%{text}: %{x:.1f} % of %{customdata}<extra></extra>",
        )
        for rank, (index, column) in enumerate(columns.items())
    ]
    figure = _figure(traces, height=134 + 24 * len(rows))
    figure.update_xaxes(title_text="of the images of a class, %")
    figure.update_yaxes(**_class_axis([plain_text(names[row], 24) for row in rows], is_reversed=True))
    title = "Accuracy by class"
    if len(evaluations) < len(runs):
        title += f": {', '.join(plain_text(runs[index].name, 24) for index in evaluations)}"
    return Chart(key, title, figure, caption)


def confusion_chart(key: str, evaluation: Evaluation) -> Chart:
    """Return the confusion matrix; of many classes, those with the most confusions."""
    names = evaluation.class_names
    counts = evaluation.predictions.confusion[:, : len(names)]
    rows = list(range(len(names)))
    caption = "Rows: the class of an image. Columns: the prediction. Color: share of the row."
    if len(rows) > MAX_CONFUSED_CLASSES:
        errors = counts.clone().fill_diagonal_(0)
        order = (errors.sum(dim=0) + errors.sum(dim=1)).argsort(descending=True, stable=True)
        rows = sorted(order[:MAX_CONFUSED_CLASSES].tolist())
        caption += f" The {MAX_CONFUSED_CLASSES} classes of {len(names)} with the most confusions."
    shown = counts[rows][:, rows]
    percent = 100 * shown / evaluation.predictions.images[rows].clamp(min=1)[:, None]
    labels = [plain_text(names[row], 16) for row in rows]
    heatmap = go.Heatmap(
        z=[[round(value, 2) if value else None for value in row] for row in percent.tolist()],
        customdata=shown.tolist(),
        text=[[str(count) if count else "" for count in row] for row in shown.tolist()],
        texttemplate="%{text}" if len(rows) <= MAX_ANNOTATED_CLASSES else None,
        **{"x": list(range(len(rows))), "y": list(range(len(rows)))},
        **{"zmin": 0, "zmax": 100, "xgap": 1, "ygap": 1, "hoverongaps": False, "showscale": False},
        meta={"heatmap": True},
        hovertemplate="class %{y}, predicted %{x}<br>%{customdata} images, %{z:.1f} %<extra></extra>",
    )
    figure = _figure([heatmap], height=min(784, 224 + 24 * len(rows)))
    figure.update_xaxes(title_text="prediction", showgrid=False, **_class_axis(labels))
    figure.update_yaxes(title_text="class", showgrid=False, **_class_axis(labels, is_reversed=True))
    return Chart(key, "Confusion matrix", figure, caption)


def frequent_confusions(evaluation: Evaluation) -> list[tuple[str, str, int, float]]:
    """Return (class, prediction, images, percent of the class), the most frequent confusions first."""
    names, counts = evaluation.class_names, evaluation.predictions.confusion.clone().fill_diagonal_(0)
    confusions = []
    for index in counts.flatten().argsort(descending=True, stable=True)[:MAX_CONFUSIONS].tolist():
        row, column = divmod(index, counts.shape[1])
        if count := int(counts[row, column]):
            prediction = names[column] if column < len(names) else f"row {column} of the head"
            percent = 100 * count / int(evaluation.predictions.images[row])
            confusions.append((names[row], prediction, count, percent))
    return confusions


# --- Layout -------------------------------------------------------------------------------------------------


def _figure(traces: Sequence[Any], **layout: Any) -> go.Figure:
    template = go.layout.Template()  # the default template would add 7 kB to every figure
    defaults = {"template": template, "showlegend": False, "hovermode": "closest"}
    return go.Figure(list(traces), {**defaults, "margin": {"l": 48, "r": 12, "t": 8, "b": 40}, **layout})


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with ticks at powers of ten, for a small range also at 2 and 5 or between."""
    low, high = min(values), max(values)
    if high > 100 * low:
        return {"type": "log", "dtick": 1}
    # A range below a factor of 5 may contain no such tick; a single value has a decade on both sides.
    ticks = {} if low < high < 5 * low else {"dtick": "D2"}
    return {"type": "log", "tickformat": ",.6~r", **ticks}  # not Plotly's 5 for 0.5 and 50


def _class_axis(labels: Sequence[str], is_reversed: bool = False) -> dict[str, Any]:
    ticks = {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": list(labels)}
    limits = {"range": [len(labels) - 0.5, -0.5]} if is_reversed else {}
    return {**ticks, **limits, "automargin": True, "zeroline": False}
