"""Results of fault injection: trials, and the table with one row per fault."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from tools.markdown_table import markdown_table
from vil.runtime.console import print_text


@dataclass
class Trial:
    """One injected fault.

    Attributes:
        fault: row of the table.
        ranks: number of processes that trained together.
        problems: unmet expectations; empty if the run survived.
        lost_steps: steps that had to be repeated; None where that does not apply.
        is_identical: True if the run ended exactly like the fault-free one; None where it must not.
        statuses: exit statuses of train.py, or of torchrun.
    """

    fault: str
    ranks: int
    problems: list[str] = field(default_factory=list)
    lost_steps: int | None = None
    is_identical: bool | None = None
    statuses: list[int] = field(default_factory=list)

    def check(self, holds: object, problem: str) -> None:
        """Add a problem unless `holds`."""
        if not holds:
            self.problems.append(problem)

    def check_status(self, status: int, *allowed: int) -> None:
        """Add an exit status, and a problem unless it is one of `allowed`."""
        self.statuses.append(status)
        self.check(status in allowed, f"exit status {status}, not {' or '.join(map(str, allowed))}")

    def add_lost_steps(self, steps: int) -> None:
        """Add steps that have to be repeated; the table shows the most at one time."""
        self.lost_steps = max(self.lost_steps or 0, steps)

    def add_comparison(self, differences: Sequence[str]) -> None:
        """Add the differences of the finished run from the fault-free one."""
        self.is_identical = not differences and self.is_identical is not False
        self.problems += differences


class Report:
    """All trials of a call of the program."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.skipped: dict[str, str] = {}
        """Scenario that could not be tried → reason."""

    @contextmanager
    def trial(self, fault: str, ranks: int = 1) -> Iterator[Trial]:
        """Record a trial and print its outcome; an exception is a problem of the trial."""
        trial, start = Trial(fault, ranks), time.monotonic()
        self.trials.append(trial)
        try:
            yield trial
        except (psutil.Error, OSError, ValueError, LookupError, RuntimeError) as error:
            trial.problems.append(f"{type(error).__name__}: {error}")
        outcome = "NOT SURVIVED" if trial.problems else "survived"
        print_text(f"{trial.fault}: {outcome}, {time.monotonic() - start:.0f} s")
        for problem in trial.problems[:10]:
            print_text(f"  {problem}")

    @property
    def has_survived(self) -> bool:
        """True if every run survived."""
        return not any(trial.problems for trial in self.trials)

    def table(self) -> str:
        """Return the table of all faults."""
        rows: dict[tuple[str, int], list[Trial]] = {}
        for trial in self.trials:
            rows.setdefault((trial.fault, trial.ranks), []).append(trial)
        return markdown_table([_cells(trials) for trials in rows.values()])


def _cells(trials: Sequence[Trial]) -> dict[str, str]:
    lost = [trial.lost_steps for trial in trials if trial.lost_steps is not None]
    identical = [trial.is_identical for trial in trials if trial.is_identical is not None]
    return {
        "fault": trials[0].fault,
        "ranks": str(trials[0].ranks),
        "tried": str(len(trials)),
        "survived": str(sum(not trial.problems for trial in trials)),
        "lost steps": str(max(lost)) if lost else "–",
        "bit-identical": ("yes" if all(identical) else "NO") if identical else "–",
        "exit statuses": ", ".join(map(str, sorted({s for trial in trials for s in trial.statuses}))) or "–",
    }
