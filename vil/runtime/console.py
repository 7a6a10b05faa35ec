"""Console output, on standard output and standard error."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TextIO

from vil.config import printable


def open_standard_streams() -> None:
    """Open /dev/null in place of standard streams that are closed (`>&-`).

    Otherwise the next file that is opened, such as a checkpoint, would get the number of standard output or
    standard error, on which libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (until the process ends)


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print one line, escaped if necessary; ignore a stream that is closed, or on a full disk."""
    write(f"{printable(line)}\n", stream)


def width() -> int | None:
    """Return the columns of the terminal, or of COLUMNS; None if standard output is no terminal."""
    is_known = os.environ.get("COLUMNS", "").isdecimal()
    with suppress(ValueError, AttributeError):  # the stream is closed
        is_known |= sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_known else None


def align(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the rows as lines of aligned columns: those of `left` to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def flush_streams() -> None:
    """Flush both standard streams; discard what cannot be written, so that the exit status stays the same."""
    for stream in (sys.stdout, sys.stderr):
        write("", stream)


def write(text: str, stream: TextIO | None = None) -> None:
    """Write and flush a text; if that fails (a full disk, a closed pipe), discard all further output.

    Text that stayed in the buffer would raise again wherever the stream is flushed, as multiprocessing does
    before it starts a process.
    """
    stream = stream or sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            stream.flush()
    except ValueError:  # the stream is closed
        pass
