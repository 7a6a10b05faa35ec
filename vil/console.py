"""Lines for people; that nobody can take them is no reason to stop."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from vil.config import printable


def say(line: str, stream: TextIO | None = None) -> None:
    """Writes one line at once.

    What a full disk, on which standard output may lie too, or a reader who has gone does not take is lost.

    Args:
        line: what cannot be printed in it is escaped.
        stream: standard output where none is given.
    """
    with suppress(OSError, ValueError):  # the latter of a closed stream
        print(printable(line), file=stream or sys.stdout, flush=True)


def finish() -> None:
    """Before a process ends: what a stream still holds and cannot write must not change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # noqa: PERF203 (there are two)
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
