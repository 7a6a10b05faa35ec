"""Means over seeds, and how far they can be trusted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values.

    Attributes:
        sd: their standard deviation (n − 1 in the denominator); None for one value.
        margin: half the width of the 95 % interval of the mean, by Student's t with n − 1 degrees of freedom;
            None for one value.
    """

    n: int
    mean: float
    sd: float | None
    margin: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % interval."""
        return None if self.margin is None else (self.mean - self.margin, self.mean + self.margin)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, standard deviation and interval; None of nothing."""
    if not values:
        return None
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Estimate(n, mean, None, None)
    sd = statistics.stdev(values)
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Estimate(n, mean, sd, quantile * sd / math.sqrt(n))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The difference values − reference over the seeds that both have; None where there is none."""
    return estimate([values[seed] - reference[seed] for seed in values if seed in reference])
