"""Files that are the old one or the whole new one, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name of a file beside `path`, to be written inside; afterwards it takes the place of `path`.

    By then it has been brought to the disk. Where anything is raised inside, nothing is left of it.

    Raises:
        OSError: the disk is full or the folder is gone; `path` is the old file, or the whole new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_durably(path: Path, content: str | bytes) -> None:
    """Writes a file; `path` holds the old content or the new, also after a loss of power. Text is UTF-8.

    What is no file, as /dev/null or a pipe, is written to and not replaced.

    Raises:
        OSError: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system lets a folder be synchronised."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
