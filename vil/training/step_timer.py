"""Time per step, and the share of it that training waits for images."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

INPUT_BOUND_SHARE = 0.2
"""Share of the time spent waiting for images from which on a run is called input-bound."""
MIN_EPOCH_STEPS, MIN_EPOCH_SECONDS = 20, 10.0
"""Steps and time without which an epoch is too short to be judged: a moment of other load would count."""


class StepTimer:
    """Measure the time of steps, and the waiting for images in them: between two logged steps, and per epoch.

    The first step of an epoch, which waits for the workers to start, does not count for the epoch.
    """

    def __init__(self) -> None:
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Start an epoch, and the interval of `averages`."""
        self._epoch_steps, self._epoch_start, self._epoch_wait = -1, 0.0, 0.0
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._steps, self._start, self._wait = 0, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the context as waiting for images."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._wait += seconds
        self._epoch_wait += seconds

    def end_step(self) -> None:
        """Count a step."""
        self._steps += 1
        self._epoch_steps += 1
        if self._epoch_steps == 0:
            self._epoch_start, self._epoch_wait = time.perf_counter(), 0.0

    def averages(self) -> dict[str, float]:
        """Return the means over the steps since the last call, in seconds per step."""
        means = {
            "step_time": (time.perf_counter() - self._start) / self._steps,
            "data_wait": self._wait / self._steps,
        }
        self._begin_interval()
        return means

    def waiting_share(self) -> float:
        """Return the share of the epoch spent waiting, 0 to 1; 0 for an epoch that is too short."""
        seconds = time.perf_counter() - self._epoch_start
        if self._epoch_steps < MIN_EPOCH_STEPS or seconds < MIN_EPOCH_SECONDS:
            return 0.0
        return self._epoch_wait / seconds


def input_bound_warning(waiting_share: float, workers: int) -> str | None:
    """Return one line with advice for an input-bound run, by its number of workers; None for any other."""
    if waiting_share < INPUT_BOUND_SHARE:
        return None
    cores = cores_per_rank()
    if workers < cores:
        advice = f"raise data.workers (now {workers}) up to {cores}, the cores per rank"
    else:
        advice = f"all {cores} cores per rank load images: use smaller images or another data.source"
        advice += " (docs/data.md), or more cores"
    return f"input-bound: {100 * waiting_share:.0f} % of the time is spent waiting for images; {advice}"


def cores_per_rank() -> int:
    """Return the cores of this machine for each process that torchrun started on it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
