"""A run's folder as the report reads it: finished or in progress, with whatever it has logged so far."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vil.config import ConfigError, TrainConfig
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_lines, read_text
from vil.schema import stored_tree
from vil.training.logging import METRICS
from vil.training.run_folder import CONFIG, SILENT, SUMMARY
from vil.yaml_files import MAX_BYTES, read_yaml

Record = dict[str, Any]
MAX_WARNINGS = 20
MAX_NUMBER = 1e30
"""The largest number of a log that is shown."""
_logger = logging.getLogger("vil.report")  # a child of vil, whose records are shown


@dataclass(frozen=True)
class Best:
    """The highest Top-1 of a run: in per cent, of which weights, and after which epoch."""

    top1: float
    weights: str
    epoch: int | None


@dataclass
class Run:
    """One run.

    Attributes:
        folder: where it is.
        name: how the page calls it: as much of the folder's path as tells it from the others.
        text: config.yaml as it stands.
        config: the same, read: sections and options.
        records: the lines of metrics.jsonl by their kind, each in the order of steps.
        summary: the result of the best model; empty while the run is not finished.
        warnings: what could not be read, a line each.
        counted: params and flops of a run that is not finished, where they could be counted.
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
        """A value of config.yaml, which may lack it."""
        values = self.config.get(section)
        return values.get(key, default) if isinstance(values, dict) else default

    def points(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of every record that has a number there."""
        found = [(record["step"], number(record.get(key))) for record in self.records.get(kind, [])]
        return [(step, value) for step, value in found if value is not None]

    def last(self, kind: str, key: str) -> float | None:
        """The last number of its kind."""
        found = self.points(kind, key)
        return found[-1][1] if found else None

    def cost(self, key: str) -> float | None:
        """A figure of what the model costs: params, flops, train_memory_mb, ... as eval.py has them."""
        value = number(self.summary.get(key))
        return number(self.counted.get(key)) if value is None else value

    @property
    def best(self) -> Best | None:
        """Of all evaluations, as train.py keeps the best checkpoint; the first one that reached it."""
        found = [
            Best(value, weights, record.get("epoch"))
            for record in self.records.get("validation", [])
            for weights, key in (("raw", "top1"), ("ema", "ema_top1"))
            if (value := number(record.get(key))) is not None
        ]
        top1 = number(self.summary.get("top1"))
        if not found and top1 is not None:
            return Best(top1, str(self.summary.get("weights")), None)
        return max(found, key=lambda best: best.top1, default=None)

    @property
    def progress(self) -> str:
        """How far it has come: `10 of 300 epochs`, and whether it is finished."""
        begun = not self.summary  # the epoch of the last step may not be over
        epochs = [
            record["epoch"] - (begun and kind != "validation")
            for kind, records in self.records.items()
            for record in records
            if isinstance(record.get("epoch"), int)
        ]
        done = f"{max(epochs, default=0)} of {self.option('schedule', 'epochs', '?')}"
        return done if self.summary else f"{done}, not finished"

    @property
    def speed(self) -> float | None:
        """Images per second in training, the median of the log without its first step."""
        values = [value for _, value in self.points("train", "images_per_second")]
        return statistics.median(values[1:] or values) if values else None

    @property
    def data(self) -> str:
        """Its images in a word: digits, torch/cifar10, or the last part of the folder."""
        source, root = self.option("data", "source", "?"), self.option("data", "root")
        return Path(root).name if isinstance(root, str) and "/" not in str(source) else str(source)


def number(value: Any) -> float | None:
    """Return a number whose sums are finite; None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        return None
    return value


def open_runs(folders: Sequence[str]) -> list[Run]:
    """Reads the runs in these folders, each once.

    Raises:
        ConfigError: a folder holds no run, or a configuration that cannot be read.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    given = {Path(folder).resolve(): folder for folder in reversed(folders)}
    return [open_run(path, given[path], name) for path, name in zip(paths, _names(paths))]


def open_run(path: Path, given: str, name: str) -> Run:
    """Reads one run; `given` is the folder as the user wrote it."""
    if not path.is_dir():
        raise ConfigError(given, "no such folder")
    if not (path / CONFIG).is_file():
        raise ConfigError(given, f"the folder holds no run of train.py: {CONFIG} is missing")
    config = read_yaml(path / CONFIG)
    if not isinstance(config, dict):
        raise ConfigError(f"{given}/{CONFIG}", "expected a mapping of keys to values")
    text = read_text(path / CONFIG, MAX_BYTES)
    records, warnings = _read_records(path / METRICS, f"{given}/{METRICS}")
    summary, problem = _read_summary(path / SUMMARY, f"{given}/{SUMMARY}")
    warnings += problem
    for warning in warnings:
        _logger.warning("warning: %s", warning)
    return Run(path, name, text, config, records, summary, warnings)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: a, b; or x/a, y/a."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_records(path: Path, shown: str) -> tuple[dict[str, list[Record]], list[str]]:
    """The records by kind, and a line about each that cannot be used. No file is no record yet."""
    try:
        records, skipped = _records(path)
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{shown}: cannot be read: {error.strerror or error}"]
    warnings = [
        f"{shown}: line {line} is skipped: not a record of train.py" for line in skipped[:MAX_WARNINGS]
    ]
    if len(skipped) > MAX_WARNINGS:
        warnings.append(f"{shown}: {len(skipped) - MAX_WARNINGS} more lines are skipped")
    by_step: dict[str, dict[int, Record]] = {}
    for record in records:
        by_step.setdefault(record["kind"], {})[record["step"]] = record
    return {kind: [found[step] for step in sorted(found)] for kind, found in by_step.items()}, warnings


def _records(path: Path) -> tuple[list[Record], list[int]]:
    """Return the records of a log, and the numbers of the lines that are none. Raises OSError."""
    records, skipped = [], []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.endswith("\n"):
            continue  # the last line of a run in progress, which is being written
        try:
            record = parse_json(line)
            kind, step = record["kind"], record["step"]
            if not isinstance(kind, str) or isinstance(step, bool) or not isinstance(step, int):
                raise TypeError
        except (ValueError, LookupError, TypeError):
            skipped.append(number)
            continue
        records.append(record)
    return records, skipped


def _read_summary(path: Path, shown: str) -> tuple[Record, list[str]]:
    """summary.json's object, empty without the file, and a line where it cannot be used."""
    if not path.exists():
        return {}, []
    try:
        found = parse_json(read_text(path, MAX_JSON_BYTES))[0]
        if not isinstance(found, dict):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError):
        return {}, [f"{shown} is passed over: not a result of eval.py"]
    return found, []


# --- Configurations -----------------------------------------------------------------------------------------


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key → its value in every run, for the keys in which the runs differ.

    An option that a run's configuration does not have, because it is older than the option, has the default:
    what it does then is what was always done. None stands for a null and for a stage that is not there.
    """
    defaults = leaves(stored_tree(TrainConfig()))
    values = [leaves(run.config) for run in runs]
    keys = dict.fromkeys(key for found in values for key in found)
    rows = {key: [found.get(key, defaults.get(key)) for found in values] for key in keys}
    return {
        key: row
        for key, row in rows.items()
        if key not in SILENT and any(value != row[0] for value in row[1:])
    }


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, also those in lists (stages), as dotted keys: model.stages[1].blocks."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= leaves(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for place, item in enumerate(value):
                found |= leaves(item, f"{name}[{place}].")
        else:
            found[name] = value
    return found
