"""Writes a data set as FFCV's files, which train.py and eval.py read with --data.source ffcv.

    python tools/write_ffcv.py --data.source folder --data.root /datasets/imagenet --output /datasets/ffcv
    python tools/write_ffcv.py --data.source folder --data.root photos --output ffcv --max_resolution null \
                               --jpeg_share 0                         lossless, at full size

The output folder then holds train.beton and val.beton, and beside each a JSON file with its classes, what it
was written from and how. A file has its name only once it is complete and has been compared with its source;
a file that is there already and was written in the same way is kept, so that the same line goes on after an
interruption.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from data.bad_images import allowed_bad_images
from data.beton import Beton
from data.ffcv_pipeline import import_ffcv
from data.sources import Source, open_source
from data.sources.base import listed
from data.sources.beton import description_file
from vil.command_line import main, parse
from vil.config import ConfigError, DataConfig
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text, write_durably

Split = Literal["train", "val"]
PAGE = 8 << 20
"""Smallest page of a file, in bytes; an image lies within one."""
LARGEST_PAGE = 1 << 31
LARGEST_SIDE = 65_535
TOO_LARGE = -1
"""Stands for the index of an image in notes of images that are larger than a page, with their bytes."""
COMPARED = 256


@dataclass
class WriteConfig:
    """Write a data set of any source as FFCV's files: train.beton and val.beton."""

    data: DataConfig = field(default_factory=DataConfig)
    output: str | None = None
    """Folder of the files."""
    splits: list[Split] = field(default_factory=lambda: ["train", "val"])
    """Which splits to write."""
    max_resolution: int | None = 500
    """Images whose longer side is longer are reduced to it, in pixels; null keeps all as they are."""
    jpeg_share: float = 0.5
    """Share of the images stored as JPEG, drawn at random; the others are pixels: faster, larger."""
    jpeg_quality: int = 90
    """Quality of these JPEGs, 1 to 100."""
    progress: bool = True
    """Show a progress bar."""


class Samples:
    """The images as FFCV's writer takes them: (pixels (H, W, 3) uint8, class).

    The writer waits for ever when one of its processes raises. What cannot be read is therefore noted in a
    file, and an image of one black pixel takes its place.
    """

    def __init__(self, source: Source, config: WriteConfig, page_size: int, notes: Path) -> None:
        self.source, self.config, self.page_size, self.notes = source, config, page_size, notes

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = int(index)
        try:
            pixels = self.pixels(index)
            if pixels.nbytes > self.page_size:
                self.note(TOO_LARGE, pixels.nbytes)
                pixels = pixels[:1, :1]
        except Exception as error:  # decoders raise anything on damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            self.note(index, reason)
            pixels = np.zeros((1, 1, 3), np.uint8)
        # FFCV draws which images become JPEGs from the global generator, after it has asked for the image.
        np.random.seed(index)  # noqa: NPY002
        return pixels, int(self.source.targets[index])

    def note(self, index: int, value: str | int) -> None:
        """Adds a line, at once, so that those of several processes do not mix."""
        with open(self.notes, "a", encoding="utf-8") as notes:
            notes.write(json.dumps([index, value]) + "\n")

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3): the image, reduced to the longest side that is allowed."""
        image, _ = self.source.load(index)
        longest, limit = max(image.size), self.config.max_resolution
        if limit is not None and longest > limit:
            width, height = (max(1, side * limit // longest) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if max(image.size) > LARGEST_SIDE:
            raise ValueError(f"a side is longer than {LARGEST_SIDE} pixels; --max_resolution reduces images")
        pixels = np.asarray(image)
        if pixels.nbytes > LARGEST_PAGE:
            raise ValueError(
                f"{image.width}×{image.height} pixels are larger than a page; --max_resolution reduces images"
            )
        return pixels


def write(words: Sequence[str]) -> None:
    """Writes the splits that are not there yet."""
    command = parse(WriteConfig, words, prog="write_ffcv.py")
    config = command.config
    try:
        check(config)
        for split in config.splits:
            write_split(config, split)
    except ConfigError as error:
        raise command.locate(error) from error


def check(config: WriteConfig) -> None:
    """Raises ConfigError for values that cannot be."""
    if not config.output:
        raise ConfigError("output", "is needed: the folder of the files")
    for key in ("train_fraction", "images_per_class", "list_file"):
        if getattr(config.data, key) != getattr(DataConfig(), key):
            raise ConfigError(f"data.{key}", "is for training; a file holds the whole split")
    if config.max_resolution is not None and not 1 <= config.max_resolution <= LARGEST_SIDE:
        raise ConfigError("max_resolution", f"expected 1 to {LARGEST_SIDE} pixels, or null")
    if not 0 <= config.jpeg_share <= 1:
        raise ConfigError("jpeg_share", "expected a share in [0, 1]")
    if not 1 <= config.jpeg_quality <= 100:
        raise ConfigError("jpeg_quality", "expected 1 to 100")
    try:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("output", f"{config.output} cannot be made: {error.strerror}") from None


def write_split(config: WriteConfig, split: Split) -> None:
    """Writes one file and its description, and compares it with the source, before it gets its name."""
    path = Path(str(config.output)) / f"{split}.beton"
    source = open_source(config.data, split, 3)
    described = description(config, split, source)
    if path.exists():
        keep_or_refuse(path, described)
        return
    import_ffcv()
    begun = time.perf_counter()
    indices = np.arange(len(source))
    page = page_size(3 * (config.max_resolution or 0) ** 2)
    # A folder of a name that nobody can predict: FFCV opens its file by its name, and follows links.
    with temporary_folder(path) as folder:
        partial, notes = folder / path.name, folder / "unreadable.jsonl"
        while True:  # once more with larger pages, or without the images that turn out to be unreadable
            notes.unlink(missing_ok=True)
            samples = Samples(source, config, page, notes)
            write_images(partial, samples, indices, config)
            noted = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
            if not noted:
                break
            page = page_size(max([page, *(value for index, value in noted if index == TOO_LARGE)]))
            if unreadable := {index: value for index, value in noted if index != TOO_LARGE}:
                described["unreadable"] += skipped(source, unreadable, config)
                indices = np.setdiff1d(indices, list(unreadable))
        compare(partial, samples, indices, config)
        try:
            write_durably(description_file(path), json.dumps(described, indent=1) + "\n")
            os.replace(partial, path)
        except OSError as error:
            raise ConfigError("output", f"cannot be written: {error.strerror or error}") from None
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - begun
    print(f"{path}: {len(indices)} images, {size:.1f} MB, {seconds:.0f} s")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` for what is not finished; it goes with all that is in it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ConfigError("output", f"cannot be written: {error.strerror or error}") from None
    with folder:
        yield Path(folder.name)


def description(config: WriteConfig, split: Split, source: Source) -> dict[str, Any]:
    """What stands beside the file: the classes, in the order of their indices, the source and the options."""
    origin = {key: value for key, value in asdict(config.data).items() if key in ("source", "root")}
    return {
        "class_names": list(source.class_names),
        "images": len(source),
        **origin,
        "split": config.data.train_split if split == "train" else config.data.val_split,
        **{key: getattr(config, key) for key in ("max_resolution", "jpeg_share", "jpeg_quality")},
        "unreadable": [],
    }


def keep_or_refuse(path: Path, described: dict[str, Any]) -> None:
    """Keeps a file that says of itself that it is what is to be written."""
    with suppress(OSError, ValueError):
        found = parse_json(read_text(description_file(path), MAX_JSON_BYTES))
        if {**found, "unreadable": []} == described:
            images = described["images"] - len(found["unreadable"])
            if len(Beton(path)) == images:
                print(f"{path}: {images} images, there already")
                return
    raise ConfigError("output", f"{path} exists and was written otherwise; remove it, or name another folder")


def page_size(bytes_of_image: int) -> int:
    """The smallest power of two that holds so many bytes; a file grows by as much per process that writes."""
    return max(PAGE, 1 << max(0, bytes_of_image - 1).bit_length())


def write_images(path: Path, samples: Samples, indices: np.ndarray, config: WriteConfig) -> None:
    """Has FFCV write the images."""
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField
    from tqdm import tqdm

    image = RGBImageField(
        write_mode="proportion",
        jpeg_quality=config.jpeg_quality,
        compress_probability=config.jpeg_share,
    )
    ffcv.writer.tqdm = functools.partial(tqdm, desc=path.stem, unit=" images", disable=not config.progress)
    workers = max(1, config.data.workers)
    writer = ffcv.writer.DatasetWriter(
        str(path), {"image": image, "label": IntField()}, samples.page_size, workers
    )
    with watched(ffcv.writer):
        writer.from_indexed_dataset(samples, indices, chunksize=min(100, -(-len(indices) // (4 * workers))))


@contextmanager
def watched(writer: ModuleType) -> Iterator[None]:
    """Ends what runs inside when one of FFCV's processes dies: its writer looks at a count of images, sleeps,
    and would do so for ever."""
    started: list[multiprocessing.Process] = []

    class Watched(multiprocessing.Process):
        def start(self) -> None:
            super().start()
            started.append(self)

    def sleep(seconds: float) -> None:
        if any(process.exitcode for process in started):
            raise ConfigError("output", "a process that wrote images died: memory or disk is full?")
        time.sleep(seconds)

    own = writer.Process, writer.sleep
    writer.Process, writer.sleep = Watched, sleep
    try:
        yield
    except OSError as error:
        raise ConfigError("output", f"cannot be written: {error.strerror or error}") from None
    finally:
        writer.Process, writer.sleep = own
        for process in started:
            process.terminate()
            process.join()


def skipped(source: Source, unreadable: dict[int, str], config: WriteConfig) -> list[str]:
    """The names of the unreadable images, where the configuration allows so many; else ConfigError."""
    names = [f"{source.describe(index)}: {reason}" for index, reason in sorted(unreadable.items())]
    if config.data.on_error == "fail":
        raise ConfigError("data.root", f"cannot be read: {listed(names)}")
    if len(unreadable) > allowed_bad_images(config.data.max_bad, len(source)):
        share = f"{len(unreadable)} of {len(source)} images cannot be read"
        raise ConfigError("data.max_bad", f"{share}, more than {config.data.max_bad:.2%}: {listed(names)}")
    return [source.describe(index) for index in sorted(unreadable)]


def compare(path: Path, samples: Samples, indices: np.ndarray, config: WriteConfig) -> None:
    """Compares all classes and some images of a file with its source; ConfigError for a difference."""
    from ffcv.fields.rgb_image import encode_jpeg

    beton = Beton(path)
    if not np.array_equal(beton.targets, samples.source.targets[indices]):
        raise ConfigError("output", f"{path}: classes differ from those of the source")
    for place in np.unique(np.linspace(0, len(indices) - 1, COMPARED).astype(int)):
        pixels = samples.pixels(int(indices[place]))
        expected = pixels if beton.raw[place] else encode_jpeg(pixels, config.jpeg_quality)
        if not np.array_equal(beton.stored(place), expected):
            raise ConfigError("output", f"{path}: image {place} differs from that of the source")


if __name__ == "__main__":
    main(write)
