"""Collect the results of a grid per cell: means over seeds, confidence intervals, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from tools.ablation.grid import Cell, Grid
from tools.ablation.run_status import RunStatus, read_status

CONFIDENCE = 0.95
UNLIMITED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """Mean, sample standard deviation, and half the width of the 95 % confidence interval of the mean.

    The interval is Student's t with n − 1 degrees of freedom. One value has neither deviation nor interval.

    Attributes:
        limits: smallest and largest possible value: the interval ends there.
    """

    n: int
    mean: float
    sd: float | None
    margin: float | None
    limits: tuple[float, float] = UNLIMITED

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % confidence interval."""
        if self.margin is None:
            return None
        low, high = self.limits
        return max(low, self.mean - self.margin), min(high, self.mean + self.margin)


def estimate(values: Sequence[float], limits: tuple[float, float] = UNLIMITED) -> Estimate | None:
    """Return mean, standard deviation and confidence interval; None without values."""
    if not values:
        return None
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Estimate(n, mean, None, None, limits)
    sd = statistics.stdev(values)
    margin = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, margin, limits)


def paired_differences(values: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """Return values − reference for the seeds that both have."""
    return [values[seed] - reference[seed] for seed in values if seed in reference]


@dataclass(frozen=True)
class CellResult:
    """Results of a cell by seed, and Top-1 minus that of the reference, which is `cell` itself for a base."""

    cell: Cell
    reference: Cell
    statuses: Mapping[int, RunStatus]
    differences: Sequence[float]

    @property
    def is_base(self) -> bool:
        """True if other cells are compared with this one."""
        return self.reference is self.cell

    @property
    def failures(self) -> int:
        """Number of failed runs."""
        return sum(status.failure is not None for status in self.statuses.values())

    @property
    def difference(self) -> Estimate | None:
        """Mean paired difference."""
        return estimate(self.differences, (-100, 100))

    def values(self, key: str) -> list[Any]:
        """Return an attribute of `RunMetrics` for all finished runs that have it."""
        return list(_by_seed(self.statuses, key).values())

    def mean(self, key: str) -> Estimate | None:
        """Return the mean of an attribute of `RunMetrics`."""
        return estimate(self.values(key), (0, 100) if key.endswith("top1") else UNLIMITED)

    def median(self, key: str) -> float | None:
        """Return the median of an attribute of `RunMetrics`."""
        values = self.values(key)
        return statistics.median(values) if values else None


def collect(grid: Grid) -> list[CellResult]:
    """Read all runs of the grid, finished or not."""
    statuses: dict[str, dict[int, RunStatus]] = {cell.name: {} for cell in grid.cells}
    for run in grid.runs():
        statuses[run.cell.name][run.seed] = read_status(run)
    top1 = {name: _by_seed(by_seed, "top1") for name, by_seed in statuses.items()}
    results = []
    for cell in grid.cells:
        reference = grid.reference[cell.name]
        is_base = reference is cell
        differences = [] if is_base else paired_differences(top1[cell.name], top1[reference.name])
        results.append(CellResult(cell, reference, statuses[cell.name], differences))
    return results


def _by_seed(statuses: Mapping[int, RunStatus], key: str) -> dict[int, Any]:
    values = {seed: getattr(status.metrics, key, None) for seed, status in statuses.items()}
    return {seed: value for seed, value in values.items() if value is not None}
