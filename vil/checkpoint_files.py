"""The files of a run's checkpoints: their names, and the digest beside each by which damage shows.

    checkpoints/step_00012510.pt          the run after 12,510 optimiser steps; the newest few are kept
    checkpoints/best.pt                   the run after its best evaluation
    checkpoints/….pt.sha256               SHA-256 of each, as `sha256sum --check` reads it

A digest is written before the file that it belongs to is renamed into place, so that no file of that name
is ever without one. Where the name is taken already, as that of best.pt, the digest file holds the old
digest too until the new file is there: whatever happens meanwhile, what lies under the name is verified.
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

from vil.config import ConfigError
from vil.runtime.files import open_regular, read_text, refuse_link, remove_leftovers, write_durably

Content = TypeVar("Content")

_logger = logging.getLogger(__name__)

FOLDER, BEST = Path("checkpoints"), Path("checkpoints/best.pt")
"""Where a run's checkpoints lie, relative to its folder."""

_NAME = re.compile(r"step_(\d{8,})\.pt")
_TARGETS = rf"(?:{_NAME.pattern}|best\.pt)(?:\.sha256)?"  # what a save writes
_CHUNK = 1 << 22
_MAX_DIGEST_BYTES = 1 << 16


class UnreadableFileError(ConfigError):
    """A file that the system does not give; it may be whole all the same, and given another time.

    Args:
        path: the file.
        error: what the system says.
    """

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(path, f"cannot be read: {error.strerror or error}")


def step_file(folder: Path, step: int) -> Path:
    """The checkpoint of the run in `folder` after `step` optimiser steps."""
    return folder / FOLDER / f"step_{step:08}.pt"


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of all checkpoints of the run in `folder` but best.pt, the newest first.

    Raises:
        UnreadableFileError: they cannot be listed.
    """
    try:
        names = os.listdir(folder / FOLDER)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableFileError(str(folder / FOLDER), error) from None
    found = [(int(match[1]), folder / FOLDER / match[0]) for match in map(_NAME.fullmatch, names) if match]
    return sorted(found, reverse=True)


def digest_file(path: Path) -> Path:
    """The file that holds the digest of `path`."""
    return path.with_name(path.name + ".sha256")


def check_digest(path: Path, required: bool = False) -> None:
    """Compares a file with the digest beside it.

    Args:
        path: the checkpoint.
        required: whether one without a digest is refused; one that was copied elsewhere may lack it.

    Raises:
        ConfigError: they do not fit, or one of them is missing.
        UnreadableFileError: one of them cannot be read.
    """
    beside = digest_file(path)
    try:
        if not beside.exists() and not required:
            return
        known = known_digests(path)
        if not known:
            raise ConfigError(str(path), f"{beside.name} is damaged")
        if digest_of(path) not in known:
            raise ConfigError(str(path), f"damaged: it is not what {beside.name} was written for")
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        reason = "no such file" if missing == path.name else f"without its digest {missing}"
        raise ConfigError(str(path), reason) from None
    except OSError as error:
        raise UnreadableFileError(str(path), error) from None


def digest_of(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_digest(path: Path, digest: str, keep_old: bool = False) -> None:
    """Writes the digest beside `path`, durably; with `keep_old` below what stands there already.

    Raises:
        OSError: the disk is full or the folder is gone; what stood there still does.
    """
    beside = digest_file(path)
    old = known_digests(path) if keep_old and beside.exists() else []
    lines = [f"{value}  {path.name}\n" for value in (*old, digest)]
    write_durably(beside, "".join(lines))


def keep_damaged(path: Path) -> None:
    """Gives a damaged file another name beside its own, which may then be taken by a new one.

    Raises:
        OSError: the disk is full or the folder is gone.
    """
    if not path.exists():
        return
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    free = next(name for name in names if not name.exists())
    try:
        os.link(path, free)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.replace(path, free)  # a file system without links


def tidy(folder: Path) -> None:
    """Remove what a process left that was killed in a save: unfinished files, and digests without a file.

    Raises:
        OSError: the disk says no, or the folder of the checkpoints is a link.
    """
    checkpoints = folder / FOLDER
    refuse_link(checkpoints)
    remove_leftovers(checkpoints, _TARGETS)
    for name in os.listdir(checkpoints):
        path = checkpoints / name
        # Versions up to 0.1.0 named temporary files without a random part.
        is_old_leftover = name.endswith(".tmp") and re.fullmatch(_TARGETS, name.removesuffix(".tmp"))
        is_digest = name.endswith(".sha256") and re.fullmatch(_TARGETS, name)
        if is_old_leftover or (is_digest and not path.with_suffix("").exists()):
            path.unlink(missing_ok=True)


def newest(folder: Path, read: Callable[[Path], Content]) -> tuple[Path, Content] | None:
    """The newest checkpoint of a run's folder that is whole, and what `read` makes of it.

    One that is damaged is named in a warning and passed over; nothing is deleted. Where no other is whole,
    best.pt is one too.

    Returns:
        None where the folder holds none at all.

    Raises:
        ConfigError: it holds some, and all are damaged.
        UnreadableFileError: one cannot be read now. An older one in its place would leave a hole in the log,
            should this one be read the next time.
    """
    files = [path for _, path in step_files(folder)]
    if (folder / BEST).exists():
        files.append(folder / BEST)
    for path in files:
        try:
            check_digest(path, required=True)
            return path, read(path)
        except ConfigError as error:  # noqa: PERF203 (there are few)
            if isinstance(error, UnreadableFileError):
                raise
            _logger.warning("warning: passed over %s: %s", error.key, error.reason)
    if files:
        reason = f"none of the {len(files)} checkpoints in {folder / FOLDER} can be read"
        raise ConfigError("", f"{reason}; name another folder, or move them away to begin again")
    return None


def known_digests(path: Path) -> list[str]:
    """What the file beside `path` says it is: one digest, or two where its place is being taken by another.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    text = read_text(digest_file(path), _MAX_DIGEST_BYTES, errors="replace")
    return re.findall(r"^([0-9a-f]{64})  \S", text, flags=re.MULTILINE)
