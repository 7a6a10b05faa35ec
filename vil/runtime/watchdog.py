"""A thread that reports a hanging run, and ends a process that does not respond to a signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vil.runtime.console import print_line

_ROOT = Path(__file__).parents[2]
_FILE_SYSTEM_TIMEOUT_S = 5.0
"""Seconds to wait for the list of checkpoints before the process ends."""


class Watchdog:
    """Print the current line of the main thread if it makes no progress.

    A run that hangs is not ended, unless `exit_on_hang` is set: a slow disk may recover, and
    collectives have a longer timeout. A process that does not end within the grace period of a signal is
    ended without saving.

    Args:
        rank: of this process.
        hang_timeout: seconds without progress after which to report.
        grace_period: seconds between the signal and the end of the process.
        exit_on_hang: end the process with status 1 after the report.
        stop_signal: returns the number of the signal that ends the process, 0 for none.
        last_checkpoint: returns a clause that names the last checkpoint.
    """

    def __init__(
        self,
        rank: int,
        hang_timeout: float,
        grace_period: float,
        exit_on_hang: bool = False,
        *,
        stop_signal: Callable[[], int],
        last_checkpoint: Callable[[], str] = lambda: "nothing was saved",
    ) -> None:
        self._rank, self._hang_timeout, self._grace_period = rank, hang_timeout, grace_period
        self._exit_on_hang, self._last_checkpoint = exit_on_hang, last_checkpoint
        self._stop_signal = stop_signal
        self._stop_time: float | None = None
        self._main_thread = threading.current_thread().ident or 0
        self._stopped = threading.Event()
        self.report_progress("starting")

    @contextmanager
    def running(self) -> Iterator[Watchdog]:
        """Watch the calling thread inside the context."""
        self.report_progress(self._activity)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            thread.join()

    def report_progress(self, activity: str) -> None:
        """Note that the run makes progress and begins `activity`, for example "computing step 5"."""
        self._activity, self._progress_time, self._is_reported = activity, time.monotonic(), False

    def _watch(self) -> None:
        interval = min(self._hang_timeout / 10, self._grace_period / 10, 1.0)
        while not self._stopped.wait(interval):
            now = time.monotonic()
            stop_signal = self._stop_signal()
            if stop_signal and self._stop_time is None:
                self._stop_time = now
            if self._stop_time is not None and now - self._stop_time > self._grace_period:
                name = signal.Signals(stop_signal).name
                self._print(
                    f"no response to {name} for {self._grace_period:.0f} s ({self._activity}): "
                    "exiting without saving"
                )
                os._exit(128 + stop_signal)
            if now - self._progress_time > self._hang_timeout and not self._is_reported:
                self._is_reported = True
                problem = f"no progress for {self._hang_timeout:.0f} s while {self._activity}"
                problem += self._current_line()
                if self._exit_on_hang:
                    self._print(f"{problem}: exiting; {self._name_checkpoint()}")
                    os._exit(1)
                self._print(problem)

    def _name_checkpoint(self) -> str:
        """Return the clause about the last checkpoint, unless the file system hangs."""
        clauses = ["its folder does not respond"]
        thread = threading.Thread(target=lambda: clauses.append(self._last_checkpoint()), daemon=True)
        thread.start()
        thread.join(_FILE_SYSTEM_TIMEOUT_S)
        return clauses[-1]

    def _print(self, message: str) -> None:
        print_line(f"[rank {self._rank}] {message}", sys.stderr)

    def _current_line(self) -> str:
        """Return the innermost line of this project in the stack of the watched thread."""
        stack = traceback.extract_stack(sys._current_frames().get(self._main_thread))
        for entry in reversed(stack):
            path = Path(entry.filename)
            if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
                return f", at {path.relative_to(_ROOT)}:{entry.lineno} in {entry.name}"
        return ""
