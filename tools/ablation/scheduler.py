"""Run train.py for several runs concurrently, one GPU each, until all are finished or have failed."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import torch

from tools.ablation.grid import ROOT, Run
from tools.ablation.progress import Progress
from tools.ablation.run_status import FAILURE, LOG, RunStatus, read_status
from vil.errors import UserError, error_reason
from vil.runtime.files import make_folders, open_for_appending, read_text, write_durably
from vil.runtime.launch import single_process_environment

PROGRAM = [sys.executable, str(ROOT / "train.py")]
ERRORS, LOCK = "errors.txt", ".ablate.lock"
POLL_INTERVAL_S = 0.2
KILL_DELAY_S = 15.0
"""Time beyond a run's grace_period after which a process that ignores a signal is killed."""


class Stopped(Exception):  # noqa: N818 - not an error, like KeyboardInterrupt
    """Raised after a signal, when all processes have ended."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class RunLockedError(Exception):
    """Another process trains the run; `slot` is its slot if it runs on this machine, else None."""

    def __init__(self, slot: int | None) -> None:
        super().__init__(slot)
        self.slot = slot


@dataclass
class Child:
    """A process of train.py; `slot` in 0 … jobs − 1 selects its GPU."""

    run: Run
    process: subprocess.Popen[bytes]
    slot: int


def visible_gpus() -> list[str]:
    """Return the visible GPUs by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (names or [str(index) for index in range(count)])[:count]


def execute(runs: Sequence[Run], jobs: int, gpus: Sequence[str], progress: Progress) -> None:
    """Run train.py for every run, `jobs` at a time; write the reason of a failure to `FAILURE`.

    A run that another process trains is waited for; if that process is on this machine, it counts as a job.
    Processes get the `gpus` in turn; without any, CUDA_VISIBLE_DEVICES is left unchanged. Raise `Stopped`
    after SIGINT, SIGTERM or SIGHUP, when the processes have saved and ended.
    """
    waiting, children = list(runs), list[Child]()
    with _collect_signals() as received:
        try:
            while waiting or children:
                if received:
                    raise Stopped(received[0])
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    progress.run_ended(_final_status(child))
                slots = [child.slot for child in children]
                for run in list(waiting):
                    free_slots = set(range(jobs)) - set(slots)
                    if not free_slots or len(slots) >= jobs:
                        break
                    slot = min(free_slots)
                    try:
                        new_child = start(run, slot, _environment(jobs, slot, gpus), progress)
                    except RunLockedError as locked:
                        slots += [] if locked.slot is None else [locked.slot]
                        continue
                    waiting.remove(run)
                    if new_child is not None:
                        children.append(new_child)
                        slots.append(slot)
                progress.refresh()
                time.sleep(POLL_INTERVAL_S)
        except BaseException as error:
            signum = error.signum if isinstance(error, Stopped) else signal.SIGTERM
            # train.py does not save at SIGHUP.
            _stop(children, signal.SIGTERM if signum == signal.SIGHUP else signum, received)
            raise


def start(run: Run, slot: int, environment: dict[str, str], progress: Progress) -> Child | None:
    """Start train.py for a run; return None if another process has finished it."""
    try:
        cell = run.folder.parent  # --output/GRID/CELL/seed=N: only --output may be a link
        make_folders(cell.parent.parent, cell.parent.name, cell.name, run.folder.name)
        with os.fdopen(open_for_appending(run.folder / LOCK), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.run_locked(run)
                note = read_text(run.folder / LOCK, 4096, errors="replace")
                raise RunLockedError(_slot_on_this_machine(note)) from None
            status = read_status(run)
            if status.metrics:  # finished by another call of this program
                progress.run_ended(status)
                return None
            (run.folder / FAILURE).unlink(missing_ok=True)
            lock.truncate(0)
            lock.write(f"{slot} {socket.gethostname()}")
            lock.flush()
            progress.run_started(run)
            return Child(run, _start_process(run, environment, lock), slot)
    except OSError as error:
        name = f"{Path(error.filename).name} " if isinstance(error.filename, str) else ""
        raise UserError(str(run.folder), f"{name}cannot be written: {error_reason(error)}") from None


def _slot_on_this_machine(note: str) -> int | None:
    """Return the slot in the content of a lock file; None if a process of another machine wrote it."""
    slot, _, host = note.partition(" ")
    return int(slot) if host == socket.gethostname() and slot.isdecimal() else None


def _start_process(run: Run, environment: dict[str, str], lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start a process that inherits the lock and holds it even if this program is killed."""
    with (
        os.fdopen(open_for_appending(run.folder / LOG), "ab") as log,
        os.fdopen(open_for_appending(run.folder / ERRORS), "ab") as errors,
    ):
        errors.truncate(0)
        return subprocess.Popen(  # noqa: S603 - our own program with validated options
            [*PROGRAM, *run.argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=errors,
            env=environment,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C reaches this program only, which forwards it
        )


def _final_status(child: Child) -> RunStatus:
    """Return the status of an ended run; write the reason of a failure.

    An error in the files of one run is its failure and must not stop the other runs.
    """
    folder = child.run.folder
    try:
        if child.process.returncode == 0 and read_status(child.run).metrics:
            return read_status(child.run)
        write_durably(folder / FAILURE, f"{_failure_reason(child.process.returncode, folder / ERRORS)}\n")
        return read_status(child.run)
    except UserError as error:
        return RunStatus(child.run, failure=str(error))
    except OSError as error:
        reason = f"{folder} cannot be read or written: {error_reason(error)}"
        return RunStatus(child.run, failure=reason)


def _environment(jobs: int, slot: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the environment of a process, with its share of the cores and its GPU."""
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **single_process_environment(os.environ)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _failure_reason(status: int, errors: Path) -> str:
    """Return the last error of a process on standard error, and the signal that ended it."""
    lines = [line.strip() for line in read_text(errors, errors="replace").splitlines()]
    message = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    message = message.removeprefix("error: ") or next(filter(None, reversed(lines)), "")
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:  # real-time signals have no names
            name = f"signal {-status}"
        return f"ended by {name}" + (f": {message}" if message else "")
    return message or f"exit status {status} without a message"


def _stop(children: Sequence[Child], signum: int, received: Sequence[int]) -> None:
    """Forward a signal and wait for the processes; kill them after a timeout or at a second signal."""
    processes = [child.process for child in children]
    for process in processes:
        process.send_signal(signum)
    grace_period = max((child.run.config.grace_period for child in children), default=0.0)
    deadline, signal_count = time.monotonic() + grace_period + KILL_DELAY_S, len(received)
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(received) > signal_count:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        time.sleep(POLL_INTERVAL_S)


@contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list; SIGHUP stays ignored under nohup.

    An exception raised by a handler could be raised between the start of a process and its registration.
    """
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
