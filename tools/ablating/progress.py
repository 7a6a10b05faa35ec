"""What happens, as lines; on a terminal also a bar over the epochs of all runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tools.ablating.grid import Run
from tools.ablating.runs import Outcome, epochs_done


class Progress:
    """Counts runs and epochs.

    Args:
        runs: all that are to be done.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.done_before = {run.folder: min(epochs_done(run), _epochs_of(run)) for run in runs}
        self.total = sum(map(_epochs_of, runs)) - sum(self.done_before.values())
        self.runs = len(runs)
        self.running = list[Run]()
        self.epochs, self.ended_runs = 0, 0
        self.waited_for = set[Path]()
        self.began, self.run_began = time.monotonic(), dict[Path, float]()
        self.looked = 0.0
        self.bar = tqdm(total=self.total, unit="epoch", leave=False, disable=None)

    def started(self, run: Run) -> None:
        """A process was started."""
        self.run_began[run.folder] = time.monotonic()
        self.running.append(run)
        self.say(f"{title(run)}: started, {run.folder}")

    def taken(self, run: Run) -> None:
        """Another process is at work on the run."""
        if run.folder not in self.waited_for:
            self.waited_for.add(run.folder)
            self.say(f"{title(run)}: another process is at work on it, {run.folder}")

    def ended(self, outcome: Outcome) -> None:
        """A run is finished, or has failed."""
        run = outcome.run
        self.ended_runs += 1
        self.running = [other for other in self.running if other.folder != run.folder]
        if outcome.found:
            self.epochs += _epochs_of(run) - self.done_before[run.folder]
        else:  # it is over before its time, which tells nothing of the others'
            self.total -= _epochs_of(run) - self.done_before[run.folder]
        began = self.run_began.get(run.folder)
        took = f", {clock(time.monotonic() - began)}" if began else ""
        found = f"Top-1 {outcome.found.top1:.2f} %" if outcome.found else f"failed: {outcome.failure}"
        self.say(f"[{self.ended_runs}/{self.runs}] {title(run)}: {found}{took}{self._estimate()}")

    def show(self) -> None:
        """Moves the bar to the epochs that the processes have logged."""
        if self.bar.disable or time.monotonic() - self.looked < 1:
            return
        self.looked = time.monotonic()
        self.bar.n = min(self.total, self._epochs())
        self.bar.set_description(" · ".join(map(title, self.running)), refresh=False)
        self.bar.refresh()

    def say(self, line: str) -> None:
        """One line on standard output, above the bar."""
        tqdm.write(line)

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()

    def _epochs(self) -> int:
        """Epochs since the beginning, those of unfinished runs among them."""
        of_running = (max(0, epochs_done(run) - self.done_before[run.folder]) for run in self.running)
        return self.epochs + sum(of_running)

    def _estimate(self) -> str:
        epochs = self._epochs()
        left = self.total - epochs
        if not left or not epochs:
            return ""
        return f"; about {clock((time.monotonic() - self.began) / epochs * left)} left"


def title(run: Run) -> str:
    """Cell and seed."""
    return f"{run.cell.name}, seed {run.seed}"


def clock(seconds: float) -> str:
    """75 → 1 min 15 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def _epochs_of(run: Run) -> int:
    return run.cell.config.schedule.epochs
