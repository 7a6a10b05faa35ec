"""Processes of sections: one each, with a time limit, since a CUDA error lasts as long as its process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_check.report import NotApplicableError, Outcome, Report, read_rows

NOT_APPLICABLE = 3
"""Exit status of a section that has nothing to do here."""


@dataclass(frozen=True)
class Options:
    """What sections need to know.

    Attributes:
        device: `cuda` or `cpu`.
        folder: for files of the sections; exists.
        images: folder with train/<class>/<image>, for the loader; None for images that are made up.
        cifar10: folder with train/<class> and test/<class>, or with cifar-10-batches-py; None without.
        deadline: `time.time()` at which the section is stopped; those that can, end before.
    """

    device: str
    folder: Path
    images: Path | None = None
    cifar10: Path | None = None
    deadline: float = float("inf")

    @property
    def small(self) -> bool:
        """Small shapes, for a machine without a GPU, where nothing that is measured means much."""
        return self.device == "cpu"

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.time()


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: on the command line and in the table.
        run: adds rows; an exception fails the section. Must be importable by name.
        about: what it does, for the help.
        limit: seconds after which it is stopped.
        least: seconds of the budget without which it is not begun.
    """

    name: str
    run: Callable[[Options, Report], None]
    about: str
    limit: float
    least: float


class RunningSection:
    """A section in a process group of its own."""

    def __init__(self, section: Section, options: Options) -> None:
        self.section, self.options = section, options
        self.began = time.time()
        self.rows = options.folder / f"{section.name}.rows.jsonl"
        self.log = options.folder / f"{section.name}.log"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tools.gpu_check.sections"])
        self.process = context.Process(target=_work, args=(section.run, options, self.rows, self.log))
        self.process.start()

    def finish(self) -> Outcome:
        """Wait until the section has ended, or end it at its deadline."""
        self.process.join(max(0.0, self.options.seconds_left()))
        timed_out = self.process.is_alive()
        self.stop()
        outcome = Outcome(self.section.name, "passed", time.time() - self.began, rows=read_rows(self.rows))
        if timed_out:
            limit = self.options.deadline - self.began
            outcome.status, outcome.reason = "timed out", f"stopped after {limit:.0f} s"
        elif self.process.exitcode == NOT_APPLICABLE:
            outcome.status, outcome.reason = "skipped", _last_line(self.log)
        elif self.process.exitcode:
            outcome.status, outcome.reason = "failed", self._reason()
        return outcome

    def stop(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()

    def _reason(self) -> str:
        code = self.process.exitcode or 0
        if code == 1 and any(row.passed is False for row in read_rows(self.rows)):  # these say what
            return ""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return _last_line(self.log) or how


def _last_line(log: Path) -> str:
    if not log.exists():
        return ""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _work(run: Callable[[Options, Report], None], options: Options, rows: Path, log: Path) -> None:
    """The process of a section: output goes to `log`, rows to `rows`; exit status 1 where it failed."""
    os.setsid()  # so that what it starts can be ended with it
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    report = Report(rows, has_targets=not options.small)
    try:
        run(options, report)
    except NotApplicableError as error:
        print(error, file=sys.stderr)
        raise SystemExit(NOT_APPLICABLE) from None
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(int(report.failed))
