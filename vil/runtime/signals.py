"""Signals: SIGTERM and SIGINT end a run after a step, SIGUSR1 saves a checkpoint.

All ranks act after the same step. After each step the ranks start an asynchronous all-reduce of the signals
that they received, on the CPU, and read the result of the previous step's: no step waits, and a rank acts at
most one step late.
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
from typing import NoReturn

import torch
import torch.distributed as dist

from vil.runtime.distributed import is_distributed

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptedRun(Exception):  # noqa: N818 (not an error)
    """A signal ended the run, which is saved; the same command continues it."""

    def __init__(self, signum: int, reason: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {reason}")
        self.signum = signum
        self.exit_status = 128 + signum


class InterruptedEvaluation(Exception):  # noqa: N818 (not an error)
    """A rank received a signal before the evaluation ended."""


@dataclass(frozen=True)
class SignalRequest:
    """Requests of all ranks: the number of the signal that ends the run (0 for none), and a checkpoint."""

    stop: int = 0
    save: bool = False


class SignalHandler:
    """Receive the signals of this process, and combine them with those of the other ranks."""

    def __init__(self) -> None:
        self.stop = 0
        """The number of the signal that ends this process; 0 for none."""
        self._save_requests, self._handled_requests = 0, 0  # only the handler writes the first
        self._received = bytearray()
        self._wakeup: socket.socket | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    @contextmanager
    def installed(self) -> Iterator[SignalHandler]:
        """Install the handlers inside the context; do nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        handlers = {**dict.fromkeys(_STOP_SIGNALS, self._on_stop), signal.SIGUSR1: self._on_save}
        previous = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
        # Python runs handlers only after the main thread returns from C code; the numbers of the signals are
        # written to this socket at once.
        self._wakeup, writer = socket.socketpair()
        for end in (self._wakeup, writer):
            end.setblocking(False)
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(descriptor)
            for end in (self._wakeup, writer):
                end.close()
            self._wakeup = None
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def pending_stop(self) -> int:
        """Return `stop`, also for a signal that arrived while the main thread is in C code.

        A second SIGINT ends the process here. Only one other thread than the main thread may call this.
        """
        wakeup = self._wakeup
        if wakeup is not None:
            with suppress(OSError):
                self._received += wakeup.recv(4096)
        if self._received.count(signal.SIGINT) > 1:
            _exit_without_saving()
        return self.stop or next((number for number in self._received if number in _STOP_SIGNALS), 0)

    def synchronize(self) -> SignalRequest:
        """Return what all ranks act on after this step; every rank calls this after every step."""
        save_requests = self._save_requests
        request = SignalRequest(self.stop, save_requests > self._handled_requests)
        self._handled_requests = save_requests
        if not is_distributed():
            return request
        previous, tensor = self._pending, torch.tensor([request.stop, int(request.save)])
        self._pending = tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        if previous is None:
            return SignalRequest()
        result, work = previous
        work.wait()
        stop, save = result.tolist()
        return SignalRequest(stop, bool(save))

    def _on_stop(self, signum: int, frame: types.FrameType | None) -> None:
        if signum == self.stop == signal.SIGINT:
            _exit_without_saving()
        if signum == signal.SIGINT or not self.stop:
            self.stop = signum

    def _on_save(self, signum: int, frame: types.FrameType | None) -> None:
        self._save_requests += 1


def _exit_without_saving() -> NoReturn:
    """Exit at once: every file is written by renaming."""
    os.write(2, b"second SIGINT: exiting without saving\n")
    os._exit(130)
