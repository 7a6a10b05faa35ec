"""Read untrusted files and write files durably.

Reading: regular files only, so that a FIFO never blocks and a device never fills the memory, up to a limit of
bytes. Writing: the target is the old file or the complete new one, also after a loss of power. Names of
temporary files are unpredictable, and under names that this project chooses symbolic links are not followed.

Functions raise `OSError`, with the reason as `strerror`; those for outputs of the user raise `UserError`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from vil.errors import UserError, error_reason
from vil.runtime import run_files

MAX_TEXT_BYTES = 1 << 30
"""Size of a log or of a list of images; the list of ImageNet-21k has some 900 MB."""
MAX_LINE_BYTES = 1 << 20
"""Length of a line of metrics.jsonl; typical lines have some hundred bytes."""
MAX_JSON_BYTES = 1 << 24
"""Size of a JSON file with results or labels; ReaL's has 700 kB."""

_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{16}\.tmp")


# --- Reading ------------------------------------------------------------------------------------------------


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading; OSError if it is a folder, a device, a pipe (without blocking) or a socket."""
    return os.fdopen(_open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """Return the content of a regular file. Raises OSError if it is larger than `max_bytes`."""
    with open_regular(path) as file:
        _check_size(os.fstat(file.fileno()).st_size, path, max_bytes)
        content = file.read(max_bytes + 1)
    _check_size(len(content), path, max_bytes)  # the file may have grown
    return content


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Return the content of a regular file of UTF-8, without a byte order mark; `errors` as of `open`."""
    return read_bytes(path, max_bytes).decode("utf-8-sig", errors)


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a log with their line ends; bytes that are not UTF-8 are replaced.

    Raises OSError if a line is longer than `MAX_LINE_BYTES`, or the file larger than `MAX_TEXT_BYTES`.
    """
    with open_regular(path) as file:
        _check_size(os.fstat(file.fileno()).st_size, path, MAX_TEXT_BYTES)
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise OSError(errno.EFBIG, f"holds a line of more than {MAX_LINE_BYTES:,} bytes", str(path))
            _check_size(file.tell(), path, MAX_TEXT_BYTES)
            yield line.decode("utf-8", "replace")


def parse_json(text: str) -> Any:
    """Parse a JSON text. Raises ValueError, also for deep nesting and for integers of more than 18 digits."""
    try:
        return json.loads(text, parse_int=_bounded_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _bounded_integer(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError("an integer of more than 18 digits")
    return int(digits)


def _open(path: str | Path, flags: int) -> int:
    """Open a regular file; the caller closes the descriptor."""
    try:
        descriptor = os.open(path, flags, 0o666)
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


def close_descriptor(descriptor: int) -> None:
    """Close a file; ignore errors, as of a network file system that is gone: fsync has reported them."""
    with suppress(OSError):
        os.close(descriptor)


def _check_size(size: int, path: str | Path, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes:,} bytes", str(path))


# --- Writing under names that this project chooses ----------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that replaces `path` at the end of the context.

    The file is in the folder of `path`, with an unpredictable name and the permissions of the file that it
    replaces, or of a new file. It is synced before it is renamed, and removed if an error is raised.

    Raises:
        OSError: the disk is full or the folder is gone; `path` is the old or the complete new file.
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
    """Write a file; `path` has the old or the new content, also after a loss of power.

    Text is written by `encode_text`. A link, a FIFO or a device of that name is replaced, not followed or
    written to.
    """
    with replacing(path) as file:
        file.write(encode_text(content) if isinstance(content, str) else content)


def encode_text(text: str) -> bytes:
    """Return a text as UTF-8; names of files keep bytes that are not UTF-8, other surrogates are escaped."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def open_for_appending(path: Path) -> int:
    """Open or create a regular file, but no link, for reading and appending; return its descriptor."""
    return _open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def make_folders(base: Path, *names: str) -> Path:
    """Create the folder `base/names[0]/names[1]/…` and return it; only `base` may be a link."""
    base.mkdir(parents=True, exist_ok=True)
    for name in names:
        base /= name
        refuse_link(base)
        base.mkdir(exist_ok=True)
    return base


def refuse_link(path: Path) -> None:
    """Raise OSError if `path` is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed", str(path))


def remove_leftovers(folder: Path, names: str | re.Pattern[str]) -> None:
    """Remove temporary files that a killed process left in `replacing`; `names` are those of final files."""
    for name in os.listdir(folder):
        match = _TEMPORARY.fullmatch(name)
        if match and re.fullmatch(names, match[1]):
            (folder / name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync a folder, which makes renamed files in it durable, if the system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# --- Writing to paths of the user -------------------------------------------------------------------------


def check_writable(path: Path, option: str) -> None:
    """Raise UserError for the option if an output file, or a folder above it, cannot be written.

    Nothing is created: a command that then fails leaves no empty folders.
    """
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISDIR(os.stat(path).st_mode):  # OSError for a name that is too long, a loop of links
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not is_stream(path):
            folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
            longest = max(len(os.fsencode(part)) for part in path.parts)
            if longest > os.pathconf(folder, "PC_NAME_MAX"):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise _not_writable(path, error, option) from None


def write_output(path: Path, content: str | bytes, option: str = "") -> None:
    """Write a result and the folders above it; `path` has the old or the new content.

    Text is written by `encode_text`. /dev/null, a pipe or /dev/stdout are written to and not replaced.

    Raises:
        UserError: the file, which `option` named, cannot be written.
    """
    content = encode_text(content) if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_stream(path)
        if file is None:
            write_durably(path, content)
            return
        with file:
            file.write(content)
    except OSError as error:
        raise _not_writable(path, error, option) from None


def _not_writable(path: Path, error: OSError, option: str) -> UserError:
    reason = f"cannot be written: {error_reason(error)}"
    return UserError(option, f"{path} {reason}") if option else UserError(str(path), reason)


def move_output(source: Path, path: Path) -> None:
    """Move a finished file to a path of the user, as `write_output` writes one."""
    with source.open("rb+") as content:
        os.fsync(content.fileno())
        file = _open_stream(path)
        if file is not None:
            with file:
                shutil.copyfileobj(content, file)
            return
    os.replace(source, path)
    sync_folder(path.parent)


def is_stream(path: Path) -> bool:
    """Return True if `path` must be written to and not replaced: a device, a pipe, /dev/stdout."""
    status = _status(path, follow_links=True)
    if status is None or stat.S_ISDIR(status.st_mode):
        return False
    return not stat.S_ISREG(status.st_mode) or _inherited_descriptor(path) is not None


def is_standard_output(path: Path) -> bool:
    """Return True if `path` names standard output, on which a program then prints nothing else."""
    return _inherited_descriptor(path) == 1


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path]) -> None:
    """Raise UserError for an output of a command that is one of its inputs, another output, or has no name.

    Args:
        outputs: option → file; None for an output that is not requested.
        inputs: files and folders of runs that the command reads, as of `refuse_input_as_output`.
    """
    given, seen = list(inputs), dict[str, str]()
    for option, output in outputs.items():
        if output is None:
            continue
        if not str(output):
            raise UserError(option, "expected the name of a file, got ''")
        path = Path(output)
        if not is_stream(path) and (other := seen.setdefault(os.path.realpath(path), option)) != option:
            raise UserError(option, f"{output} is the output of {other} too; name another file")
        refuse_input_as_output(path, given, option)


def refuse_input_as_output(output: Path, inputs: Iterable[str | Path], option: str) -> None:
    """Raise UserError for `option` if a command would replace a file that it reads, also under another name.

    Of the folder of a run, and of a checkpoint that train.py wrote there, the inputs are the files that
    train.py writes there; of any other checkpoint also its digest.
    """
    status = _status(output, follow_links=True)
    if status is None or not stat.S_ISREG(status.st_mode):
        return
    if any(_is_input(Path(path), output) for path in inputs):
        raise UserError(option, f"{output} is an input of this command; name another file")


def _is_input(path: Path, output: Path) -> bool:
    try:
        if os.path.samefile(path, output) or (path.is_dir() and _is_run_file(path, output)):
            return True
        folder = Path(os.path.abspath(path)).parent
        if _holds_run_checkpoint(folder, path.name) and _is_run_file(folder.parent, output):
            name = output.resolve().name.removesuffix(run_files.DIGEST_SUFFIX)
            is_beside = output.resolve().parent == folder.resolve()
            return not is_beside or _is_written_checkpoint(name)  # not an average of checkpoints beside them
        digest = f"{path.name}{run_files.DIGEST_SUFFIX}"
        return output.name == digest and os.path.samefile(path.with_name(digest), output)
    except (OSError, ValueError):  # an unreadable input is reported where it is read
        return False


def _holds_run_checkpoint(folder: Path, name: str) -> bool:
    """Return True if train.py wrote the file in `folder`: downloads often lie in folders of the same name."""
    is_run = folder.name == run_files.CHECKPOINTS and (folder.parent / run_files.CONFIG).exists()
    return is_run and _is_written_checkpoint(name)


def _is_written_checkpoint(name: str) -> bool:
    return re.fullmatch(run_files.WRITTEN_CHECKPOINT, name) is not None


def _is_run_file(folder: Path, output: Path) -> bool:
    real, top = output.resolve(), folder.resolve()
    inner = real.relative_to(top).parts if top in real.parents else ("",)
    return inner[0] in run_files.FOLDERS or (len(inner) == 1 and inner[0] in run_files.FILES)


def _open_stream(path: Path) -> IO[bytes] | None:
    """Open a stream for writing; return None for a regular file, and if `path` does not exist."""
    if not is_stream(path):
        return None
    number = _inherited_descriptor(path)
    if number is None:
        return path.open("wb", buffering=0)
    for stream in (sys.stdout, sys.stderr):  # keep the order of the output
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    return os.fdopen(os.dup(number), "wb")


def _inherited_descriptor(path: Path) -> int | None:
    """Return the descriptor of /dev/stdout or /dev/fd/N; None for other paths."""
    standard = {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", str(path))
    return standard if match is None else int(match[1])


def _status(path: Path, follow_links: bool = False) -> os.stat_result | None:
    """Return the status of a file; None if there is none, or if opening it will report why."""
    try:
        return os.stat(path, follow_symlinks=follow_links)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
