"""End the processes of a job whose torchrun was killed: nothing else would end them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from vil.runtime import launch
from vil.runtime.console import print_line

_POLL_INTERVAL_S = 1.0


@contextmanager
def terminate_with_agent(rank: int) -> Iterator[None]:
    """Send SIGTERM to this process inside the context when torchrun, its parent, has ended.

    A run then ends after the step and saves, on all ranks. A process that another program starts, such as a
    shell or nohup, keeps running without its parent.
    """
    if not launch.has_agent():
        yield
        return
    parent, stopped = os.getppid(), threading.Event()

    def watch() -> None:
        while not stopped.wait(_POLL_INTERVAL_S):
            if os.getppid() != parent:
                reason = f"torchrun (process {parent}) has exited: sending SIGTERM to this rank"
                print_line(f"[rank {rank}] {reason}", sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="torchrun monitor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
