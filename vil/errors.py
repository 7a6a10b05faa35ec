"""Errors of the input: one printable line with the file, the option and the reason."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

COMMAND_LINE = "command line"
"""Origin of a value from the command line."""
MAX_MESSAGE_LENGTH = 4000
"""Characters of a printed message."""


def printable(text: str) -> str:
    r"""Return the text on one line of printable characters.

    White space becomes spaces; control characters, which could change the state of a terminal, and invalid
    characters are escaped as \x1b; a text over the limit is truncated.
    """
    if len(text) > MAX_MESSAGE_LENGTH:
        text = f"{text[: MAX_MESSAGE_LENGTH - 3]}..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text
    )


def one_line(value: object, max_length: int = 200) -> str:
    """Return the text of a value on one line, shortened."""
    text = " ".join(str(value).split())
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def error_reason(error: BaseException, max_length: int = 200) -> str:
    """Return the message of an exception on one line, of an OSError without the path; else its type."""
    return one_line(getattr(error, "strerror", None) or error, max_length) or type(error).__name__


class UserError(ValueError):
    """An input that cannot be used: an option, a file, a device. Its text is one printable line.

    Args:
        location: the option (`window`, `data.root`) or the file; `errors_in_section` prepends a section.
        reason: the problem, on one line, and the expected value.
        origin: the file that contains the value, or `COMMAND_LINE`; empty if unknown.
    """

    def __init__(self, location: str, reason: str, origin: str = "") -> None:
        super().__init__(location, reason, origin)
        self.location = location
        self.reason = reason
        self.origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it without `__init__`, whose parameters are others in subclasses."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]  # not in typeshed

    def __str__(self) -> str:
        """Return `origin: location: reason`, without the parts that are empty."""
        return printable(": ".join(part for part in (self.origin, self.location, self.reason) if part))


@contextmanager
def errors_in_section(section: str) -> Iterator[None]:
    """Prepend `section.` to the location of a UserError that is raised inside, or set it to the section."""
    try:
        yield
    except UserError as error:
        location = f"{section}.{error.location}" if error.location else section
        raise UserError(location, error.reason, error.origin) from error


@contextmanager
def errors_in_file(path: object) -> Iterator[None]:
    """Add the file to a UserError that is raised inside without a location."""
    try:
        yield
    except UserError as error:
        if error.location:
            raise
        raise UserError(str(path), error.reason, error.origin) from None


@contextmanager
def errors_in_option(key: str) -> Iterator[None]:
    """Turn a UserError that is raised inside into one of the option `key`, with the text as its reason."""
    try:
        yield
    except UserError as error:
        raise UserError(key, str(error)) from error
