"""Read the folder of a run, finished or in progress."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.eval_sets import unique_ends
from vil.checkpoints.run_folder import UNTRACKED_OPTIONS
from vil.config import TrainConfig
from vil.errors import UserError, error_reason
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_lines, read_text
from vil.runtime.run_files import CONFIG, METRICS, SUMMARY
from vil.runtime.yaml_files import MAX_BYTES, read_yaml
from vil.training.trainer import best_metric_key
from vil.validation import stored_tree

Record = dict[str, Any]
IMAGENET_CLASSES = 1000
MAX_WARNINGS = 20
MAX_VALUE = 1e30
"""Largest value of a log that is shown."""
_logger = logging.getLogger("vil.report")


@dataclass(frozen=True)
class BestResult:
    """Top-1 of the best evaluation of a run in percent, with the kind of weights and the epoch."""

    top1: float
    weights: str
    epoch: int | None


@dataclass
class Run:
    """A training run.

    Attributes:
        name: the shortest end of the folder's path that is unique on the page.
        text: content of config.yaml.
        records: kind → lines of metrics.jsonl in the order of steps.
        summary: evaluation of the best model; empty while the run is not finished.
        warnings: one line for each unreadable file or record.
        counted: params and flops of an unfinished run, if they could be counted.
    """

    folder: Path
    name: str
    text: str
    config: dict[str, Any]
    records: dict[str, list[Record]]
    summary: Record
    warnings: list[str] = field(default_factory=list)
    counted: Record = field(default_factory=dict)

    def option(self, section: str, key: str, default: Any = None) -> Any:
        """Return an option of config.yaml."""
        values = self.config.get(section)
        return values.get(key, default) if isinstance(values, dict) else default

    def points(self, kind: str, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of all records of a kind that have a finite number."""
        pairs = [(record["step"], finite_number(record.get(key))) for record in self.records.get(kind, [])]
        return [(step, value) for step, value in pairs if value is not None]

    def last(self, kind: str, key: str) -> float | None:
        """Return the last value of a kind of records."""
        points = self.points(kind, key)
        return points[-1][1] if points else None

    def cost(self, key: str) -> float | None:
        """Return params, flops, train_memory_mb, … of eval.py's JSON."""
        value = finite_number(self.summary.get(key))
        return finite_number(self.counted.get(key)) if value is None else value

    @property
    def best(self) -> BestResult | None:
        """The first best evaluation by `schedule.best_metric`, as train.py chooses the best checkpoint."""
        name = self.option("schedule", "best_metric", "top1")
        metric = best_metric_key(name) if isinstance(name, str) else "top1"
        sign = -1 if metric == "loss" else 1
        results = [
            (sign * value, BestResult(top1, weights, record.get("epoch")))
            for record in self.records.get("validation", [])
            for weights, prefix in (("raw", ""), ("ema", "ema_"))
            if (value := finite_number(record.get(f"{prefix}{metric}"))) is not None
            and (top1 := finite_number(record.get(f"{prefix}top1"))) is not None
        ]
        top1 = finite_number(self.summary.get("top1"))
        if not results and top1 is not None:
            return BestResult(top1, str(self.summary.get("weights")), None)
        return max(results, key=lambda result: result[0])[1] if results else None

    @property
    def progress(self) -> str:
        """`10 of 300`, with a note if the run is not finished."""
        is_unfinished = not self.summary  # the epoch of the last training step may be incomplete
        epochs = [
            record["epoch"] - (is_unfinished and kind != "validation")
            for kind, records in self.records.items()
            for record in records
            if isinstance(record.get("epoch"), int)
        ]
        text = f"{max(epochs, default=0)} of {self.option('schedule', 'epochs', '?')}"
        return f"{text}, not finished" if is_unfinished else text

    @property
    def speed(self) -> float | None:
        """Images per second in training: the median over the log without its first record."""
        values = [value for _, value in self.points("train", "images_per_second")]
        return statistics.median(values[1:] or values) if values else None

    @property
    def model(self) -> str:
        """Name of the model and, if it is known, its image size: vil_tiny, 224×224."""
        name, size = str(self.option("model", "name", "?")), self.option("model", "image_size")
        sides = size if isinstance(size, list) else [size] * 2
        is_known = len(sides) == 2 and all(type(side) is int for side in sides)
        return f"{name}, {sides[0]}×{sides[1]}" if is_known else name

    @property
    def data(self) -> str:
        """Name of the data set: digits, torch/cifar10, or the last part of its folder."""
        source, root = self.option("data", "source", "?"), self.option("data", "root")
        return Path(root).name if isinstance(root, str) and "/" not in str(source) else str(source)

    @property
    def is_imagenet(self) -> bool:
        """True if the run has 1,000 classes and images of ImageNet, by the name of the source or folder."""
        name = f"{self.option('data', 'source')} {self.option('data', 'root')}".lower()
        is_named = any(part in name for part in ("imagenet", "ilsvrc", "in1k"))
        return is_named and self.option("model", "num_classes") == IMAGENET_CLASSES


def finite_number(value: Any) -> float | None:
    """Return a number of at most `MAX_VALUE`; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_VALUE:
        return None
    return value


def open_runs(folders: Sequence[str]) -> list[Run]:
    """Read the runs in these folders, each once."""
    given = {Path(folder).resolve(): folder for folder in reversed(folders)}
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    names = unique_ends([path.parts for path in paths])
    return [open_run(path, given[path], name) for path, name in zip(paths, names)]


def open_run(path: Path, given: str, name: str) -> Run:
    """Read one run; `given` is the folder as the user wrote it, for messages."""
    if not os.path.isdir(path):
        raise UserError(given, "no such folder")
    if not os.path.isfile(path / CONFIG):
        raise UserError(given, f"the folder holds no run of train.py: {CONFIG} is missing")
    config = read_yaml(path / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{given}/{CONFIG}", "expected a mapping of keys to values")
    warnings: list[str] = []
    records = _read_records(path / METRICS, f"{given}/{METRICS}", warnings)
    summary = _read_summary(path / SUMMARY, f"{given}/{SUMMARY}", warnings)
    for warning in warnings:
        _logger.warning("warning: %s", warning)
    return Run(path, name, read_text(path / CONFIG, MAX_BYTES), config, records, summary, warnings)


def _read_records(path: Path, shown: str, warnings: list[str]) -> dict[str, list[Record]]:
    """Return kind → records of a log; add a warning for each invalid line."""
    by_step: dict[str, dict[int, Record]] = {}
    skipped = []
    try:
        for number, line in enumerate(read_lines(path), start=1):
            if not line.endswith("\n"):
                continue  # being written by a run in progress
            try:
                record = parse_json(line)
                kind, step = record["kind"], record["step"]
                if not isinstance(kind, str) or isinstance(step, bool) or not isinstance(step, int):
                    raise TypeError
                by_step.setdefault(kind, {})[step] = record
            except (ValueError, LookupError, TypeError):
                skipped.append(number)
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.append(f"{shown}: cannot be read: {error_reason(error)}")
        return {}
    warnings += [f"{shown}: line {n} is skipped: not a record of train.py" for n in skipped[:MAX_WARNINGS]]
    if len(skipped) > MAX_WARNINGS:
        warnings.append(f"{shown}: {len(skipped) - MAX_WARNINGS} more lines are skipped")
    return {kind: [records[step] for step in sorted(records)] for kind, records in by_step.items()}


def _read_summary(path: Path, shown: str, warnings: list[str]) -> Record:
    """Return the object in summary.json, or {} without the file; add a warning if it is invalid."""
    if not path.exists():
        return {}
    try:
        summary = parse_json(read_text(path, MAX_JSON_BYTES))[0]
        if isinstance(summary, dict):
            return summary
    except (OSError, ValueError, LookupError, TypeError):
        pass
    warnings.append(f"{shown} is ignored: not a result of eval.py")
    return {}


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return dotted key → value in every run, for the keys in which the runs differ.

    An option that is younger than a run has its default, which is the behavior that the run had. None stands
    for null and for a missing stage.
    """
    defaults = flatten(stored_tree(TrainConfig()))
    values = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for options in values for key in options if key not in UNTRACKED_OPTIONS)
    rows = {key: [options.get(key, defaults.get(key)) for options in values] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, also those in lists, with dotted keys: model.stages[1].blocks."""
    if isinstance(tree, dict) and tree:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        items = [(f"{prefix}[{index}]", item) for index, item in enumerate(tree)]
    else:
        return {prefix: tree}
    return {key: value for name, item in items for key, value in flatten(item, name).items()}
