"""Console output, on standard output and standard error."""

from __future__ import annotations

import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence, Sized
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from vil.errors import printable

PROGRESS_INTERVAL_S = 60.0
"""Seconds between two lines of progress, where there is no terminal for a progress bar."""


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


def print_text(text: object) -> None:
    """Print lines of text as they are; ignore a standard output that is closed, or on a full disk."""
    write(f"{text}\n")


def width() -> int | None:
    """Return the columns of the terminal, or of COLUMNS; None if standard output is no terminal."""
    is_known = os.environ.get("COLUMNS", "").isdecimal()
    with suppress(ValueError, AttributeError):  # the stream is closed
        is_known |= sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_known else None


def align(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the rows as lines of aligned columns: those of `left` to the left, all others to the right."""
    widths = [max(map(text_width, column)) for column in zip(*rows)]
    return [
        "  ".join(
            pad(cell, width, is_left=index in left) for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def pad(text: str, width: int, is_left: bool = False) -> str:
    """Return a text with spaces up to `width` columns of a terminal, to the right or to the left."""
    padding = " " * (width - text_width(text))
    return text + padding if is_left else padding + text


def text_width(text: str) -> int:
    """Return the columns of a terminal that a text takes: 2 for a wide character (CJK), 0 for an accent."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


class _Lines(io.TextIOBase):
    """A stream for tqdm that prints each text on standard error as a line."""

    def write(self, text: str) -> int:
        """Print a text without the spaces and carriage returns around it, unless nothing is left."""
        if text.strip():
            print_line(text.strip(), sys.stderr)
        return len(text)


def progress_bar(items: Iterable[Any] | None = None, *, is_hidden: bool = False, **options: Any) -> tqdm[Any]:
    """Return tqdm(items, **options) on standard error; without a terminal, it prints a line per minute.

    It is hidden if standard error is closed.
    """
    try:
        is_terminal = sys.stderr.isatty()
    except (AttributeError, ValueError):  # closed when the process began, or later
        is_terminal, is_hidden = False, True
    options |= {"file": sys.stderr, "leave": False, "disable": is_hidden}
    if not is_terminal:
        count, remaining = "{n_fmt}", ""
        if isinstance(items, Sized) or options.get("total") is not None:
            count, remaining = "{percentage:.0f} %, {n_fmt}/{total_fmt}", "<{remaining}"
        options["bar_format"] = f"{{desc}}: {count} [{{elapsed}}{remaining}, {{rate_fmt}}]"
        # With another miniters, tqdm's monitor repeats an old line if the iterations become slower.
        options |= {"delay": PROGRESS_INTERVAL_S, "mininterval": PROGRESS_INTERVAL_S, "miniters": 1}
        options["file"] = _Lines()
    return tqdm(items, **options)


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
