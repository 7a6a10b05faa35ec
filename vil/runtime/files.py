"""Open files that strangers may have made, and write files: the one place for both.

Reading: regular files only, so that a FIFO never blocks and a device never fills the memory, and never more
bytes than a limit. Writing: the target is the old file or the whole new one, whatever happens meanwhile, also
after a loss of power; names of temporary files cannot be predicted, and where this project chooses a name
in a folder, a link of that name is never followed.

All functions raise `OSError`, with the reason as `strerror`; callers know which option named the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from vil.config import ConfigError

MAX_TEXT_BYTES = 1 << 30
"""Size of a log or of a list of images; the list of ImageNet-21k has some 900 MB."""
MAX_LINE_BYTES = 1 << 20
"""Length of a line of metrics.jsonl; ours have some hundred bytes."""
MAX_JSON_BYTES = 1 << 24
"""Size of a JSON file with results or labels; ReaL's has 700 kB."""

_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{16}\.tmp")
_CHUNK = 1 << 22


# --- Reading ------------------------------------------------------------------------------------------------


def open_regular(path: str | Path, *, follow_links: bool = True) -> BinaryIO:
    """Open a regular file for reading; never blocks, as on a FIFO without a writer.

    Args:
        path: the file.
        follow_links: whether `path` itself may be a symbolic link.

    Raises:
        OSError: there is none, it cannot be opened, or it is a folder, a device, a pipe or a socket.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = _open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: as `open_regular`, or the file is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        _check_size(file, path, max_bytes)
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:  # grew meanwhile
        raise _too_large(path, max_bytes)
    return content


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Return the content of a regular file of UTF-8, without a byte order mark; `errors` as of `open`.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is not UTF-8, and `errors` is strict.
    """
    return read_bytes(path, max_bytes).decode("utf-8-sig", errors)


def read_lines(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> Iterator[str]:
    """Yield the lines of a log with their ends, one at a time; what is not UTF-8 is replaced.

    Raises:
        OSError: as `read_bytes`, or a line is longer than `MAX_LINE_BYTES`.
    """
    with open_regular(path) as file:
        _check_size(file, path, max_bytes)
        count = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            count += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise OSError(errno.EFBIG, f"holds a line of more than {MAX_LINE_BYTES:,} bytes", str(path))
            if count > max_bytes:
                raise _too_large(path, max_bytes)
            yield line.decode("utf-8", "replace")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text whose numbers can be computed with.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds a whole number of more than 18 digits.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole_number(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError("a whole number of more than 18 digits")
    return int(digits)


def _open(path: str | Path, flags: int, mode: int = 0o666) -> int:
    """Open a regular file; the descriptor is the caller's to close."""
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW and os.path.islink(path):
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", str(path)) from None
        if error.errno == errno.ENXIO:  # a socket, or a FIFO without a reader
            raise OSError(errno.EINVAL, "is not a regular file", str(path)) from None
        raise
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_size(file: BinaryIO, path: str | Path, max_bytes: int) -> None:
    if os.fstat(file.fileno()).st_size > max_bytes:
        raise _too_large(path, max_bytes)


def _too_large(path: str | Path, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"is larger than {max_bytes:,} bytes", str(path))


# --- Writing under names that this project chooses ----------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a new file to write to; afterwards it takes the place of `path`, whatever that is.

    The file lies beside `path` under a name that nobody can predict. It has the permissions of the file that
    it replaces, or those of any new file. It has been brought to the disk before it gets its name. Where
    anything is raised inside, nothing is left of it.

    Raises:
        OSError: the disk is full or the folder is gone; `path` is the old file, or the whole new one.
    """
    # Names are limited to 255 bytes.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f"{name}.{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            status = _status(path)
            if status is not None and stat.S_ISREG(status.st_mode):
                with suppress(PermissionError):  # a file system without permissions
                    os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & 0o777)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file; `path` holds the old content or the new, also after a loss of power. Text is UTF-8.

    Whatever lies under the name is replaced, never followed or written to: a link, a FIFO, a device.

    Raises:
        OSError: it cannot be written, or a folder has the name.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def open_for_appending(path: Path) -> int:
    """Open a regular file for reading and appending, made where there is none; never through a link.

    Returns:
        the descriptor, which is the caller's to close.

    Raises:
        OSError: it cannot be opened, or the name is that of a link, a folder, a device or a pipe.
    """
    return _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def make_folders(base: Path, *names: str) -> Path:
    """Make the folder `base/names[0]/names[1]/…` and return it; `base`, which the user named, may be a link.

    Raises:
        OSError: one cannot be made, or one of `names` is that of a link.
    """
    base.mkdir(parents=True, exist_ok=True)
    for name in names:
        base /= name
        refuse_link(base)
        base.mkdir(exist_ok=True)
    return base


def refuse_link(path: Path) -> None:
    """Raise OSError where `path` is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", str(path))


def remove_leftovers(folder: Path, names: str | re.Pattern[str]) -> None:
    """Remove the temporary files of `replacing` that a killed process left.

    Args:
        folder: where to look; not below it.
        names: pattern of the names of the files that they were to become.

    Raises:
        OSError: the disk says no.
    """
    for name in os.listdir(folder):
        match = _TEMPORARY.fullmatch(name)
        if match and re.fullmatch(names, match[1]):
            (folder / name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renaming of a file durable, where the system lets a folder be synchronised."""
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


# --- Writing where the user says ----------------------------------------------------------------------------


def write_output(path: Path, content: str | bytes) -> None:
    """Write a result to where the user named; `path` holds the old content or all of the new.

    What is no file, as /dev/null, a pipe or /dev/stdout, is written to and not replaced.

    Raises:
        OSError: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    file = _open_stream(path)
    if file is None:
        write_durably(path, content)
        return
    with file:
        file.write(content)


def move_output(source: Path, path: Path) -> None:
    """Move a finished file to where the user named, as `write_output` writes one.

    Raises:
        OSError: it cannot be written.
    """
    with source.open("rb+") as content:
        os.fsync(content.fileno())
        file = _open_stream(path)
        if file is not None:
            with file:
                while chunk := content.read(_CHUNK):
                    file.write(chunk)
            return
    os.replace(source, path)
    sync_folder(path.parent)


def is_stream(path: Path) -> bool:
    """Return True if `path` is something to write to and not to replace: a device, a pipe, /dev/stdout."""
    status = _status(path, follow_links=True)
    if status is None or stat.S_ISDIR(status.st_mode):
        return False
    return not stat.S_ISREG(status.st_mode) or _inherited_descriptor(path) is not None


def refuse_input_as_output(output: Path, inputs: Iterable[str | Path], option: str) -> None:
    """Refuse to replace a file that the same command reads.

    Args:
        output: the file that will be written.
        inputs: the files that are read, also under other names. Of the folder of a run the files that
            train.py writes there.
        option: what to name in the error: the option, or the file.

    Raises:
        ConfigError: `output` is one of the inputs.
    """
    status = _status(output, follow_links=True)
    if status is None or not stat.S_ISREG(status.st_mode):
        return
    if any(_is_input(Path(path), output) for path in inputs):
        raise ConfigError(option, f"{output} is an input of this command; name another file")


_FILES_OF_RUN = ("config.yaml", "summary.json", "metrics.jsonl", "bad_images.txt", ".lock")
_FOLDERS_OF_RUN = ("checkpoints", "tensorboard")


def _is_input(path: Path, output: Path) -> bool:
    try:
        return os.path.samefile(path, output) or _is_file_of_run(path, output)
    except (OSError, ValueError):  # an input that cannot be read is reported by who reads it
        return False


def _is_file_of_run(folder: Path, output: Path) -> bool:
    if not folder.is_dir():
        return False
    parts = output.resolve().parts
    root = folder.resolve().parts
    if parts[: len(root)] != root or len(parts) == len(root):
        return False
    return parts[len(root) :] in [(name,) for name in _FILES_OF_RUN] or parts[len(root)] in _FOLDERS_OF_RUN


def _open_stream(path: Path) -> IO[bytes] | None:
    """Open what is to be written to and not replaced; None for a file and for nothing."""
    if not is_stream(path):
        return None
    number = _inherited_descriptor(path)
    if number is None:
        return path.open("wb", buffering=0)
    for stream in (sys.stdout, sys.stderr):  # what was printed before comes before
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return os.fdopen(os.dup(number), "wb")


def _inherited_descriptor(path: Path) -> int | None:
    """Return the number of the descriptor that /dev/stdout or /dev/fd/N stands for; None for other paths."""
    standard = {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", str(path))
    return standard if match is None else int(match[1])


def _status(path: Path, follow_links: bool = False) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=follow_links)
    except (FileNotFoundError, NotADirectoryError):
        return None
