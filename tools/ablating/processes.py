"""Calls of train.py, several at once, until all runs are finished or have failed."""

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

from tools.ablating.grid import ROOT, Run
from tools.ablating.progress import Progress
from tools.ablating.runs import FAILURE, LOG, Outcome, outcome_of
from vil.config import ConfigError
from vil.runtime.files import make_folders, open_for_appending, read_text, write_durably

PROGRAM = [sys.executable, str(ROOT / "train.py")]
ERRORS, LOCK = "errors.txt", ".ablate.lock"
POLL = 0.2
"""Seconds between two looks at the processes."""
GRACE = 15.0
"""Seconds beyond their own grace_period that processes have to end after a signal, before they are killed."""


class Stopped(Exception):  # noqa: N818 - like KeyboardInterrupt, no error
    """A signal asked this program to end; its processes have ended.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Child:
    """A process of train.py; `slot` is its place among those that run at once."""

    run: Run
    process: subprocess.Popen[bytes]
    slot: int


def visible_gpus() -> list[str]:
    """The GPUs that PyTorch sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(number) for number in range(count)])[:count]


def execute(runs: Sequence[Run], jobs: int, gpus: Sequence[str], progress: Progress) -> None:
    """Calls train.py for every run, `jobs` at once; what failed leaves its reason in `FAILURE`.

    A run that another process is at work on is left to that one, and waited for; on this machine it takes one
    of the places, those of `jobs`.

    Args:
        runs: none of them finished.
        jobs: how many run at once.
        gpus: which are dealt out to them, one each in turn; empty to hide none.
        progress: is told of all that happens.

    Raises:
        Stopped: by SIGINT, SIGTERM or SIGHUP; the processes were told to save and end, and have.
        ConfigError: a folder cannot be written.
    """
    waiting, children = list(runs), list[Child]()
    with _signals() as received:
        try:
            while waiting or children:
                if received:
                    raise Stopped(received[0])
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    progress.ended(_finish(child))
                of_others = list[int]()
                for run in list(waiting):
                    free = set(range(jobs)) - {child.slot for child in children} - set(of_others)
                    if not free or len(children) + len(of_others) >= jobs:
                        break
                    taken = _take(run, min(free), _environment(jobs, min(free), gpus), progress)
                    if isinstance(taken, int):
                        of_others += [taken] if taken >= 0 else []
                        continue
                    waiting.remove(run)
                    children += taken
                progress.show()
                time.sleep(POLL)
        except BaseException as error:
            number = error.number if isinstance(error, Stopped) else signal.SIGTERM
            # A run that the terminal's end reaches would not save.
            _stop(children, signal.SIGTERM if number == signal.SIGHUP else number, received)
            raise


def _take(run: Run, slot: int, environment: dict[str, str], progress: Progress) -> list[Child] | int:
    """The run's new process; nothing where it is finished by now.

    Where another process is at work on it, the place that it has on this machine; -1 for another machine.
    """
    try:
        cell = run.folder.parent  # --output/GRID/CELL/seed=N: --output alone may be a link
        make_folders(cell.parent.parent, cell.parent.name, cell.name, run.folder.name)
        with os.fdopen(open_for_appending(run.folder / LOCK), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.taken(run)
                return _place(read_text(run.folder / LOCK, 4096, errors="replace"))
            if outcome_of(run).found:  # by another call of this program, in the meantime
                progress.ended(outcome_of(run))
                return []
            (run.folder / FAILURE).unlink(missing_ok=True)
            lock.truncate(0)
            lock.write(f"{slot} {socket.gethostname()}")
            lock.flush()
            progress.started(run)
            return [Child(run, _start(run, environment, lock), slot)]
    except OSError as error:
        reason = f"{_which(error)}cannot be written: {error.strerror or error}"
        raise ConfigError(str(run.folder), reason) from None


def _which(error: OSError) -> str:
    return f"{Path(error.filename).name} " if isinstance(error.filename, str) else ""


def _place(note: str) -> int:
    """The place of a process by what it wrote into its lock; -1 on another machine."""
    slot, _, host = note.partition(" ")
    return int(slot) if host == socket.gethostname() and slot.isdecimal() else -1


def _start(run: Run, environment: dict[str, str], lock: IO[str]) -> subprocess.Popen[bytes]:
    """A process that holds the lock as long as it lives, whatever becomes of this one."""
    with (
        os.fdopen(open_for_appending(run.folder / LOG), "ab") as log,
        os.fdopen(open_for_appending(run.folder / ERRORS), "ab") as errors,
    ):
        errors.truncate(0)
        return subprocess.Popen(  # noqa: S603 - our own program, with options that were parsed
            [*PROGRAM, *run.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=errors,
            env=environment,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # Ctrl-C reaches this program alone, which passes it on
        )


def _finish(child: Child) -> Outcome:
    """Where the run of an ended process stands; the reason of a failure is written down, if it can be.

    What is wrong with one run's files must not end the others.
    """
    status, folder = child.process.returncode, child.run.folder
    try:
        if status == 0 and outcome_of(child.run).found:
            return outcome_of(child.run)
        reason = _reason(status, folder / ERRORS)
        write_durably(folder / FAILURE, f"{reason}\n")
        return outcome_of(child.run)
    except ConfigError as error:
        return Outcome(child.run, failure=str(error))
    except OSError as error:
        return Outcome(child.run, failure=f"{folder} cannot be read or written: {error.strerror or error}")


def _environment(jobs: int, slot: int, gpus: Sequence[str]) -> dict[str, str]:
    """This process's, with its share of the cores and of the GPUs."""
    cores = len(os.sched_getaffinity(0))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def _reason(status: int, errors: Path) -> str:
    """Why a process failed: its last line on standard error, or the signal that ended it."""
    lines = [line.strip() for line in read_text(errors, errors="replace").splitlines()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    told = told.removeprefix("error: ") or next(filter(None, reversed(lines)), "")
    if status < 0:
        told = f"ended by {_signal_name(-status)}" + (f": {told}" if told else "")
    return told or f"exit status {status}, nothing said"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _stop(children: Sequence[Child], number: int, received: Sequence[int]) -> None:
    """Passes a signal on and waits for the processes to end; kills what does not, or at a second signal."""
    processes = [child.process for child in children]
    for process in processes:
        process.send_signal(number)
    patience = max((child.run.config.grace_period for child in children), default=0.0) + GRACE
    deadline, signals = time.monotonic() + patience, len(received)
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(received) > signals:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        time.sleep(POLL)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask to end, in the place of ending; SIGHUP stays ignored under nohup.

    An exception raised by a handler could come between a process and the note of its being there.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
