"""Index of the images of a split, built once and mapped into memory by every process of a machine.

The file is in the format of safetensors (https://huggingface.co/docs/safetensors): arrays, and a few texts.
It is read only if it describes the same split, and if the folders and archives that were listed still have
the sizes and modification times in it. Its content is data: it is checked, and sources read no path in it
that leads out of the data set.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.mapped_file import MappedFile
from vil.errors import UserError, error_reason
from vil.runtime.console import progress_bar
from vil.runtime.files import (
    close_descriptor,
    open_for_appending,
    open_regular,
    parse_json,
    read_bytes,
    remove_leftovers,
    replacing,
)

_logger = logging.getLogger("vil.data.index")  # shown on every machine

OFF = "off"
"""Value of `data.index`: list the images at every start."""
MIN_IMAGES = 20_000
"""Smaller data sets are indexed only in a folder that `data.index` names: listing them is as fast."""
LOCK_TIMEOUT_S = 7200.0
"""Seconds to wait for the process that builds the index."""
WAITING_NOTICE_S = 15.0
_MAX_HEADER_BYTES = 1 << 20
_FORMAT = "1"
_RECENT_NS = 2_000_000_000
"""A folder that was modified so shortly before it was listed may change again without another time: file
systems have coarse clocks."""

_DTYPES = {
    name: np.dtype(code)
    for name, code in {
        "names": "<u1",  # paths, each followed by a null byte
        "name_ends": "<u8",  # (images,), of the null bytes
        "targets": "<i8",  # (images,)
        "classes": "<u1",  # names, each followed by a null byte
        "listed": "<u1",  # folders and archives, each followed by a null byte
        "stamps": "<i8",  # two for each of them: its size (-1: a folder), its modification time (-1: unknown)
        "archives": "<u4",  # (images,), for images in archives; as the following
        "offsets": "<u8",
        "sizes": "<u4",
        "kinds": "<i2",
        "checksums": "<u4",
        "full_sizes": "<u4",
    }.items()
}
LOCATION_ARRAYS = ("archives", "offsets", "sizes", "kinds", "checksums", "full_sizes")
"""Arrays of an index with the location of each image in an archive."""
_CODES = {"u1": "U8", "i2": "I16", "u4": "U32", "u8": "U64", "i8": "I64"}

Progress = Callable[[int], object]
"""Called with the number of images found since the last call."""


@dataclass(frozen=True)
class Index:
    """The images of a split, in order.

    Attributes:
        arrays: "names", "name_ends" and "targets" (int64); for images in archives also their locations.
        classes: class names, by target.
        listed: (path, size or -1 for a folder, modification time in ns) of the folders and archives that were
            listed, before that.
        skipped: number of files that are no images, and the first one.
    """

    arrays: dict[str, np.ndarray]
    classes: tuple[str, ...]
    listed: list[tuple[str, int, int]]
    skipped: tuple[int, str] = (0, "")

    @property
    def targets(self) -> np.ndarray:
        """Class indices, (images,), int64."""
        return self.arrays["targets"]

    def name(self, index: int) -> bytes:
        """Return the path of an image, which may lead out of the data set: see `is_inside`."""
        ends = self.arrays["name_ends"]
        start = int(ends[index - 1]) + 1 if index else 0
        return self.arrays["names"][start : int(ends[index])].tobytes()


@dataclass
class NameWriter:
    """Collect paths as bytes with their ends, without an object per path."""

    blob: bytearray = field(default_factory=bytearray)
    _ends: list[np.ndarray] = field(default_factory=list)

    def add(self, names: bytes) -> int:
        """Append paths that are each followed by a null byte, and return their number."""
        ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0) + len(self.blob)
        self._ends.append(ends.astype(np.uint64))
        self.blob += names
        return len(ends)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return "names" and "name_ends"."""
        ends = np.concatenate(self._ends) if self._ends else np.empty(0, np.uint64)
        return {"names": np.frombuffer(self.blob, np.uint8), "name_ends": ends}


def is_inside(path: bytes) -> bool:
    """Return True for a relative path without `..`."""
    return bool(path) and not path.startswith(b"/") and b".." not in path.split(b"/")


def size_and_mtime(path: str | Path) -> tuple[int, int]:
    """Return the size of a file, -1 for a folder, and the time of its last modification in ns."""
    status = os.stat(path)
    return -1 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns


def open_index(
    option: str | None,
    root: Path,
    identity: Sequence[str],
    build: Callable[[Progress], Index],
    files: Iterable[Path] | None = None,
    classes: tuple[str, ...] | None = None,
    maps: Sequence[str] = (),
) -> Index:
    """Return the index in the file of a split if nothing has changed; else build and write it.

    One process builds it, and the others that need it at the same time, also on other machines with the same
    folder for indexes, wait.

    Args:
        option: `data.index`.
        root: folder of the split, which the paths in the index are below.
        identity: source, split and whatever else the index depends on, apart from what was listed.
        build: lists the images.
        files: the archives, if they are found before; else the index names what was listed.
        classes: the class names, if they are known before.
        maps: files below the root that are listed before the archives; there is no file for others.

    Raises:
        UserError: as `build`; or another process is not finished within `LOCK_TIMEOUT_S`.
    """
    if option == OFF:
        return _build(build, root)
    folder = Path(option or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vil"))
    if outside := [name for name in maps if not is_inside(os.fsencode(name))]:
        return _without_file(folder, f"{outside[0]} is not below {root}", option, _build(build, root))
    listed = None if files is None else [(str(path), *size_and_mtime(path)) for path in files]
    try:
        text = json.dumps([_FORMAT, os.path.abspath(root), _folder_id(root), *identity])
        expected = _Expected(text, root, listed, classes, tuple(maps), identity[0] != "folder")
        path = folder.expanduser() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        if (index := _read(path, expected, is_quiet=True)) is not None:
            return index
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        return _without_file(folder, error_reason(error), option, _build(build, root))
    with _lock(path) as has_waited:
        index = _read(path, expected)
        if index is None and not has_waited:
            started = time.time_ns()
            index = _build(build, root)
            if len(index.targets) < MIN_IMAGES and option is None:
                return index
            try:
                remove_leftovers(path.parent, path.name)
                _write(path, text, index, started)
            except OSError as error:
                return _without_file(folder, error_reason(error), option, index)
            # The mapped file instead of the arrays: processes share its memory.
            return _read(path, expected, is_new=True) or index
    if index is None:  # the process that held the lock wrote none: a small data set, or it was killed
        problem = "the process that built it has not written it"
        if path.exists():
            problem = "the data set has changed since another process began to list it"
        return _without_file(folder, problem, option, _build(build, root))
    return index


@dataclass(frozen=True)
class _Expected:
    """The contents of an index file that can be used; for `listed`, `classes` and `maps` see `open_index`."""

    identity: str
    root: Path
    listed: list[tuple[str, int, int]] | None
    classes: tuple[str, ...] | None
    maps: tuple[str, ...]
    has_locations: bool


def _folder_id(path: Path) -> list[int]:
    """Return numbers that all machines have for a folder on a shared disk, but not for copies of it.

    Machines with copies at the same path, and one folder for indexes, would else replace each other's index.
    `st_dev` differs between clients of a shared disk, whose `f_fsid` is equal (NFS: 0).
    """
    return [os.statvfs(path).f_fsid, os.stat(path).st_ino]


def _build(build: Callable[[Progress], Index], root: Path) -> Index:
    with progress_bar(desc=f"indexing {root}", unit=" images", delay=2) as bar:
        return build(bar.update)


def _without_file(folder: Path, reason: str, option: str | None, index: Index) -> Index:
    if option is not None or len(index.targets) >= MIN_IMAGES:
        _logger.warning("data.index: %s: no index: %s; every process lists the images", folder, reason)
    return index


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock of an index file; yield True if another process held it. Without locks, yield False."""
    deadline, notice = time.monotonic() + LOCK_TIMEOUT_S, time.monotonic() + WAITING_NOTICE_S
    lock, has_waited = path.with_suffix(".lock"), False
    descriptor = None
    try:
        descriptor = open_for_appending(lock)
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                has_waited = True
            if time.monotonic() > deadline:
                reason = f"waited {LOCK_TIMEOUT_S / 60:.0f} minutes for {path}, built by {_holder(lock)}"
                raise UserError("data.index", f"{reason}; use --data.index off to run without an index")
            if time.monotonic() > notice:
                notice = float("inf")
                _logger.info("waiting for the index of the data set, built by %s", _holder(lock))
            time.sleep(0.05)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:  # a file system without locks, or a folder that is not writable
        has_waited = False
    try:
        yield has_waited
    finally:
        if descriptor is not None:
            if not has_waited:
                with suppress(OSError):
                    lock.unlink()  # those who wait for it still do
            close_descriptor(descriptor)


def _holder(lock: Path) -> str:
    with suppress(OSError):
        return read_bytes(lock, 4096).decode("utf-8", "replace").strip()
    return "another process"


def _write(path: Path, identity: str, index: Index, started: int) -> None:
    """Write an index that was listed from the time `started`, in ns, on; the file is always complete."""
    limit = started - _RECENT_NS
    stamps = [(size, time if time < limit else -1) for _, size, time in index.listed]
    arrays = {
        **index.arrays,
        "stamps": np.array(stamps, np.int64).reshape(-1),
        "classes": _join(index.classes),
        "listed": _join(name for name, _, _ in index.listed),
    }
    # Sorted by the size of their elements, they are aligned.
    arrays = {name: arrays[name] for name in sorted(arrays, key=lambda n: -_DTYPES[n].itemsize)}
    count, example = index.skipped
    header: dict[str, object] = {
        "__metadata__": {"identity": identity, "skipped": str(count), "example": example}
    }
    offset = 0
    for name, array in arrays.items():
        arrays[name] = array = array.astype(_DTYPES[name], copy=False)
        code = _CODES[array.dtype.str[1:]]
        header[name] = {"dtype": code, "shape": [array.size], "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with replacing(path) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


def _join(names: Iterable[str]) -> np.ndarray:
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def _split(blob: np.ndarray) -> list[str]:
    return [os.fsdecode(name) for name in blob.tobytes().split(b"\0")[:-1]]


def _read(path: Path, expected: _Expected, is_new: bool = False, is_quiet: bool = False) -> Index | None:
    """Return the index in a file; None if there is none, it is damaged, or what was listed has changed.

    A new file is not compared with what was listed. Damage is logged, unless `is_quiet`.
    """
    try:
        with open_regular(path) as file:
            arrays, texts = _read_arrays(file.fileno())
        if texts.get("identity") != expected.identity:
            raise ValueError("it describes another data set")
        if set(arrays) != set(_DTYPES) - set(() if expected.has_locations else LOCATION_ARRAYS):
            raise ValueError("its arrays are not those of its source")
        names, stamps = _split(arrays.pop("listed")), arrays.pop("stamps").reshape(-1, 2).tolist()
        index = Index(
            arrays,
            tuple(_split(arrays.pop("classes"))),
            [(name, size, time) for name, (size, time) in zip(names, stamps, strict=True)],
            (int(texts["skipped"]), texts["example"]),
        )
        _check_contents(index, expected)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if not is_quiet:
            _logger.warning("data.index: rebuilding %s: %s", path, error_reason(error))
        return None
    return index if is_new or _is_current(index, expected.root, expected.listed) else None


def _is_current(index: Index, root: Path, listed: list[tuple[str, int, int]] | None) -> bool:
    """Return True if the folders and archives that were listed have not changed."""
    if listed is not None:
        return index.listed == listed
    try:
        return all(
            is_inside(os.fsencode(name)) and size_and_mtime(os.path.join(root, name)) == (size, time)
            for name, size, time in index.listed
        )
    except OSError:
        return False


def _read_arrays(descriptor: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays of a file, mapped into memory, and its texts. Raise ValueError if it is damaged."""
    file = MappedFile(descriptor)
    content = file.content
    length = int.from_bytes(content[:8], "little")
    if length > min(_MAX_HEADER_BYTES, len(content)):
        raise ValueError("its header is damaged")
    header = parse_json(content[8 : 8 + length].decode())
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("its header is damaged")
    texts = header.pop("__metadata__")
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its header is damaged")
    arrays = {}
    for name, entry in header.items():
        dtype, (first, last) = _DTYPES[name], entry["data_offsets"]
        count = (last - first) // dtype.itemsize
        expected = {"dtype": _CODES[dtype.str[1:]], "shape": [count]}
        start = 8 + length + first
        is_inside_file = 0 <= first <= last and 8 + length + last <= len(content)
        if {key: entry[key] for key in expected} != expected or not is_inside_file:
            raise ValueError(f"its array {name} is damaged")
        arrays[name] = file.array(dtype, count, start)
    return arrays, texts


def _check_contents(index: Index, expected: _Expected) -> None:
    """Raise ValueError if parts of an index contradict each other or what is expected."""
    arrays, count = index.arrays, len(index.targets)
    ends, targets = arrays["name_ends"], index.targets
    size = int(ends[-1]) + 1 if count else 0
    is_rising = bool(np.all(ends[1:] > ends[:-1]))
    lengths = {len(arrays[name]) for name in ("name_ends", *LOCATION_ARRAYS) if name in arrays}
    if lengths != {count} or not count or not is_rising or size != len(arrays["names"]):
        raise ValueError("its arrays are damaged")
    is_in_range = 0 <= int(targets.min()) <= int(targets.max()) < len(index.classes)
    if not is_in_range or expected.classes not in (None, index.classes):
        raise ValueError("its classes are damaged")
    num_maps = len(expected.maps)
    listed = [name for name, _, _ in index.listed]
    has_archives = "archives" not in arrays or int(arrays["archives"].max()) < len(listed) - num_maps
    if tuple(listed[:num_maps]) != expected.maps or not has_archives:
        raise ValueError("its archives are damaged")
    if index.skipped[0] < 0:
        raise ValueError("its number of skipped files is negative")
