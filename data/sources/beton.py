"""FFCV's files: root/train.beton and root/val.beton, as tools/write_ffcv.py writes them.

Here their images are read one by one, as they are evaluated; training reads them by data/ffcv_pipeline.py.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from data.beton import Beton
from data.decoding import Mode, Picture
from data.sources.base import Source, Split, root_folder, split_name
from vil.config import ConfigError, DataConfig
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text


class BetonImages(Source):
    """The images of a .beton file, in its order.

    Args:
        path: the file.
        mode: RGB or L (grey).

    Attributes:
        beton: the file.

    Raises:
        ConfigError: the file, or the description beside it, is missing or not what it should be.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        self.beton = Beton(path)
        self.targets = self.beton.targets
        self.class_names = _class_names(self.beton)
        self._mode = mode

    def picture(self, index: int) -> Picture:
        """The image, of which a JPEG is not decoded yet."""
        stored = self.beton.stored(index)
        content = Image.fromarray(stored) if self.beton.raw[index] else stored.tobytes()
        return Picture(content, self._mode)

    def describe(self, index: int) -> str:
        """The file and the image's place in it."""
        return f"image {index} of {self.beton.path}"


def description_file(path: Path) -> Path:
    """The JSON file beside a .beton file: its classes, what it was written from and how."""
    return path.with_suffix(".json")


def _class_names(beton: Beton) -> tuple[str, ...]:
    """As described beside the file; without a description, as FFCV itself writes none, the numbers."""
    path = description_file(beton.path)
    highest = int(beton.targets.max(initial=-1))
    if not path.exists():
        return tuple(str(target) for target in range(highest + 1))
    try:
        names = tuple(str(name) for name in parse_json(read_text(path, MAX_JSON_BYTES))["class_names"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("data.root", f"{path}: no list class_names can be read from it") from None
    if highest >= len(names):
        raise ConfigError("data.root", f"{path}: {len(names)} classes, but {beton.path} has class {highest}")
    return names


def open_beton(data: DataConfig, split: Split, mode: Mode) -> Source:
    """root/<split>.beton."""
    if data.download:
        raise ConfigError(
            "data.download", "FFCV's files are not downloaded, but written by tools/write_ffcv.py"
        )
    path = root_folder(data) / f"{split_name(data, split)}.beton"
    if not path.is_file():
        reason = "no such file; tools/write_ffcv.py writes it from any other source"
        raise ConfigError("data.root", f"{path}: {reason}")
    return BetonImages(path, mode)
