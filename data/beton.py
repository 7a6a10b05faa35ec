"""FFCV's files, .beton: where each image lies in one. Reading them needs no FFCV.

The format is that of FFCV 1 (https://docs.ffcv.io): a header, descriptors of the fields, one record per
sample, pages of images, and a table of what was allocated where.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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
_OTHER_KIND = 255
_KINDS = ("floats", "integers", "images", "bytes", "arrays", "JSON", "tensors")

LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls")
"""Names of the field that holds the class; the only integer field needs none of them."""
IMAGE_NAMES = ("image", "images", "img")
"""Names of the field that holds the image, where there are several."""
_ID_NAMES = ("index", "idx", "id", "key")
MAX_CLASS = 999_999


class Beton:
    """The images and classes of a .beton file, in the fields that are named as such.

    Args:
        path: the file.

    Attributes:
        targets: (images,), int64.
        widths, heights: (images,), of the images as stored, in pixels.
        raw: (images,), whether an image is stored as its pixels.
        pages: (images,), the page of the file on which an image lies: what lies on one is read together.

    Raises:
        ConfigError: the file is missing, is no .beton, was not written to its end, or does not say which
            field is the image and which, of whole numbers from 0, the class.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read()
        except OSError as error:
            raise ConfigError("data.root", f"{path}: {error.strerror or error}") from None
        except ConfigError:  # a ValueError
            raise
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
            raise ConfigError("data.root", f"{path}: not an FFCV file, or not written to its end") from None

    def _read(self) -> None:
        length = os.path.getsize(self.path)
        header = np.fromfile(self.path, _HEADER, 1)[0]
        if header["version"] != VERSION or not 0 < header["allocations"] <= length:
            raise ValueError
        count = int(header["num_samples"])
        fields = np.fromfile(self.path, _FIELD, int(header["num_fields"]), offset=_HEADER.itemsize)
        if not 0 < len(fields) == header["num_fields"]:
            raise ValueError
        kinds = fields["kind"].tolist()
        names = [field.tobytes().rstrip(b"\0").decode("ascii") for field in fields["name"]]
        image, label = _find_fields(self.path, names, kinds)
        record = np.dtype([(f"{place}", _RECORDS[kind]) for place, kind in enumerate(kinds)], align=True)
        records = np.fromfile(self.path, record, count, offset=_HEADER.itemsize + fields.nbytes)
        images = records[str(image)]
        allocations = np.fromfile(self.path, _ALLOCATION, offset=int(header["allocations"]))
        allocations = allocations[np.argsort(allocations["place"])]
        allocation = np.searchsorted(allocations["place"], images["place"])
        self.targets = records[str(label)].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        self.heights = images["height"].astype(np.int64)
        self.raw = images["mode"] == RAW
        self.pages = (images["place"] // header["page_size"]).astype(np.int64)
        self._first = images["place"].astype(np.int64)
        self._end = self._first + allocations["size"][allocation].astype(np.int64)
        found = np.array_equal(allocations["place"][allocation], images["place"])
        if len(records) != count or not found or (self._end > length).any():
            raise ValueError
        outside = np.flatnonzero((self.targets < 0) | (self.targets > MAX_CLASS))
        if len(outside):
            reason = f"image {outside[0]} has the class {self.targets[outside[0]]} in field {names[label]!r}"
            raise ConfigError("data.root", f"{self.path}: {reason}; expected 0 to {MAX_CLASS:,}")
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


def _find_fields(path: Path, names: Sequence[str], kinds: Sequence[int]) -> tuple[int, int]:
    """Return the places of the image's field and of its class's.

    Raises:
        ConfigError: there is none of either, or it is ambiguous.
    """
    if _OTHER_KIND in kinds:
        name = names[kinds.index(_OTHER_KIND)]
        raise ConfigError("data.root", f"{path}: field {name!r} is of a kind that is not FFCV's own")
    described = ", ".join(f"{name!r} ({_KINDS[kind]})" for name, kind in zip(names, kinds))
    found = []
    for what, kind, known in (
        ("an image", _IMAGE_KIND, IMAGE_NAMES),
        ("the class", _INTEGER_KIND, LABEL_NAMES),
    ):
        of_kind = [i for i in range(len(kinds)) if kinds[i] == kind]
        named = [i for i in range(len(kinds)) if names[i].lower() in known]
        candidates = [i for i in named if i in of_kind]
        if not named:
            candidates = [i for i in of_kind if names[i].lower() not in _ID_NAMES]
        if len(candidates) != 1:
            needed = f"{_KINDS[kind]}, named {known[0]!r} where there are several"
            reason = f"which field is {what} is not clear: it has {described}; expected one of {needed}"
            raise ConfigError("data.root", f"{path}: {reason}")
        found.append(candidates[0])
    return found[0], found[1]
