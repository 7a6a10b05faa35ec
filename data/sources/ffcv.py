"""FFCV's files: root/train.beton and root/val.beton, as tools/write_ffcv.py writes them.

This source reads their images one by one, for evaluation; training reads them by data/ffcv_loader.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from data.beton import Beton
from data.decoding import EncodedImage, Mode
from data.sources.base import Source, Split, root_folder, split_name, validation_path
from vil.config import DataConfig
from vil.errors import UserError
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text


class FFCVImages(Source):
    """The images of a .beton file, in its order."""

    def __init__(self, path: Path, mode: Mode) -> None:
        self.beton = Beton(path)
        self.targets = self.beton.targets
        self.class_names = _class_names(self.beton)
        self._mode = mode

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open root/<split>.beton."""
        path = root_folder(data) / f"{split_name(data, split)}.beton"
        if not os.path.isfile(path):
            reason = "no such file; tools/write_ffcv.py writes it from any other source"
            raise UserError("data.root", f"{path}: {reason}")
        return cls(path, mode)

    @classmethod
    def dataset_name(cls, data: DataConfig) -> str:
        """Return the file, without its extension."""
        return f"{data.source}:{validation_path(data)}"

    def read(self, index: int) -> EncodedImage:
        """Read a JPEG, or pixels."""
        stored = self.beton.stored(index)
        content = Image.fromarray(stored) if self.beton.raw[index] else stored.tobytes()
        return EncodedImage(content, self._mode)

    def describe(self, index: int) -> str:
        """Return the file and the index of the image."""
        return f"image {index} of {self.beton.path}"


def description_file(path: Path) -> Path:
    """Return the JSON file of a .beton file with its classes, source and options."""
    return path.with_suffix(".json")


def _class_names(beton: Beton) -> tuple[str, ...]:
    """Return the names in the description file, or the class indices without a file."""
    path = description_file(beton.path)
    highest = int(beton.targets.max(initial=-1))
    if not path.exists():
        return tuple(str(target) for target in range(highest + 1))
    try:
        names = tuple(str(name) for name in parse_json(read_text(path, MAX_JSON_BYTES))["class_names"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("data.root", f"{path}: contains no readable list class_names") from None
    if highest >= len(names):
        raise UserError("data.root", f"{path}: {len(names)} classes, but {beton.path} has class {highest}")
    return names
