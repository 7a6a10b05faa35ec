"""Worker processes: signals, the end of the parent process, and shared memory that is too small."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from vil.errors import UserError

Item = TypeVar("Item")

SHARED_MEMORY = "/dev/shm"  # noqa: S108
_SHARED_MEMORY_ERRORS = re.compile(
    r"unable to (allocate shared memory|write to file </torch_)|"
    r"shared memory.*(No space left|Bus error)|Bus error.*shared memory",
    re.DOTALL,
)
_PARENT_POLL_S = 1.0


def limit_workers(workers: int) -> int:
    """Return the number of workers, or of the cores that this process may use if there are fewer."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(workers, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def iterate(loader: Iterable[Item]) -> Iterator[Item]:
    """Start a loader, with SIGINT and SIGTERM blocked in the processes that it forks; return its iterator.

    Until `init_worker` has run, a worker would handle these signals as the parent does, which then counts
    them twice.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return explain_shared_memory(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def explain_shared_memory(loader: Iterable[Item]) -> Iterator[Item]:
    """Start a loader and return its iterator, which raises a UserError if shared memory is too small.

    Worker processes return batches in shared memory; by default a Docker container has 64 MB of it.
    """

    def checked(batches: Iterator[Item]) -> Iterator[Item]:
        try:
            yield from batches
        except RuntimeError as error:
            if _SHARED_MEMORY_ERRORS.search(str(error)) is None:
                raise
            raise _shared_memory_error() from None

    try:
        return checked(iter(loader))
    except OSError as error:  # of a semaphore
        if error.errno != errno.ENOSPC:
            raise
        raise _shared_memory_error() from None


def _shared_memory_error() -> UserError:
    size = ""
    with suppress(OSError):
        size = f" ({os.statvfs(SHARED_MEMORY).f_frsize * os.statvfs(SHARED_MEMORY).f_blocks / 1e6:,.0f} MB)"
    reason = f"shared memory, {SHARED_MEMORY}{size}, is too small for the batches of the worker processes"
    advice = "use docker run --shm-size=16g or --ipc=host, or no workers (--data.workers 0)"
    return UserError("data.workers", f"{reason}; {advice}")


def init_worker(worker: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach all processes of a group: the parent may still need images.

    The worker ends with its parent, and on a SIGTERM that the parent sends.
    """
    signal.set_wakeup_fd(-1)  # inherited from the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    exit_with_parent(worker)


def exit_with_parent(worker: int = 0) -> None:
    """Start a thread that ends this process when its parent ends, for whatever reason.

    PyTorch's workers check for their parent between two batches only, not while a file system does not
    respond.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    main_process = multiprocessing.parent_process()
    senders = {parent, main_process.pid if main_process is not None else parent}
    # A fork server, which starts the workers from Python 3.14 on, is their parent and ends after them.
    while os.getppid() == parent and (main_process is None or main_process.is_alive()):
        if hasattr(signal, "sigtimedwait"):  # macOS lacks it
            received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_POLL_S)
            if received is not None and received.si_pid in senders:
                break
        else:
            time.sleep(_PARENT_POLL_S)
    os._exit(0)
