"""Print the progress of a grid as lines and, on a terminal, as a bar over the epochs of all runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tools.ablation.grid import Run
from tools.ablation.run_status import RunStatus, completed_epochs


class Progress:
    """Count the finished runs and epochs of all unfinished runs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.run_count, self.finished_runs = len(runs), 0
        self.initial_epochs = {run.folder: min(completed_epochs(run), run.epochs) for run in runs}
        self.total_epochs = sum(run.epochs for run in runs) - sum(self.initial_epochs.values())
        self.finished_epochs = 0
        self.running: dict[Path, Run] = {}
        self.locked: set[Path] = set()
        self.start_time, self.run_start_times = time.monotonic(), dict[Path, float]()
        self.last_refresh = 0.0
        self.bar = tqdm(total=self.total_epochs, unit="epoch", leave=False, disable=None)

    def run_started(self, run: Run) -> None:
        """Note that a process was started for the run."""
        self.run_start_times[run.folder] = time.monotonic()
        self.running[run.folder] = run
        tqdm.write(f"{run.name}: started, {run.folder}")

    def run_locked(self, run: Run) -> None:
        """Note that another process trains the run."""
        if run.folder not in self.locked:
            self.locked.add(run.folder)
            tqdm.write(f"{run.name}: waiting for another process that trains it, {run.folder}")

    def run_ended(self, status: RunStatus) -> None:
        """Note that a run is finished or has failed."""
        run = status.run
        self.finished_runs += 1
        self.running.pop(run.folder, None)
        epochs = run.epochs - self.initial_epochs[run.folder]
        if status.metrics:
            self.finished_epochs += epochs
        else:  # an early failure says nothing about the speed of the other runs
            self.total_epochs -= epochs
        start = self.run_start_times.get(run.folder)
        duration = f", {tqdm.format_interval(time.monotonic() - start)}" if start else ""
        result = f"Top-1 {status.metrics.top1:.2f} %" if status.metrics else f"failed: {status.failure}"
        count = f"[{self.finished_runs}/{self.run_count}]"
        tqdm.write(f"{count} {run.name}: {result}{duration}{self._remaining_time()}")

    def refresh(self) -> None:
        """Update the bar with the epochs logged by the running processes."""
        if self.bar.disable or time.monotonic() - self.last_refresh < 1:
            return
        self.last_refresh = time.monotonic()
        self.bar.n = min(self.total_epochs, self._epochs())
        self.bar.set_description(" · ".join(run.name for run in self.running.values()), refresh=False)
        self.bar.refresh()

    def _epochs(self) -> int:
        """Return the number of epochs since the start, including those of running processes."""
        running = self.running.values()
        return self.finished_epochs + sum(
            max(0, completed_epochs(run) - self.initial_epochs[run.folder]) for run in running
        )

    def _remaining_time(self) -> str:
        epochs = self._epochs()
        remaining = self.total_epochs - epochs
        if not remaining or not epochs:
            return ""
        seconds = (time.monotonic() - self.start_time) / epochs * remaining
        return f"; about {tqdm.format_interval(seconds)} left"
