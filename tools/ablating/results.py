"""What a grid found: one row per cell, as a table, Markdown, CSV, JSON and a figure."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.ablating.estimates import Estimate, estimate, paired
from tools.ablating.grid import Cell, Grid
from tools.ablating.progress import title
from tools.ablating.runs import Outcome, outcome_of
from tools.paper_tables import show_table
from vil.runtime.csv_text import csv_text


@dataclass(frozen=True)
class Row:
    """A cell's findings.

    Attributes:
        reference: the cell that it is compared with; itself for a base.
        outcomes: of its runs, by seed.
        top1: of the weights after the last epoch, in per cent; None where no run is finished.
        difference: to the reference, over the seeds that both have; None for a base.
    """

    cell: Cell
    reference: Cell
    outcomes: dict[int, Outcome]
    top1: Estimate | None
    ema_top1: Estimate | None
    best_top1: Estimate | None
    difference: Estimate | None

    def of(self, key: str) -> list[Any]:
        """A figure of all finished runs, without those that lack it."""
        found = [outcome.found for outcome in self.outcomes.values() if outcome.found]
        return [value for value in (getattr(f, key) for f in found) if value is not None]

    def median(self, key: str) -> float | None:
        """Its median."""
        values = self.of(key)
        return statistics.median(values) if values else None


def collect(grid: Grid) -> list[Row]:
    """Reads all runs of the grid, finished or not."""
    outcomes = {(run.cell.name, run.seed): outcome_of(run) for run in grid.runs()}

    def by_seed(cell: Cell, key: str) -> dict[int, float]:
        found = {seed: outcomes[cell.name, seed].found for seed in grid.seeds}
        values = {seed: getattr(f, key) for seed, f in found.items() if f}
        return {seed: value for seed, value in values.items() if value is not None}

    rows = []
    for cell in grid.cells:
        reference = grid.reference[cell.name]
        of_cell = {key: by_seed(cell, key) for key in ("top1", "ema_top1", "best_top1")}
        rows.append(
            Row(
                cell=cell,
                reference=reference,
                outcomes={seed: outcomes[cell.name, seed] for seed in grid.seeds},
                difference=None if reference is cell else paired(of_cell["top1"], by_seed(reference, "top1")),
                **{key: estimate(list(values.values())) for key, values in of_cell.items()},
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that is also readable as text, and beneath it what did not end well."""
    shows_ema = any(row.ema_top1 for row in rows)
    references = {row.reference.name for row in rows}
    unit, letter = (
        (1e9, "G") if max((row.median("flops") or 0 for row in rows), default=0) >= 1e9 else (1e6, "M")
    )
    lines = []
    for row in rows:
        line = {
            "cell": row.cell.name,
            "seeds": _seeds(row),
            "Top-1 %, last epoch": _mean(row.top1),
            "95 % interval": _interval(row.top1, ".2f"),
            "paired difference": _difference(row),
        }
        if len(references) > 1:
            line["to"] = "" if row.reference is row.cell else row.reference.name
        if shows_ema:
            line["EMA %"] = _mean(row.ema_top1)
        lines.append(
            line
            | {
                "best epoch %": _mean(row.best_top1),
                "params M": _figure(row.median("params"), 1e6, ".2f"),
                f"FLOPs {letter}": _figure(row.median("flops"), unit, ".2f"),
                "train MB": _figure(row.median("train_memory_mb"), 1, ".2f"),
                "eval MB": _figure(row.median("eval_memory_mb"), 1, ".2f"),
                "images/s": _figure(row.median("images_per_second"), 1, ",.0f"),
                "minutes": _figure(row.median("minutes"), 1, ".1f"),
            }
        )
    return "\n".join([show_table(lines), *_notes(rows)])


def legend(grid: Grid, rows: Sequence[Row]) -> str:
    """What the columns of the table are."""
    counts = sorted({number for row in rows for number in row.of("images")})
    devices = ", ".join(sorted({name for row in rows for name in row.of("device")})) or "nothing yet"
    of_images = f" of {_range(counts)} validation images" if counts else ""
    if len(counts) == 1:
        of_images += f", of which one is {100 / counts[0]:.2g} %"
    epochs = sorted({cell.config.schedule.epochs for cell in grid.cells})
    return (
        f"Seeds {', '.join(map(str, grid.seeds))}; {_range(epochs)} epochs; measured on {devices}. "
        f"Top-1{of_images}: mean ± standard deviation over seeds, of the weights after the last epoch, and "
        "Student's interval of the mean. Paired difference: its mean over seeds, with the 95 % interval, to "
        "the base or to the cell named. Best epoch: the highest of all epochs, a maximum over these images. "
        "FLOPs: multiply-adds of one image. MB: 10⁶ bytes per image. images/s, minutes: of training."
    )


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat object per cell, as CSV and JSON have it."""
    found = []
    for row in rows:
        record: dict[str, Any] = {"cell": row.cell.name, **row.cell.levels, "n": len(row.of("top1"))}
        for key in ("top1", "ema_top1", "best_top1", "difference"):
            value: Estimate | None = getattr(row, key)
            low, high = (value and value.interval) or (None, None)
            record |= {
                key: value and value.mean,
                f"{key}_sd": value and value.sd,
                f"{key}_low": low,
                f"{key}_high": high,
            }
        record |= {
            "compared_with": None if row.reference is row.cell else row.reference.name,
            "pairs": row.difference.n if row.difference else None,
        }
        for key in ("params", "flops", "train_memory_mb", "eval_memory_mb", "images_per_second",
                    "inference_images_per_second", "minutes"):  # fmt: skip
            record[key] = row.median(key)
        record["failed"] = sum(outcome.failure is not None for outcome in row.outcomes.values())
        found.append(record)
    return found


def as_csv(rows: Sequence[Row]) -> str:
    """Return the records; empty where there is no figure."""
    lines = records(rows)
    return csv_text([list(lines[0]), *(line.values() for line in lines)])


def as_json(grid: Grid, rows: Sequence[Row], command: str) -> str:
    """The records, and every run with its figures, its reason of failure, or neither."""
    runs = [
        {
            "cell": row.cell.name,
            "seed": seed,
            "folder": str(outcome.run.folder),
            **(dataclasses.asdict(outcome.found) if outcome.found else {}),
            "failure": outcome.failure,
            "changed": outcome.change,
        }
        for row in rows
        for seed, outcome in row.outcomes.items()
    ]
    content = {
        "grid": grid.name,
        "question": grid.question,
        "command": command,
        "cells": records(rows),
        "runs": runs,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def figure(grid: Grid, rows: Sequence[Row]) -> Any:
    """Top-1 per cell, and the paired differences: means with intervals, and single seeds as points."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    canvas = Figure(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        color = f"C{grid.cells.index(row.reference) % 10}"
        _draw(left, place, row.of("top1"), row.top1, color)
        if row.difference is not None:
            own, other = (_by_seed(r) for r in (row, next(r for r in rows if r.cell is row.reference)))
            _draw(
                right,
                place,
                [own[seed] - other[seed] for seed in own if seed in other],
                row.difference,
                color,
            )
    left.set_yticks(range(len(rows)), [row.cell.name for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel("Top-1 after the last epoch (%)")
    right.set_xlabel("paired difference (points)")
    right.axvline(0, color="0.6", linewidth=1)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(grid.question or grid.name, fontsize=11, parse_math=False)
    canvas.supxlabel(
        "points: single seeds; diamond and bar: mean and its 95 % interval", fontsize=8, color="0.4"
    )
    return canvas


def _draw(axes: Any, place: int, values: Sequence[float], mean: Estimate | None, color: str) -> None:
    axes.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=5)
    if mean is not None:
        style = {"fmt": "D", "color": color, "markersize": 6, "markeredgecolor": "white", "capsize": 4}
        axes.errorbar(mean.mean, place, xerr=mean.margin, **style)


def _by_seed(row: Row) -> dict[int, float]:
    return {seed: outcome.found.top1 for seed, outcome in row.outcomes.items() if outcome.found}


def _seeds(row: Row) -> str:
    done, asked = len(row.of("top1")), len(row.outcomes)
    failed = sum(outcome.failure is not None for outcome in row.outcomes.values())
    return str(done) if done == asked else f"{done} of {asked}" + (f", {failed} failed" if failed else "")


def _notes(rows: Sequence[Row]) -> list[str]:
    """A line for each run that failed, or is another than the grid asks for."""
    notes = []
    for outcome in (outcome for row in rows for outcome in row.outcomes.values()):
        if outcome.failure is not None:
            notes.append(f"- {title(outcome.run)} failed: {outcome.failure} ({outcome.run.folder})")
        elif outcome.change is not None:
            notes.append(f"- {title(outcome.run)} is left out: the grid has changed since ({outcome.change})")
    return ["", *notes] if notes else []


def _mean(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.2f}" + (f" ± {value.sd:.2f}" if value.sd is not None else "")


def _interval(value: Estimate | None, form: str) -> str:
    if value is None or value.interval is None:
        return "-"
    low, high = value.interval
    return f"{low:{form}} to {high:{form}}"


def _difference(row: Row) -> str:
    if row.reference is row.cell:
        return "base"
    value = row.difference
    if value is None:
        return "-"
    pairs = f", {value.n} of {len(row.outcomes)} pairs" if value.n < len(row.outcomes) else ""
    return f"{value.mean:+.2f}" + (f" ({_interval(value, '+.2f')})" if value.interval else "") + pairs


def _figure(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else format(value / unit, form)


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
