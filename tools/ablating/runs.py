"""What lies in the folders of a grid's runs: which are finished, and what they found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.ablating.grid import Grid, Run
from vil.config import ConfigError, printable
from vil.runtime.files import MAX_JSON_BYTES, open_regular, parse_json, read_lines, read_text
from vil.schema import validate
from vil.training.logging import METRICS
from vil.training.run_folder import CONFIG, SUMMARY, differences
from vil.yaml_files import read_yaml

LOG, FAILURE = "log.txt", "failure.txt"
"""What train.py prints, and why its last call for the run failed."""

HOW = (
    "data.root", "data.workers", "data.download", "log_every", "tensorboard", "attention_every", "save_every",
    "keep_checkpoints", "hang_timeout", "grace_period",
)  # fmt: skip
"""Options of how a run is made, which do not change what it finds."""

COSTS = ("params", "flops", "train_memory_mb", "eval_memory_mb")


@dataclass(frozen=True)
class Found:
    """What a finished run found; accuracies in per cent.

    Attributes:
        top1: of the weights after the last epoch.
        ema_top1: of their moving average after the last epoch; None without one.
        best_top1: the highest of all evaluations, of the weights or their average.
        images: of the validation set.
        params, flops, train_memory_mb, eval_memory_mb, inference_images_per_second: as eval.py has them.
        images_per_second: of training, the median over the logged steps but the first.
        minutes: that the training steps took.
        device: the GPU's name, or cpu.
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
class Outcome:
    """Where a run stands.

    Attributes:
        found: of a finished run.
        failure: why it failed.
        change: how its configuration differs from what the grid asks for; such a run does not count.
    """

    run: Run
    found: Found | None = None
    failure: str | None = None
    change: str | None = None


def outcome_of(run: Run) -> Outcome:
    """Reads the run's folder; a file in it that cannot be read is a failure."""
    try:
        return _outcome(run)
    except ConfigError as error:
        return Outcome(run, failure=str(error))


def _outcome(run: Run) -> Outcome:
    changes = _changes(run)
    if changes:
        key, before, now = changes[0]
        others = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
        return Outcome(run, change=f"{key}: {before} → {now}{others}")
    if (run.folder / SUMMARY).exists():
        return Outcome(run, found=_read(run.folder))
    try:
        text = read_text(run.folder / FAILURE, MAX_JSON_BYTES, errors="replace")
        return Outcome(run, failure=printable(text.strip()))
    except OSError:
        return Outcome(run)


def check_unchanged(grid: Grid) -> None:
    """Raises ConfigError where the grid asks for another run than the one that is in its folder."""
    changed = [outcome for outcome in map(outcome_of, grid.runs()) if outcome.change]
    if changed:
        others = f", like {len(changed) - 1} more" if len(changed) > 1 else ""
        reason = f"was begun with {changed[0].change}{others}; remove it, or name another --output"
        raise ConfigError(str(changed[0].run.folder), reason)


def epochs_done(run: Run) -> int:
    """Whole epochs that the run has behind it, by its log."""
    try:
        with open_regular(run.folder / METRICS) as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            last = parse_json(file.read(4096).splitlines()[-1].decode("utf-8", "replace"))
        return int(last["epoch"]) - (last["kind"] == "train")
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _changes(run: Run) -> list[tuple[str, Any, Any]]:
    """(key, value of the run in the folder, value that is asked for), where they differ."""
    path = run.folder / CONFIG
    if not path.exists():
        return []
    stored = read_yaml(path)
    try:
        found = differences(stored, run.config)
    except (AttributeError, LookupError, TypeError):
        raise ConfigError(str(path), "is no configuration of train.py") from None
    # A precision that is left to the device is written as what the device had.
    return [
        (key, before, now)
        for key, before, now in found
        if key not in HOW and (key != "precision" or now is not None)
    ]


def _read(folder: Path) -> Found:
    """What the files of a finished run say."""
    try:
        (summary,) = parse_json(read_text(folder / SUMMARY, MAX_JSON_BYTES))
        records = _records(folder / METRICS)
        evaluations = [record for record in records if record["kind"] == "validation"]
        last = evaluations[-1]
        found = dict(
            top1=last["top1"],
            ema_top1=last.get("ema_top1"),
            best_top1=max(record.get(key, 0.0) for record in evaluations for key in ("top1", "ema_top1")),
            images=summary["images"],
            **{key: summary[key] for key in COSTS},
            inference_images_per_second=summary["images_per_second"],
            **_speed([record for record in records if record["kind"] == "train"]),
            device=summary["device"],
        )
        accuracies = [found[key] for key in ("top1", "ema_top1", "best_top1") if found[key] is not None]
        if not found["images"] or not all(0 <= accuracy <= 100 for accuracy in accuracies):
            raise ValueError(f"accuracies {accuracies} of {found['images']} images")
        return validate(Found, found)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(str(folder), f"cannot be read: {type(error).__name__} {error}") from None


def _records(path: Path) -> list[dict[str, Any]]:
    return [parse_json(line) for line in read_lines(path)]


def _speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Median rate and minutes of the logged steps; step_time is the mean since the step logged before."""
    rates = [record["images_per_second"] for record in steps[1:]]
    before = [0, *(record["step"] for record in steps)]
    seconds = sum(record["step_time"] * (record["step"] - start) for record, start in zip(steps, before))
    return {"images_per_second": statistics.median(rates) if rates else None, "minutes": seconds / 60}
