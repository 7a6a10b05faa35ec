"""Write the results of a grid: Markdown, CSV, JSON, a figure, and a section of a page of documentation."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.ablation.grid import Grid
from tools.ablation.results import CellResult, Estimate
from tools.ablation.run_status import COSTS
from tools.markdown_table import markdown_table
from tools.png import as_png
from vil.errors import UserError, error_reason
from vil.runtime.csv_text import csv_text
from vil.runtime.files import make_folders, read_text, write_durably, write_output

MEDIANS = (*COSTS, "images_per_second", "inference_images_per_second", "minutes")


def reproducing_command(argv: Sequence[str]) -> str:
    """Return the command that runs a grid again, with DIR for the data folder of this machine."""
    shown: list[str] = []
    for argument in argv:
        if shown and shown[-1] == "--data.root":
            argument = "DIR"
        shown.append("--data.root=DIR" if argument.startswith("--data.root=") else argument)
    return f"python tools/ablate.py {shlex.join(argument for argument in shown if argument != '--report')}"


def markdown(grid: Grid, results: Sequence[CellResult], command: str) -> str:
    """Return question, command, table and legend."""
    head = [grid.question, ""] if grid.question else []
    return "\n".join([*head, "```sh", command, "```", "", table(results), "", legend(grid, results)])


def table(results: Sequence[CellResult]) -> str:
    """Return a Markdown table with one row per cell, followed by a line per failed or changed run."""
    flops = [value for result in results if (value := result.median("flops")) is not None]
    prefix, unit = ("G", 1e9) if flops and max(flops) >= 1e9 else ("M", 1e6)
    has_ema = any(result.mean("ema_top1") for result in results)
    has_references = len({result.reference.name for result in results}) > 1
    rows = []
    for result in results:
        top1 = result.mean("top1")
        row = {
            "cell": result.cell.name,
            "seeds": _seed_count(result),
            "Top-1 %, last epoch": _format_mean(top1),
            "95 % interval": _format_interval(top1, ".2f"),
            "paired difference": _format_difference(result),
        }
        if has_references:
            row["to"] = "" if result.is_base else result.reference.name
        if has_ema:
            row["EMA %"] = _format_mean(result.mean("ema_top1"))
        row["best epoch %"] = _format_mean(result.mean("best_top1"))
        for heading, key, divisor, form in (
            ("params M", "params", 1e6, ".2f"),
            (f"FLOPs {prefix}", "flops", unit, ".2f"),
            ("train MB", "train_memory_mb", 1, ".2f"),
            ("eval MB", "eval_memory_mb", 1, ".2f"),
            ("images/s", "images_per_second", 1, ",.0f"),
            ("minutes", "minutes", 1, ".1f"),
        ):
            median = result.median(key)
            row[heading] = "-" if median is None else format(median / divisor, form)
        rows.append(row)
    notes = []
    for status in (status for result in results for status in result.statuses.values()):
        if status.failure is not None:
            notes.append(f"- {status.run.name} failed: {status.failure} ({status.run.folder})")
        elif status.change is not None:
            notes.append(f"- {status.run.name} is excluded: the grid has changed since ({status.change})")
    return "\n".join([markdown_table(rows), *([""] if notes else []), *notes])


def legend(grid: Grid, results: Sequence[CellResult]) -> str:
    """Return an explanation of the table's columns."""
    counts = sorted({count for result in results for count in result.values("images")})
    devices = ", ".join(sorted({name for result in results for name in result.values("device")}))
    images = f" of {_format_range(counts)} validation images" if counts else ""
    if len(counts) == 1:
        images += f" (one image: {100 / counts[0]:.2g} %)"
    epochs = _format_range(sorted({cell.config.schedule.total_epochs for cell in grid.cells}))
    return (
        f"Seeds {', '.join(map(str, grid.seeds))}; {epochs} epochs; measured on {devices or 'nothing yet'}. "
        f"Top-1{images}: mean ± standard deviation over seeds, of the weights after the last epoch, and the "
        "confidence interval of the mean (Student's t). Paired difference: mean over seeds and 95 % interval "
        "of the difference from the base or from the named cell. Best epoch: the maximum over all epochs. "
        "FLOPs: multiply-adds of one image. MB: 10⁶ bytes per image. images/s, minutes: of training."
    )


def csv_and_json_records(results: Sequence[CellResult]) -> list[dict[str, Any]]:
    """Return one flat record per cell."""
    records = []
    for result in results:
        count = len(result.values("top1"))
        record: dict[str, Any] = {"cell": result.cell.name, **result.cell.levels, "n": count}
        for key in ("top1", "ema_top1", "best_top1", "difference"):
            value = result.difference if key == "difference" else result.mean(key)
            low, high = (value and value.interval) or (None, None)
            record |= {key: value and value.mean, f"{key}_sd": value and value.sd}
            record |= {f"{key}_low": low, f"{key}_high": high}
        record["compared_with"] = None if result.is_base else result.reference.name
        record["pairs"] = len(result.differences) or None
        record |= {key: result.median(key) for key in MEDIANS}
        record["failed"] = result.failures
        records.append(record)
    return records


def write_results(grid: Grid, results: Sequence[CellResult], command: str) -> None:
    """Write results.md, .csv, .json and .png into the grid's folder."""
    cells = csv_and_json_records(results)
    runs = [
        {
            "cell": result.cell.name,
            "seed": seed,
            "folder": str(status.run.folder),
            **(dataclasses.asdict(status.metrics) if status.metrics else {}),
            "failure": status.failure,
            "changed": status.change,
        }
        for result in results
        for seed, status in result.statuses.items()
    ]
    content = {"grid": grid.name, "question": grid.question, "command": command, "cells": cells, "runs": runs}
    text = markdown(grid, results, command)
    files: dict[str, str | bytes] = {
        "results.md": f"# {grid.name}\n\n{text}\n\n![results](results.png)\n",
        "results.csv": csv_text([list(cells[0]), *(cell.values() for cell in cells)]),
        "results.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "results.png": as_png(draw_figure(grid, results)),
    }
    try:
        make_folders(grid.folder.parent, grid.folder.name)
        for name, file_content in files.items():
            write_durably(grid.folder / name, file_content)
    except OSError as error:
        raise UserError(str(grid.folder), f"cannot be written: {error_reason(error)}") from None


def insert_into_page(page: Path, grid: Grid, results: Sequence[CellResult], command: str) -> None:
    """Replace the text between the grid's two markers in a page, and write the figure next to the page."""
    content, (start, end) = _read_page(page), _marked_span(page, grid.name)
    image = Path("figures") / f"ablation_{grid.name}.png"
    text = f"\n\n{markdown(grid, results, command)}\n\n![{grid.question or grid.name}]({image})\n\n"
    write_output(page.parent / image, as_png(draw_figure(grid, results)))
    write_output(page, content[:start] + text + content[end:])


def check_markers(page: Path, names: Iterable[str]) -> None:
    """Raise UserError if the page lacks the markers of one of the grids."""
    for name in names:
        _marked_span(page, name)


def _marked_span(page: Path, name: str) -> tuple[int, int]:
    """Return start and end of the text between the two markers."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    match = re.search(f"{re.escape(begin)}(.*?){re.escape(end)}", _read_page(page), re.DOTALL)
    if match is None:
        raise UserError(f"--markdown {page}", f"contains no {begin} followed by {end}")
    return match.span(1)


def _read_page(page: Path) -> str:
    try:
        return read_text(page)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--markdown {page}", f"cannot be read: {reason}") from None


def draw_figure(grid: Grid, results: Sequence[CellResult]) -> Figure:
    """Draw Top-1 per cell and the paired differences: means with intervals, single seeds as points."""
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(results)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, result in enumerate(results):
        color = f"C{grid.cells.index(result.reference) % 10}"
        _draw_estimate(left, row, result.values("top1"), result.mean("top1"), color)
        if result.difference is not None:
            _draw_estimate(right, row, result.differences, result.difference, color)
    left.set_yticks(range(len(results)), [result.cell.name for result in results])
    left.set_ylim(len(results) - 0.5, -0.5)
    left.set_xlabel("Top-1 after the last epoch (%)")
    right.set_xlabel("paired difference (points)")
    right.axvline(0, color="0.6", linewidth=1)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(grid.question or grid.name, fontsize=11, parse_math=False)
    figure.supxlabel("points: single seeds; diamond and bar: mean and 95 % interval", fontsize=8, color="0.4")
    return figure


def _draw_estimate(axes: Axes, row: int, values: Sequence[float], mean: Estimate | None, color: str) -> None:
    axes.plot(values, [row] * len(values), "o", color=color, alpha=0.45, markersize=5)
    if mean is not None:
        low, high = mean.interval or (mean.mean, mean.mean)
        margins = [[mean.mean - low], [high - mean.mean]] if mean.interval else None
        axes.errorbar(mean.mean, row, xerr=margins, fmt="D", color=color, ms=6, mec="white", capsize=4)


def _seed_count(result: CellResult) -> str:
    finished, total = len(result.values("top1")), len(result.statuses)
    failed = f", {result.failures} failed" if result.failures else ""
    return str(finished) if finished == total else f"{finished} of {total}{failed}"


def _format_mean(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.2f}" + (f" ± {value.sd:.2f}" if value.sd is not None else "")


def _format_interval(value: Estimate | None, form: str) -> str:
    if value is None or value.interval is None:
        return "-"
    low, high = value.interval
    return f"{low:{form}} to {high:{form}}"


def _format_difference(result: CellResult) -> str:
    if result.is_base:
        return "base"
    value = result.difference
    if value is None:
        return "-"
    pairs = f", {value.n} of {len(result.statuses)} pairs" if value.n < len(result.statuses) else ""
    return f"{value.mean:+.2f}" + (f" ({_format_interval(value, '+.2f')})" if value.interval else "") + pairs


def _format_range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
