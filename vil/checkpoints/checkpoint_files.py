"""Names of a run's checkpoints, and a digest file next to each, to detect damage.

    checkpoints/step_00012510.pt          after 12,510 optimizer steps; the newest few are kept
    checkpoints/best.pt                   after the best evaluation
    checkpoints/….pt.sha256               SHA-256 of each, readable by `sha256sum --check`

A digest is written before its file is renamed into place, so every checkpoint has one. While best.pt is
replaced, its digest file lists the old and the new digest, so that either file verifies.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vil.errors import UserError, error_reason
from vil.runtime.files import open_regular, read_text, refuse_link, remove_leftovers, write_durably
from vil.runtime.run_files import CHECKPOINTS, DIGEST_SUFFIX

Content = TypeVar("Content")

_logger = logging.getLogger(__name__)

FOLDER, BEST = Path(CHECKPOINTS), Path(CHECKPOINTS, "best.pt")
"""Folder of a run's checkpoints and the best of them, relative to the run's folder."""

_STEP_FILE = re.compile(r"step_(\d{8,})\.pt")
_WRITTEN_FILES = rf"(?:{_STEP_FILE.pattern}|best\.pt)(?:\.sha256)?"
_CHUNK_BYTES = 1 << 22
_MAX_DIGEST_BYTES = 1 << 16


class UnreadableFileError(UserError):
    """An I/O error: the file may be intact and readable later."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(path, f"cannot be read: {error_reason(error)}")


def step_file(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps of the run in `folder`."""
    return folder / FOLDER / f"step_{step:08}.pt"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all checkpoints of the run in `folder` but best.pt, newest first."""
    try:
        names = os.listdir(folder / FOLDER)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableFileError(str(folder / FOLDER), error) from None
    matches = filter(None, map(_STEP_FILE.fullmatch, names))
    return sorted(((int(match[1]), folder / FOLDER / match[0]) for match in matches), reverse=True)


def describe_last(folder: Path) -> str:
    """Return a clause for messages that names the newest checkpoint of the run in `folder`."""
    if not os.path.exists(folder / FOLDER):
        return f"{folder} is gone"
    try:
        files = step_files(folder)
    except UserError as error:
        return str(error)
    return f"the last checkpoint is {files[0][1]}" if files else "nothing was saved yet"


def digest_file(path: Path) -> Path:
    """Return the path of the file with the digest of `path`."""
    return path.with_name(path.name + DIGEST_SUFFIX)


def check_digest(path: Path, required: bool = False) -> None:
    """Compare a file with its digest file, which a copy made elsewhere may lack unless it is required.

    Raises:
        UserError: the digest does not match, or the file or a required digest is missing.
        UnreadableFileError: an I/O error.
    """
    digest_path = digest_file(path)
    try:
        if not digest_path.exists() and not required:
            return
        digests = read_digests(path)
        if not digests:
            raise UserError(str(path), f"{digest_path.name} is damaged")
        if file_digest(path) not in digests:
            raise UserError(str(path), f"damaged: does not match its digest in {digest_path.name}")
    except FileNotFoundError as error:
        is_checkpoint = Path(error.filename).name == path.name
        reason = "no such file" if is_checkpoint else f"its digest {digest_path.name} is missing"
        raise UserError(str(path), reason) from None
    except OSError as error:
        raise UnreadableFileError(str(path), error) from None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits. Raise OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_digests(path: Path) -> list[str]:
    """Return the digests in the digest file of `path`: one, or two while `path` is being replaced."""
    text = read_text(digest_file(path), _MAX_DIGEST_BYTES, errors="replace")
    return re.findall(r"^([0-9a-f]{64})  \S", text, flags=re.MULTILINE)


def write_digest(path: Path, digest: str, keep_old: bool = False) -> None:
    """Write the digest of `path` durably; with `keep_old` after the existing digests."""
    old = read_digests(path) if keep_old and digest_file(path).exists() else []
    lines = [f"{value}  {path.name}\n" for value in (*old, digest)]
    write_durably(digest_file(path), "".join(lines))


def keep_damaged(path: Path) -> None:
    """Keep a damaged file under a second name, so that `path` can be replaced."""
    if not path.exists():
        return
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    unused = next(name for name in names if not name.exists())
    try:
        os.link(path, unused)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.replace(path, unused)  # a file system without hard links


def remove_partial_files(folder: Path) -> None:
    """Remove partial files and digests without a file, left by a process that was killed while saving."""
    checkpoints = folder / FOLDER
    refuse_link(checkpoints)
    remove_leftovers(checkpoints, _WRITTEN_FILES)
    for name in os.listdir(checkpoints):
        path = checkpoints / name
        # Version 0.1.0 named temporary files without a random part.
        is_old_temporary = name.endswith(".tmp") and re.fullmatch(_WRITTEN_FILES, name.removesuffix(".tmp"))
        is_digest = name.endswith(DIGEST_SUFFIX) and re.fullmatch(_WRITTEN_FILES, name)
        if is_old_temporary or (is_digest and not path.with_suffix("").exists()):
            path.unlink(missing_ok=True)


def newest_intact(folder: Path, read: Callable[[Path], Content]) -> tuple[Path, Content] | None:
    """Return the newest intact checkpoint of the run in `folder` and its content, None if there is none.

    A damaged checkpoint, for which `read` raises UserError, is logged and skipped, never deleted. best.pt is
    the last candidate.

    Raises:
        UserError: all checkpoints are damaged.
        UnreadableFileError: an I/O error. An older checkpoint in its place would leave a gap in the log if
            this one is readable the next time.
    """
    paths = [path for _, path in step_files(folder)]
    if (folder / BEST).exists():
        paths.append(folder / BEST)
    for path in paths:
        try:
            return path, read(path)
        except UnreadableFileError:  # noqa: PERF203 (a handful of files)
            raise
        except UserError as error:
            _logger.warning("warning: skipping %s: %s", error.location, error.reason)
    if paths:
        reason = f"none of the {len(paths)} checkpoints in {folder / FOLDER} can be read"
        raise UserError("", f"{reason}; name another folder, or move them away to start over")
    return None
