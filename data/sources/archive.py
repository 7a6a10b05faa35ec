"""Images in zip or tar archives: indexed once, then read at their offset by any number of processes.

`pread` reads at an offset without moving the file position, so that forked processes may share an open file.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data.decoding import EncodedImage, Mode
from data.index import LOCATION_ARRAYS, Index, NameWriter
from data.sources.base import Source, validation_path
from vil.config import DataConfig
from vil.errors import UserError, error_reason
from vil.runtime.files import close_descriptor
from vil.runtime.images import MAX_ENCODED_BYTES

PLAIN, ENCRYPTED = -1, -2
"""Kinds of a member in addition to the compression types of `zipfile`."""
_ZIP_HEADER_BYTES = 30  # of a local header before the name
_ZIP_EXTRA_BYTES = 64  # usual length of the extra field behind it

MIN_INFLATED_LIMIT, MAX_INFLATION = 1 << 26, 64
"""A deflated image may have this many bytes, or this multiple of its size in the archive: compressed images
do not shrink further, but a blank uncompressed one does."""


class Member(NamedTuple):
    """Location of a file in an archive."""

    archive: int
    """Index of the archive."""
    offset: int
    """Offset of its first byte, or of its local header in a zip."""
    size: int
    """Size in the archive."""
    name: str
    """Path in the archive."""
    kind: int = PLAIN
    """PLAIN, or for a zip its compression type or ENCRYPTED."""
    checksum: int = 0
    """CRC-32 (zip)."""
    full_size: int = 0
    """Uncompressed size (zip)."""


def index_members(
    members: Sequence[Member],
    targets: Sequence[int],
    class_names: tuple[str, ...],
    listed: list[tuple[str, int, int]],
    skipped: tuple[int, str] = (0, ""),
) -> Index:
    """Return an index of members of archives, in their order. For `listed` and `skipped` see `Index`."""
    names = NameWriter()
    for first in range(0, len(members), 4096):
        names.add(b"".join(os.fsencode(member.name) + b"\0" for member in members[first : first + 4096]))
    arrays = names.arrays()
    arrays["targets"] = np.array(targets, dtype=np.int64)
    limits = (2**32 - 1, 1 << 62, 2**32 - 1, 2**15 - 1, 2**32 - 1, 2**32 - 1)  # a directory may claim more
    columns = ("archive", "offset", "size", "kind", "checksum", "full_size")
    for name, column, limit, dtype in zip(
        LOCATION_ARRAYS, columns, limits, ("u4", "u8", "u4", "i2", "u4", "u4")
    ):
        values = (min(getattr(member, column), limit) for member in members)
        arrays[name] = np.fromiter(values, dtype, len(members))
    return Index(arrays, class_names, listed, skipped)


class ArchivedImages(Source):
    """Images in archives at the locations in an index, read as RGB or L (gray)."""

    def __init__(
        self, archives: Sequence[Path], index: Index, class_names: tuple[str, ...], mode: Mode
    ) -> None:
        self.class_names = class_names
        self.targets = index.targets
        self._paths = [str(path) for path in archives]
        self._index = index
        self._locations = [index.arrays[name] for name in LOCATION_ARRAYS]
        if int(self._locations[0].max(initial=0)) >= len(archives):
            raise UserError("data.index", f"the index of {archives[0].parent} is damaged; delete it")
        self._mode = mode
        self._files: dict[int, int] = {}

    @classmethod
    def dataset_name(cls, data: DataConfig) -> str:
        """Return the source and the path of the validation split."""
        return f"{data.source}:{validation_path(data)}"

    def read(self, index: int) -> EncodedImage:
        """Read the image's bytes from its archive."""
        archive, offset, size, kind, checksum, full_size = (int(array[index]) for array in self._locations)
        if max(size, full_size) > MAX_ENCODED_BYTES:
            raise OSError(f"is larger than {MAX_ENCODED_BYTES:,} bytes")
        if kind == PLAIN:
            return EncodedImage(self._pread(archive, offset, size), self._mode)
        # The local header repeats the name, with an extra field of another length than in the directory.
        length = _ZIP_HEADER_BYTES + len(self._index.name(index)) + _ZIP_EXTRA_BYTES + size
        content = self._pread(archive, offset, length, min_size=_ZIP_HEADER_BYTES)
        if content[:4] != b"PK\3\4":
            raise OSError("no local header at its offset in the archive")
        name_bytes, extra_bytes = (int.from_bytes(content[i : i + 2], "little") for i in (26, 28))
        start = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
        content = content[start : start + size]
        if len(content) < size:
            content = self._pread(archive, offset + start, size)
        if kind == zipfile.ZIP_DEFLATED:
            if full_size > max(MIN_INFLATED_LIMIT, MAX_INFLATION * size):
                raise OSError(f"would inflate from {size:,} to {full_size:,} bytes, more than any image")
            # At most the size that the archive declares; a limit of 0 would mean no limit.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(1, full_size))
        if zlib.crc32(content) != checksum:
            raise OSError("its checksum differs from the archive's")
        return EncodedImage(content, self._mode)

    def describe(self, index: int) -> str:
        """Return the archive and the path in it."""
        return f"{self._paths[self._locations[0][index]]}/{self.name(index)}"

    def name(self, index: int) -> str:
        """Return the path in the archive."""
        return os.fsdecode(self._index.name(index))

    def _pread(self, archive: int, offset: int, size: int, min_size: int | None = None) -> bytes:
        """Read `size` bytes, or at least `min_size` at the end of the archive."""
        if archive not in self._files:
            self._files[archive] = os.open(self._paths[archive], os.O_RDONLY | os.O_CLOEXEC)
        parts, missing = [], size
        while missing:
            part = os.pread(self._files[archive], missing, offset + size - missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        if size - missing < (size if min_size is None else min_size):
            raise OSError("the archive ends before it")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __getstate__(self) -> dict[str, object]:
        """Return the state without open files, for a process that is not forked."""
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            close_descriptor(file)


def safe_name(name: str) -> str | None:
    """Normalize a path in an archive: without ./ and a leading /; return None if it leads outside."""
    path = PurePosixPath(name.lstrip("/"))
    if ".." in path.parts or "\\" in name or "\0" in name or path == PurePosixPath():
        return None
    return str(path)


def check_file(path: Path, expected: str) -> None:
    """Raise UserError if `path` is not a file."""
    try:
        if path.is_file():
            return
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError("data.root", f"{path}: {error_reason(error)}") from None
    raise UserError("data.root", f"{path}: no such file; expected {expected}")
