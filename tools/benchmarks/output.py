"""Markdown tables, CSV files and figures of benchmark records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tools.markdown_table import markdown_table
from vil.config import UserError
from vil.runtime import files
from vil.runtime.csv_text import csv_text
from vil.runtime.files import write_output

Record = Mapping[str, Any]
"""Flat figures of one method. Missing figures are None, and explained by the key `note`."""


class Column(NamedTuple):
    """A column of a table."""

    heading: str
    key: str
    format: str = "{}"


class Panel(NamedTuple):
    """A panel of a figure: lines of (x, y) by name on logarithmic axes, or bars if `x_label` is empty."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = ""


@dataclass(frozen=True)
class Results:
    """Results of a benchmark.

    Attributes:
        notes: lines that describe how the figures were measured.
        tables: records of each table, by heading.
        columns: columns of the tables.
        panels: panels of the figure.
        has_failed: True for exit status 1.
    """

    notes: Sequence[str]
    tables: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    columns: Sequence[Column] = ()
    panels: Sequence[Panel] = ()
    has_failed: bool = False

    def __str__(self) -> str:
        parts = ["\n".join(self.notes)]
        for heading, records in self.tables.items():
            parts += [heading, table(records, self.columns)] if heading else [table(records, self.columns)]
        return "\n\n".join(parts)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient; None if a number is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


def table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """Return a table of the records, followed by their notes."""

    def cell(record: Record, column: Column) -> str:
        return "n/a" if record[column.key] is None else column.format.format(record[column.key])

    rows = [{column.heading: cell(record, column) for column in columns} for record in records]
    notes = [f"- {record[columns[0].key]}: {record['note']}" for record in records if record["note"]]
    return "\n".join([markdown_table(rows), *([""] if notes else []), *notes])


def panel(title: str, points: Iterable[tuple[str, float, float | None]], x_label: str = "") -> Panel:
    """Return a panel of the points (name, x, y) whose y is not missing."""
    lines = defaultdict(list)
    for name, x, y in points:
        if y is not None:
            lines[name].append((x, y))
    return Panel(title, lines, x_label)


def check_writable(**paths: str | None) -> None:
    """Raise UserError if one of the files (option → path) cannot be written, or needs a missing package."""
    for option, path in paths.items():
        if path is not None:
            files.check_writable(Path(path), f"--{option}")
    if paths.get("png"):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--png", "needs the package matplotlib, see requirements.txt") from None


def write_csv(path: str, results: Results) -> None:
    """Write a line per record; missing figures are empty."""
    records = [record for table_records in results.tables.values() for record in table_records]
    write_output(Path(path), csv_text([list(records[0]), *(record.values() for record in records)]), "--csv")


def write_png(path: str, panels: Sequence[Panel], title: str) -> None:
    """Draw the panels side by side."""
    from matplotlib.figure import Figure

    from tools.png import as_png

    figure = Figure(figsize=(6 * len(panels), 5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    names = dict.fromkeys(name for panel in panels for name in panel.lines)
    colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.set_title(panel.title)
        for name, points in panel.lines.items():
            if panel.x_label:
                axes.loglog(*zip(*sorted(points)), marker="o", label=name, color=colors[name])
            else:
                axes.bar_label(axes.barh(name, points[0][1], color=colors[name]), fmt="%.4g", padding=3)
        if not panel.x_label:
            axes.invert_yaxis()
            axes.margins(x=0.15)
            continue
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(panel.x_label)
        axes.grid(which="both", alpha=0.3)
        if panel.lines:
            axes.legend()
    write_output(Path(path), as_png(figure), "--png")
