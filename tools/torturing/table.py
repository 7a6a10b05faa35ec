"""The table: one row per fault, made of the times that it was tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tools.torturing.lives import StuckError

HEADINGS = ("fault", "ranks", "tried", "survived", "lost steps", "bit-identical", "exit statuses")


@dataclass
class Trial:
    """One time that a fault was tried.

    Attributes:
        problems: what was not as it should be; none where the run survived.
        lost: steps that had to be done again; None where that is not the question.
        identical: whether the run ended as the undisturbed one; None where it does not end so by design.
        statuses: exit statuses of train.py, or of torchrun.
    """

    problems: list[str] = field(default_factory=list)
    lost: int | None = None
    identical: bool | None = None
    statuses: list[int] = field(default_factory=list)

    def expect(self, holds: Any, otherwise: str) -> None:
        """Notes a problem unless `holds`."""
        if not holds:
            self.problems.append(otherwise)

    def expect_status(self, statuses: Sequence[int], *allowed: int) -> None:
        """Notes the exit statuses of a life, and a problem unless each is one of `allowed`."""
        self.statuses += statuses
        words = " or ".join(map(str, allowed))
        self.expect(set(statuses) <= set(allowed), f"exit status {list(statuses)}, not {words}")

    def lose(self, steps: int) -> None:
        """Notes steps that have to be done again; the most at one time count."""
        self.lost = max(self.lost or 0, steps)

    def judge(self, differences: Sequence[str]) -> None:
        """Notes whether the finished run is the undisturbed one's twin."""
        self.identical = not differences and self.identical is not False
        self.problems += differences


@dataclass
class Row:
    """A fault and all times that it was tried."""

    fault: str
    ranks: int
    trials: list[Trial] = field(default_factory=list)
    note: str = ""

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """One more time; what gets stuck has not survived."""
        self.trials.append(Trial())
        with self.last_trial() as trial:
            yield trial

    @contextmanager
    def last_trial(self, what: str = "") -> Iterator[Trial]:
        """The last time, for what shows only later."""
        trial, began = self.trials[-1], time.monotonic()
        try:
            yield trial
        except (StuckError, OSError, ValueError, LookupError, RuntimeError) as error:  # the others go on
            trial.problems.append(f"{type(error).__name__}: {error}")
        outcome = "survived" if not trial.problems else "NOT SURVIVED"
        print(f"{self.fault}{what}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
        for problem in trial.problems[:10]:
            print(f"  {problem}", flush=True)

    def record(self) -> dict[str, Any]:
        """The row as plain values."""
        lost = [trial.lost for trial in self.trials if trial.lost is not None]
        identical = [trial.identical for trial in self.trials if trial.identical is not None]
        return {
            "fault": self.fault,
            "ranks": self.ranks,
            "tried": len(self.trials),
            "survived": sum(not trial.problems for trial in self.trials),
            "lost_steps": max(lost) if lost else None,
            "identical": all(identical) if identical else None,
            "statuses": sorted({status for trial in self.trials for status in trial.statuses}),
            "problems": [problem for trial in self.trials for problem in trial.problems],
            "note": self.note,
        }

    @property
    def survived(self) -> bool:
        """Whether every trial was survived; nothing was where nothing was tried for no reason."""
        return all(not trial.problems for trial in self.trials) and bool(self.trials or self.note)


def cells(record: dict[str, Any]) -> list[str]:
    """A row in words."""
    lost, identical = record["lost_steps"], record["identical"]
    return [
        record["fault"] + (f" ({record['note']})" if record["note"] else ""),
        str(record["ranks"]),
        str(record["tried"]),
        str(record["survived"]),
        "–" if lost is None else str(lost),
        "–" if identical is None else ("yes" if identical else "NO"),
        ", ".join(map(str, record["statuses"])) or "–",
    ]


def text(records: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    rows = [list(HEADINGS), *map(cells, records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    pads: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * 4, str.ljust, str.ljust]
    return "\n".join("  ".join(p(c, w) for p, c, w in zip(pads, row, widths)).rstrip() for row in rows)


def markdown(records: Sequence[dict[str, Any]], command: str) -> str:
    """The table for a page, and the command that it comes from."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|--:|--:|--:|--:|---|---|"]
    lines += [f"| {' | '.join(cells(record))} |" for record in records]
    lines += ["", "Lost steps: those done again after a fault, the most at one time. Exit statuses below 0"]
    lines += ["name the signal that killed the process. From", "", f"    {command}", ""]
    return "\n".join(lines)
