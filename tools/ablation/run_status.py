"""Read the folders of a grid's runs: finished, failed or of another configuration."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.ablation.grid import Grid, Run
from vil.checkpoints.run_folder import differences
from vil.errors import UserError, printable
from vil.runtime.files import MAX_JSON_BYTES, open_regular, parse_json, read_lines, read_text
from vil.runtime.run_files import CONFIG, METRICS, SUMMARY
from vil.runtime.yaml_files import read_yaml
from vil.validation import validate

LOG, FAILURE = "log.txt", "failure.txt"
"""Standard output of train.py, and the reason of the last failure."""

IGNORED_OPTIONS = {
    *("data.root", "data.workers", "data.download", "log_every", "loggers", "attention_every"),
    *("save_every", "keep_checkpoints", "hang_timeout", "grace_period"),
}
"""Options that do not change the result of a run."""

COSTS = ("params", "flops", "train_memory_mb", "eval_memory_mb")


@dataclass(frozen=True)
class RunMetrics:
    """Results of a finished run; accuracies in percent.

    Attributes:
        top1: of the weights after the last epoch.
        ema_top1: of their moving average after the last epoch; None without one.
        best_top1: highest of all evaluations, of the weights or their average.
        images: size of the validation set.
        params, flops, train_memory_mb, eval_memory_mb, inference_images_per_second: as in eval.py's JSON.
        images_per_second: training speed, the median over the logged steps without the first.
        minutes: time of all training steps.
        device: name of the GPU, or cpu.
    """

    top1: float
    ema_top1: float | None
    best_top1: float
    images: int
    params: int
    flops: int
    train_memory_mb: float | None
    eval_memory_mb: float | None
    inference_images_per_second: float | None
    images_per_second: float | None
    minutes: float
    device: str


@dataclass(frozen=True)
class RunStatus:
    """State of a run's folder; without metrics, failure and change, the run is unfinished.

    A run with a `change`, a difference from the configuration of the grid, does not count.
    """

    run: Run
    metrics: RunMetrics | None = None
    failure: str | None = None
    change: str | None = None


def read_status(run: Run) -> RunStatus:
    """Read the folder of a run; an unreadable file counts as a failure."""
    try:
        changes = _config_changes(run)
        if changes:
            key, stored, wanted = changes[0]
            others = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            return RunStatus(run, change=f"{key}: {stored} → {wanted}{others}")
        if os.path.exists(run.folder / SUMMARY):
            return RunStatus(run, metrics=_read_metrics(run.folder))
        text = read_text(run.folder / FAILURE, MAX_JSON_BYTES, errors="replace")
        return RunStatus(run, failure=printable(text.strip()))
    except OSError:
        return RunStatus(run)
    except UserError as error:
        return RunStatus(run, failure=str(error))


def check_unchanged(grid: Grid) -> None:
    """Raise UserError if a run's folder holds a run of another configuration."""
    changed = [status for status in map(read_status, grid.runs()) if status.change]
    if changed:
        others = f", and {len(changed) - 1} more runs" if len(changed) > 1 else ""
        reason = f"was started with another configuration ({changed[0].change}){others}"
        raise UserError(str(changed[0].run.folder), f"{reason}; remove it, or name another --output")


def completed_epochs(run: Run) -> int:
    """Return the number of complete epochs in the log of a run."""
    try:
        with open_regular(run.folder / METRICS) as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            last = parse_json(file.read(4096).splitlines()[-1].decode("utf-8", "replace"))
        return int(last["epoch"]) - (last["kind"] != "validation")
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _config_changes(run: Run) -> list[tuple[str, Any, Any]]:
    """Return (key, stored value, value of the grid) of the options that differ and change results."""
    path = run.folder / CONFIG
    if not os.path.exists(path):
        return []
    try:
        changes = differences(read_yaml(path), run.config)
    except (AttributeError, LookupError, TypeError):
        raise UserError(str(path), "not a configuration of train.py") from None
    # train.py stores the precision that it chose for the device where the grid leaves it open.
    return [
        (key, stored, wanted)
        for key, stored, wanted in changes
        if key not in IGNORED_OPTIONS and (key != "precision" or wanted is not None)
    ]


def _read_metrics(folder: Path) -> RunMetrics:
    """Read the results of a finished run. Raise UserError if a file is damaged."""
    try:
        (summary,) = parse_json(read_text(folder / SUMMARY, MAX_JSON_BYTES))
        records = [parse_json(line) for line in read_lines(folder / METRICS)]
        evaluations = [record for record in records if record["kind"] == "validation"]
        last = evaluations[-1]
        metrics = {
            "top1": last["top1"],
            "ema_top1": last.get("ema_top1"),
            "best_top1": max(e.get(key, 0.0) for e in evaluations for key in ("top1", "ema_top1")),
            "images": summary["images"],
            **{key: summary[key] for key in COSTS},
            "inference_images_per_second": summary["images_per_second"],
            **_training_speed([record for record in records if record["kind"] == "train"]),
            "device": summary["device"],
        }
        accuracies = [metrics[key] for key in ("top1", "ema_top1", "best_top1") if metrics[key] is not None]
        if not metrics["images"] or not all(0 <= accuracy <= 100 for accuracy in accuracies):
            raise ValueError(f"accuracies {accuracies} of {metrics['images']} images")
        return validate(RunMetrics, metrics)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(str(folder), f"cannot be read: {type(error).__name__} {error}") from None


def _training_speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the median speed and the minutes of the steps; step_time is a mean since the last record."""
    rates = [record["images_per_second"] for record in steps[1:]]
    previous = [0, *(record["step"] for record in steps)]
    seconds = sum(record["step_time"] * (record["step"] - start) for record, start in zip(steps, previous))
    return {"images_per_second": statistics.median(rates) if rates else None, "minutes": seconds / 60}
