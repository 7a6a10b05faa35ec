"""Console output, on standard output and standard error."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from vil.config import printable


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print one line, escaped if necessary; ignore a stream that is closed, or on a full disk."""
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(printable(line), file=stream or sys.stdout, flush=True)


def flush_streams() -> None:
    """Flush both standard streams; discard what cannot be written, so that the exit status stays the same."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # noqa: PERF203 (there are two)
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
