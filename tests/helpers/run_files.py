"""The files of runs: what they log, and whether two checkpoints are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vil.training.metrics_log import TIMING_FIELDS


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMING_FIELDS}


def all_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a run, or those of one kind, without the fields that depend on the clock."""
    return [without_times(record) for record in all_records(folder) if kind in (None, record["kind"])]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


def is_equal(one: Any, other: Any) -> bool:
    """Return True if two checkpoints are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other
