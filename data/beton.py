"""The index of FFCV's files (.beton): offset, size and class of each image. FFCV is not needed to read them.

The format is that of FFCV 1 (https://docs.ffcv.io): a header, descriptors of the fields, one record per
sample, pages of images, and a table of allocations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vil.errors import UserError, error_reason

VERSION = 2
RAW_MODE = 1
"""Mode of an image that is stored as pixels; 0 is JPEG."""

_HEADER_TYPES = {"version": "<u2", "num_fields": "<u2", "page_size": "<u4", "num_samples": "<u8"}
_HEADER = np.dtype([*_HEADER_TYPES.items(), ("allocations", "<u8")], align=True)
_FIELD = np.dtype([("kind", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
_BYTES = np.dtype([("offset", "<u8"), ("size", "<u8")])
_INTEGER_KIND, _IMAGE_KIND = 1, 2
_RECORDS = {0: "<f8", 1: "<i8", 2: _IMAGE, 3: _BYTES, 4: "<u8", 5: _BYTES, 6: "<u8"}
_CUSTOM_KIND = 255
_KINDS = ("floats", "integers", "images", "bytes", "arrays", "JSON", "tensors")

LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls")
"""Names of the class field; a single integer field may have any name."""
IMAGE_NAMES = ("image", "images", "img")
"""Names of the image field if there are several."""
_ID_NAMES = ("index", "idx", "id", "key")
MAX_CLASS_INDEX = 999_999


class Beton:
    """The images and classes of a .beton file, found by the names of its fields.

    Args:
        path: the file.

    Attributes:
        targets: (images,), int64.
        widths, heights: (images,), stored size in pixels.
        raw: (images,), True for images that are stored as pixels.
        pages: (images,), the page of the file that contains the image; a page is read at once.

    Raises:
        UserError: the file is missing, is not a .beton file, is incomplete, or has no or several fields that
            may be the image or the class, an integer of at least 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read()
        except OSError as error:
            raise UserError("data.root", f"{path}: {error_reason(error)}") from None
        except UserError:  # a ValueError
            raise
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
            raise UserError("data.root", f"{path}: not an FFCV file, or incomplete") from None

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
        record = np.dtype([(f"{index}", _RECORDS[kind]) for index, kind in enumerate(kinds)], align=True)
        records = np.fromfile(self.path, record, count, offset=_HEADER.itemsize + fields.nbytes)
        images = records[str(image)]
        allocations = np.fromfile(self.path, _ALLOCATION, offset=int(header["allocations"]))
        allocations = allocations[np.argsort(allocations["offset"])]
        allocation = np.searchsorted(allocations["offset"], images["offset"])
        self.targets = records[str(label)].astype(np.int64)
        self.widths = images["width"].astype(np.int64)
        self.heights = images["height"].astype(np.int64)
        self.raw = images["mode"] == RAW_MODE
        self.pages = (images["offset"] // header["page_size"]).astype(np.int64)
        self._start = images["offset"].astype(np.int64)
        self._end = self._start + allocations["size"][allocation].astype(np.int64)
        is_allocated = np.array_equal(allocations["offset"][allocation], images["offset"])
        if len(records) != count or not is_allocated or (self._end > length).any():
            raise ValueError
        invalid = np.flatnonzero((self.targets < 0) | (self.targets > MAX_CLASS_INDEX))
        if len(invalid):
            reason = f"image {invalid[0]} has the class {self.targets[invalid[0]]} in field {names[label]!r}"
            raise UserError("data.root", f"{self.path}: {reason}; expected 0 to {MAX_CLASS_INDEX:,}")
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}  # another process maps the file anew

    def stored(self, index: int) -> np.ndarray:
        """Return the stored JPEG (bytes,), or the stored pixels (H, W, 3), uint8, without a copy."""
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, mode="r")
        content = self._map[self._start[index] : self._end[index]]
        if self.raw[index]:
            return content.reshape(self.heights[index], self.widths[index], 3)
        return content


def _find_fields(path: Path, names: Sequence[str], kinds: Sequence[int]) -> tuple[int, int]:
    """Return the indices of the image field and the class field, neither of them missing or ambiguous."""
    if _CUSTOM_KIND in kinds:
        name = names[kinds.index(_CUSTOM_KIND)]
        raise UserError("data.root", f"{path}: field {name!r} has a custom type, not one of FFCV's")
    described = ", ".join(f"{name!r} ({_KINDS[kind]})" for name, kind in zip(names, kinds))
    indices = []
    for content, kind, known in (
        ("an image", _IMAGE_KIND, IMAGE_NAMES),
        ("the class", _INTEGER_KIND, LABEL_NAMES),
    ):
        same_kind = [i for i in range(len(kinds)) if kinds[i] == kind]
        named = [i for i in range(len(kinds)) if names[i].lower() in known]
        candidates = [i for i in named if i in same_kind]
        if not named:
            candidates = [i for i in same_kind if names[i].lower() not in _ID_NAMES]
        if len(candidates) != 1:
            expected = f"one of {_KINDS[kind]}, named {known[0]!r} if there are several"
            reason = f"which field is {content} is ambiguous: it has {described}; expected {expected}"
            raise UserError("data.root", f"{path}: {reason}")
        indices.append(candidates[0])
    return indices[0], indices[1]
