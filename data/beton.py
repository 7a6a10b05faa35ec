"""FFCV's files, .beton: where each image lies in one. Reading them needs no FFCV.

The format is that of FFCV 1 (https://docs.ffcv.io): a header, descriptors of the fields, one record per
sample, pages of images, and a table of what was allocated where.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from vil.config import ConfigError

VERSION = 2
RAW = 1
"""Mode of an image that is stored as its pixels; 0 is JPEG."""

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("allocations", "<u8"),
    ],
    align=True,
)
_FIELD = np.dtype([("kind", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
_BYTES = np.dtype([("place", "<u8"), ("size", "<u8")])
_INTEGER_KIND, _IMAGE_KIND = 1, 2
_RECORDS = {0: "<f8", 1: "<i8", 2: _IMAGE, 3: _BYTES, 4: "<u8", 5: _BYTES, 6: "<u8"}


class Beton:
    """The images and classes of a .beton file: of its first fields that are images and integers.

    Args:
        path: the file.

    Attributes:
        targets: (images,), int64.
        widths, heights: (images,), of the images as stored, in pixels.
        raw: (images,), whether an image is stored as its pixels.
        pages: (images,), the page of the file on which an image lies: what lies on one is read together.

    Raises:
        ConfigError: the file is missing, is no .beton, or was not written to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read()
        except OSError as error:
            raise ConfigError("data.root", f"{path}: {error.strerror or error}") from None
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
            raise ConfigError("data.root", f"{path}: not an FFCV file, or not written to its end") from None

    def _read(self) -> None:
        length = os.path.getsize(self.path)
        header = np.fromfile(self.path, _HEADER, 1)[0]
        if header["version"] != VERSION or not 0 < header["allocations"] <= length:
            raise ValueError
        count = int(header["num_samples"])
        fields = np.fromfile(self.path, _FIELD, int(header["num_fields"]), offset=_HEADER.itemsize)
        kinds = fields["kind"].tolist()
        record = np.dtype([(f"{place}", _RECORDS[kind]) for place, kind in enumerate(kinds)], align=True)
        records = np.fromfile(self.path, record, count, offset=_HEADER.itemsize + fields.nbytes)
        images = records[str(kinds.index(_IMAGE_KIND))]
        allocations = np.fromfile(self.path, _ALLOCATION, offset=int(header["allocations"]))
        allocations = allocations[np.argsort(allocations["place"])]
        allocation = np.searchsorted(allocations["place"], images["place"])
        self.targets = records[str(kinds.index(_INTEGER_KIND))].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        self.heights = images["height"].astype(np.int64)
        self.raw = images["mode"] == RAW
        self.pages = (images["place"] // header["page_size"]).astype(np.int64)
        self._first = images["place"].astype(np.int64)
        self._end = self._first + allocations["size"][allocation].astype(np.int64)
        found = np.array_equal(allocations["place"][allocation], images["place"])
        if len(records) != count or not found or (self._end > length).any():
            raise ValueError
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # another process maps the file itself

    def stored(self, index: int) -> np.ndarray:
        """What is stored of an image, without a copy: its JPEG (bytes,), or its pixels (H, W, 3); uint8."""
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, mode="r")
        content = self._map[self._first[index] : self._end[index]]
        if self.raw[index]:
            return content.reshape(self.heights[index], self.widths[index], 3)
        return content
