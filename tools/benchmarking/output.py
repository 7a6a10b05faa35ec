"""Tables for people, CSV for programs, and figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarking.measure import Missing
from tools.paper_tables import show_table
from vil.command_line import write_output
from vil.config import ConfigError
from vil.evaluation import report
from vil.runtime.csv_text import csv_text

Cell = tuple[str, Callable[[Any], str]]
"""The key of a record, and how its value is written."""


@dataclass(frozen=True)
class Figure:
    """A panel: lines over `x`, or, where a line is a single number, bars."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def amount(value: float | Missing | None, unit: float) -> float | None:
    """A figure in `unit`; None where there is none."""
    return None if value is None or isinstance(value, Missing) else value / unit


def factor(numerator: float | Missing | None, denominator: float | Missing | None) -> float | None:
    """Their quotient; None where one is missing, or nothing stands below."""
    if numerator is None or denominator is None:
        return None
    if isinstance(numerator, Missing) or isinstance(denominator, Missing) or not denominator:
        return None
    return numerator / denominator


def percent(value: float) -> str:
    """0.5 → 50 %."""
    return f"{100 * value:.0f} %"


def sheet(records: Sequence[Mapping[str, Any]], columns: Mapping[str, Cell]) -> str:
    """A table of the columns (heading → cell), and beneath it the notes of records by their first column."""
    lines = [
        {
            heading: "n/a" if record[key] is None else write(record[key])
            for heading, (key, write) in columns.items()
        }
        for record in records
    ]
    first = next(iter(columns.values()))[0]
    notes = [f"- {record[first]}: {record['note']}" for record in records if record["note"]]
    return "\n".join([show_table(lines), *([""] if notes else []), *notes])


def check_writable(**paths: str | None) -> None:
    """Raises ConfigError, before the work, where one of the files (option → path) cannot be written."""
    for option, path in paths.items():
        if path is None:
            continue
        try:
            report.check_writable(path)
        except ConfigError as error:
            raise ConfigError(f"--{option}", error.reason) from None
    if paths.get("png"):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ConfigError("--png", "needs the package matplotlib, as requirements.txt has it") from None


def write_csv(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per record; empty where there is no figure."""
    write_output(Path(path), csv_text([list(records[0]), *(record.values() for record in records)]), "--csv")


def write_png(path: str, figures: Sequence[Figure], title: str) -> None:
    """The panels side by side: lines on logarithmic axes, or bars."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6 * len(figures), 5), layout="constrained")
    canvas.suptitle(title, fontsize=9)
    names = list(dict.fromkeys(name for figure in figures for name in figure.lines))
    colors = {name: f"C{number % 10}" for number, name in enumerate(names)}
    for axes, figure in zip(canvas.subplots(1, len(figures), squeeze=False)[0], figures):
        axes.set_title(figure.title)
        if figure.x:
            for name, points in figure.lines.items():
                x, y = zip(*sorted(points))
                axes.loglog(x, y, marker="o", label=name, color=colors[name])
            ticks = sorted({x for points in figure.lines.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(figure.x)
            axes.grid(which="both", alpha=0.3)
            if figure.lines:
                axes.legend()
            continue
        for name, points in figure.lines.items():
            bar = axes.barh(name, points[0][1], color=colors[name])
            axes.bar_label(bar, fmt="%.4g", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
    content = io.BytesIO()
    canvas.savefig(content, dpi=120, format="png")
    write_output(Path(path), content.getvalue(), "--png")
