"""Images inside archives, zip or tar: found once, then read at their place by any number of processes.

Reading names the place (`pread`) and moves no file position, so that processes may share an open file, also
one that was open before a fork.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from data.decoding import MAX_ENCODED_BYTES, Mode, Picture
from data.sources.base import Source
from vil.config import ConfigError

PLAIN, ZIP_STORED, ZIP_DEFLATED = range(3)
_ZIP_HEADER = 30  # bytes of a local header before the name

FREE_INFLATED_BYTES, MAX_INFLATION = 1 << 26, 64
"""A deflated image may have this size, or be so many times as large as in the archive: images that are
compressed already do not shrink, and a blank one that is not, does."""


class Member(NamedTuple):
    """Where a file lies in an archive."""

    archive: int
    """Which of the archives."""
    offset: int
    """Of its first byte, or of its local header in a zip."""
    size: int
    """In the archive."""
    name: str
    """Its path there."""
    kind: int = PLAIN
    """How it is stored."""
    checksum: int = 0
    """CRC-32 (zip)."""
    full_size: int = 0
    """Once it is inflated (zip)."""


class ArchivedImages(Source):
    """Images in archives.

    Args:
        archives: paths of the archives.
        members: the images.
        targets: the class of each.
        class_names: in the order of their indices.
        mode: RGB or L (grey).
    """

    def __init__(
        self,
        archives: Sequence[Path],
        members: Sequence[Member],
        targets: Sequence[int],
        class_names: tuple[str, ...],
        mode: Mode,
    ) -> None:
        self.class_names = class_names
        self.targets = np.array(targets, dtype=np.int64)
        self._paths = [str(path) for path in archives]
        # Arrays, not lists: reading a list changes the reference counts of its elements, and so copies its
        # memory, page by page, into every forked worker.
        self._names = np.array([os.fsencode(member.name) for member in members], dtype=np.bytes_)
        most = MAX_ENCODED_BYTES + 1
        places = [
            # A directory may claim up to 2^64 bytes, and an offset as large.
            (m.archive, min(m.offset, 1 << 62), min(m.size, most), m.kind, m.checksum, min(m.full_size, most))
            for m in members
        ]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 6)
        self._mode = mode
        self._files: dict[int, int] = {}

    def picture(self, index: int) -> Picture:
        """The image's bytes, out of its archive."""
        archive, offset, size, kind, checksum, full_size = self._places[index].tolist()
        if max(size, full_size) > MAX_ENCODED_BYTES:
            raise OSError(f"is larger than {MAX_ENCODED_BYTES:,} bytes")
        if kind == PLAIN:
            return Picture(self._read(archive, offset, size), self._mode)
        # The local header repeats the name, with an extra field of its own length.
        name = len(self._names[index])
        content = self._read(archive, offset, _ZIP_HEADER + name + 64 + size, least=_ZIP_HEADER)
        if content[:4] != b"PK\3\4":
            raise OSError("its place in the archive holds something else")
        start = (
            _ZIP_HEADER + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
        )
        content = content[start : start + size]
        if len(content) < size:
            content = self._read(archive, offset + start, size)
        if kind == ZIP_DEFLATED:
            if full_size > max(FREE_INFLATED_BYTES, MAX_INFLATION * size):
                raise OSError(f"would be {full_size:,} bytes of {size:,} in the archive, which no image is")
            # No more than the archive says; 0 would be no limit.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(1, full_size))
        if zlib.crc32(content) != checksum:
            raise OSError("its checksum differs from the archive's")
        return Picture(content, self._mode)

    def describe(self, index: int) -> str:
        """The archive and the path in it."""
        return f"{self._paths[self._places[index, 0]]}/{self.name(index)}"

    def name(self, index: int) -> str:
        """The path in the archive."""
        return os.fsdecode(self._names[index])

    def _read(self, archive: int, offset: int, size: int, least: int | None = None) -> bytes:
        if archive not in self._files:
            self._files[archive] = os.open(self._paths[archive], os.O_RDONLY | os.O_CLOEXEC)
        parts, missing = [], size
        while missing:
            part = os.pread(self._files[archive], missing, offset + size - missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        if size - missing < (size if least is None else least):
            raise OSError("the archive ends before it")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is not forked: it opens the files itself."""
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def safe_name(name: str) -> str | None:
    """A path in an archive in its plain form, without ./ and a leading /; None where it leads outside."""
    path = PurePosixPath(name.lstrip("/"))
    return (
        None if ".." in path.parts or "\\" in name or "\0" in name or path == PurePosixPath() else str(path)
    )


def one_line(error: Exception) -> str:
    """Why an archive cannot be read."""
    return str(getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__)


def check_file(path: Path, what: str) -> None:
    """Raises ConfigError where `path` is no file."""
    try:
        if path.is_file():
            return
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError("data.root", f"{path}: {one_line(error)}") from None
    raise ConfigError("data.root", f"{path}: no such file; expected {what}")
