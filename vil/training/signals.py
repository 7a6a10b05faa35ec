"""Signals from outside: SIGTERM and SIGINT end a run after a step, SIGUSR1 asks for a checkpoint.

All ranks act after the same step. Each step starts a sum of what the ranks were told, on the CPUs and without
waiting, and takes the result of the sum that the step before started: a rank is one step late at most, and no
step waits.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from vil.training.distributed import is_distributed

_ENDING = (signal.SIGTERM, signal.SIGINT)

SAVE = getattr(signal, "SIGUSR1", None)
"""The signal that asks for a checkpoint; None on systems without it."""


class InterruptedRun(Exception):  # noqa: N818 (nothing went wrong)
    """A signal ended the run, which was saved; calling it again continues it.

    Args:
        signum: the signal.
        reason: one line for the user.
    """

    def __init__(self, signum: int, reason: str) -> None:
        super().__init__(reason)
        self.signum = signum


class InterruptedEvaluation(Exception):  # noqa: N818 (nothing went wrong)
    """A rank was told to end before the evaluation did."""


@dataclass(frozen=True)
class Request:
    """What all ranks were told, together.

    Attributes:
        stop: number of the signal that ends the run; 0 for none.
        save: whether a checkpoint is asked for.
    """

    stop: int = 0
    save: bool = False


class Signals:
    """What this process was told, and the agreement of all ranks about it."""

    def __init__(self) -> None:
        self._stop = 0
        self._asked, self._answered = 0, 0  # for checkpoints; only a handler writes the first
        self._seen = bytearray()
        self._wakeup: socket.socket | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def received(self) -> Iterator[Signals]:
        """Receives signals inside, instead of what they did before; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        handlers = {signal.SIGTERM: self._on_stop, signal.SIGINT: self._on_stop}
        if SAVE is not None:
            handlers[SAVE] = self._on_save
        before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        # Handlers wait until the main thread is back from C; the signals' numbers are written here at once.
        self._wakeup, written = socket.socketpair()
        for end in (self._wakeup, written):
            end.setblocking(False)
        descriptor = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(descriptor)
            for end in (self._wakeup, written):
                end.close()
            self._wakeup = None
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def seen(self) -> int:
        """The signal by which this process was told to end, even if its main thread is in C code; 0 for none.

        A second SIGINT ends the process here; only one other thread may call this.
        """
        wakeup = self._wakeup
        if wakeup is not None:
            with suppress(OSError):
                self._seen += wakeup.recv(4096)
        if self._seen.count(signal.SIGINT) > 1:
            _end_at_once()
        return self._stop or next((number for number in self._seen if number in _ENDING), 0)

    @property
    def stop(self) -> int:
        """The signal by which this process was told to end; 0 for none."""
        return self._stop

    def agree(self) -> Request:
        """What all ranks act on after this step; every rank calls this after every step."""
        asked = self._asked
        own = [self._stop, int(asked > self._answered)]
        self._answered = asked
        if not is_distributed():
            return Request(own[0], bool(own[1]))
        before, told = self._pending, torch.tensor(own)
        self._pending = told, dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return Request()
        before[1].wait()
        stop, save = before[0].tolist()
        return Request(stop, bool(save))

    def _on_stop(self, signum: int, frame: types.FrameType | None) -> None:
        if signum == self._stop == signal.SIGINT:
            _end_at_once()
        if signum == signal.SIGINT or not self._stop:
            self._stop = signum

    def _on_save(self, signum: int, frame: types.FrameType | None) -> None:
        self._asked += 1


def _end_at_once() -> NoReturn:
    """Nothing is waited for: every file is written by renaming."""
    os.write(2, b"interrupted again: not saved\n")
    os._exit(130)
