"""Checks of a run folder, independent of the project's own reading of checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vil.runtime.run_files import METRICS
from vil.training.metrics_log import TIMING_FIELDS

FOLDER_KEYS = ("config", "versions")
"""Keys of checkpoints in which identical runs in different folders may differ."""
SUMMARY_KEYS = ("top1", "top5", "loss", "images", "params")
"""Keys of summary.json that do not depend on the machine's speed."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without fields of time.

    An incomplete last line is left out, and changed options, which scenarios change between calls.
    """
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {key: record[key] for key in record if key not in TIMING_FIELDS}
        for record in records
        if record["kind"] != "options"
    ]


def logged_steps(folder: Path) -> list[int]:
    """Return the logged training steps in their order; empty if there is no log."""
    try:
        return [record["step"] for record in read_metrics(folder) if record["kind"] == "train"]
    except FileNotFoundError:
        return []


def check_digests(folder: Path) -> list[str]:
    """Return a problem for each checkpoint that does not match the SHA-256 file beside it."""
    problems = []
    for path in checkpoint_files(folder):
        try:
            digests = re.findall("[0-9a-f]{64}", path.with_name(f"{path.name}.sha256").read_text("ascii"))
        except OSError:
            problems.append(f"{path.name} has no digest")
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() not in digests:
            problems.append(f"{path.name} does not match its digest")
    return problems


def checkpoint_files(folder: Path, pattern: str = "*.pt") -> list[Path]:
    """Return the checkpoints of a run, sorted by name."""
    return sorted((folder / "checkpoints").glob(pattern))


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, by its name; 0 if there is none."""
    files = checkpoint_files(folder, "step_*.pt")
    return int(files[-1].stem.removeprefix("step_")) if files else 0


def folder_digests(folder: Path) -> dict[str, str]:
    """Return name → SHA-256 of all files in the folder of checkpoints."""
    files = checkpoint_files(folder, "*")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def compare_runs(folder: Path, reference: Path) -> list[str]:
    """Return the differences of a finished run from a reference, its checkpoints and logs."""
    problems = []
    for path in (checkpoint_files(reference, "step_*.pt")[-1], reference / "checkpoints" / "best.pt"):
        name = path.relative_to(reference)
        try:
            problems += [f"{name}: {key}" for key in compare_checkpoints(folder / name, path)]
        except FileNotFoundError:
            problems.append(f"{name} is missing")
    records, expected = read_metrics(folder), read_metrics(reference)
    for record, other in zip(records, expected):
        if keys := sorted(key for key in {*record, *other} if record.get(key) != other.get(key)):
            label = f"{other['kind']} of step {other['step']}"
            problems.append(f"{METRICS}: {label} differs in {', '.join(keys)}")
    if len(records) != len(expected):
        problems.append(f"{METRICS} has {len(records)} lines, not {len(expected)}")
    if _read_summary(folder) != _read_summary(reference):
        problems.append("summary.json differs")
    return problems


def compare_checkpoints(path: Path, reference: Path) -> list[str]:
    """Return the dotted keys of the values in which two checkpoints are not bit-identical."""
    bits, expected = (
        {key: _bits(value) for key, value in _leaves(torch.load(p, map_location="cpu", weights_only=True))}
        for p in (path, reference)
    )
    differing = [key for key in {**expected, **bits} if bits.get(key) != expected.get(key)]
    return [key for key in differing if key.partition(".")[0] not in FOLDER_KEYS]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping | list | tuple):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _bits(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1)
        return value.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes()
    return type(value), repr(value)  # repr of a float is exact


def _read_summary(folder: Path) -> object:
    try:
        results = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return type(error)
    return [[result.get(key) for key in SUMMARY_KEYS] for result in results]
