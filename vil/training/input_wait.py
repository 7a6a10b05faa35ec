"""How much of a run is spent waiting for images, and what to do about it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vil.config import DataConfig

INPUT_BOUND = 0.2
"""Share of the time from which on a run is called input-bound."""
FEWEST_STEPS = 20
"""Steps of an epoch that tell something: its first one, which waits for the first images, is not counted."""


class InputWait:
    """Time of an epoch, and what of it was spent waiting for images; counted from its second step on."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new epoch."""
        self._began, self._waited, self._steps = 0.0, 0.0, -1

    def step(self) -> None:
        """A step has ended."""
        self._steps += 1
        if self._steps == 0:
            self._began, self._waited = time.perf_counter(), 0.0

    def add(self, seconds: float) -> None:
        """Images were waited for."""
        self._waited += seconds

    def share(self) -> float:
        """Of the time so far, 0 to 1; 0 in an epoch too short to tell."""
        if self._steps < FEWEST_STEPS:
            return 0.0
        return self._waited / (time.perf_counter() - self._began)


class StepClock:
    """Seconds per step, and what of them was spent waiting for images."""

    def __init__(self) -> None:
        self.epoch = InputWait()
        self.reset()

    def reset(self) -> None:
        """Begins the steps of which `averages` tells."""
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for images."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.waited += seconds
        self.epoch.add(seconds)

    def step(self) -> None:
        """A step has ended."""
        self.steps += 1
        self.epoch.step()

    def averages(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        means = {
            "step_time": (time.perf_counter() - self.began) / self.steps,
            "data_wait": self.waited / self.steps,
        }
        self.reset()
        return means


def input_bound_warning(share: float, data: DataConfig) -> str | None:
    """One line for a run that waited for images for this share of an epoch; None where that is little."""
    if share < INPUT_BOUND:
        return None
    cores = cores_per_rank()
    if data.workers < cores:
        remedy = f"raise data.workers, now {data.workers}, up to {cores}, the cores of each rank"
    elif data.source == "ffcv":
        remedy = "write smaller images with tools/write_ffcv.py --max_resolution, or take more cores"
    else:
        remedy = f"all {cores} cores of a rank load images: write them for data.source ffcv (docs/data.md)"
    return f"input-bound: {100 * share:.0f} % of the time went to waiting for images; {remedy}"


def cores_per_rank() -> int:
    """Cores of this machine that each of the processes that torchrun started on it can have."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
