"""Processes of sections: one each, with a time limit, as a CUDA error persists until its process ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tools.benchmarks.timing import Rates, measure_rates
from tools.gpu_check.report import NotApplicableError, Outcome, Report, read_rows
from vil.errors import one_line

NOT_APPLICABLE_STATUS = 3


@dataclass(frozen=True)
class Options:
    """Options of all sections.

    Attributes:
        device: `cuda` or `cpu`.
        folder: existing folder for files of the sections.
        images: folder with train/<class>/<image> for the loader; None: synthetic images.
        cifar10: folder with train/<class> and test/<class>, or with cifar-10-batches-py.
        deadline: `time.time()` at which the budget ends; for a running section, at which it is stopped.
        seed: of the random inputs of the section `kernels`.
    """

    device: str
    folder: Path
    images: Path | None = None
    cifar10: Path | None = None
    deadline: float = float("inf")
    seed: int = 0

    @property
    def is_small(self) -> bool:
        """True on a CPU: small shapes that only test this program."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def measure_rates(self, precision: str) -> Rates:
        """Return the peak rates of the device."""
        sizes = (2**20, 64) if self.is_small else None
        return measure_rates(torch.device(self.device), getattr(torch, precision), sizes)


@dataclass(frozen=True)
class Section:
    """A section of the check; it is skipped if less than `min_seconds` are left of the budget."""

    name: str
    run: Callable[[Options, Report], None]
    description: str
    max_seconds: float
    min_seconds: float


def limit_time(options: Options, section: Section) -> Options:
    """Return the options of a section that starts now; time limits of small shapes are ten times longer."""
    limit = section.max_seconds * (10 if options.is_small else 1)
    return replace(options, deadline=min(options.deadline, time.time() + limit))


class RunningSection:
    """A section in a new process group."""

    def __init__(self, section: Section, options: Options) -> None:
        self.section, self.start = section, time.time()
        self.rows = options.folder / f"{section.name}.rows.jsonl"
        self.log = options.folder / f"{section.name}.log"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tools.gpu_check.program"])
        self.process = context.Process(target=_run_section, args=(section, options, self.rows, self.log))
        self.process.start()  # the first one waits for imports, which do not count
        self.options = limit_time(options, section)

    def finish(self) -> Outcome:
        """Wait for the section until its deadline, then stop it."""
        self.process.join(max(0.0, self.options.seconds_left))
        has_timed_out = self.process.is_alive()
        self.stop()
        code = self.process.exitcode or 0
        outcome = Outcome(self.section.name, "passed", time.time() - self.start, rows=read_rows(self.rows))
        if has_timed_out:
            outcome.status = "timed out"
            outcome.reason = f"stopped after {outcome.seconds:.0f} s"
        elif code == NOT_APPLICABLE_STATUS:
            outcome.status, outcome.reason = "skipped", last_line(self.log)
        elif code:
            outcome.status = "failed"
            if code != 1 or not any(row.passed is False for row in outcome.rows):
                status = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                outcome.reason = last_line(self.log) or status
        return outcome

    def stop(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


def last_line(log: Path) -> str:
    """Return the start of the last line of a file that is not empty."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def redirect_output(log: Path) -> None:
    """Append standard output and standard error of this process to a file."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _run_section(section: Section, options: Options, rows: Path, log: Path) -> None:
    """Run a section in this process; exit with status 1 if it fails."""
    os.setsid()  # a process group, which `stop` ends
    redirect_output(log)
    report = Report(rows, has_targets=not options.is_small)
    try:
        section.run(limit_time(options, section), report)
    except NotApplicableError as error:
        print(error, file=sys.stderr)
        raise SystemExit(NOT_APPLICABLE_STATUS) from None
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {one_line(error, 300)}", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(int(report.has_failed))
