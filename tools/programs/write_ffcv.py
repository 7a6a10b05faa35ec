"""Write a data set as FFCV files, for train.py and eval.py with --data.source ffcv.

    python tools/write_ffcv.py --data.source folder --data.root /datasets/imagenet --output /datasets/ffcv
    python tools/write_ffcv.py --data.source folder --data.root photos --output ffcv --max-resolution none
           --jpeg-share 0                                             lossless, at full size

The output folder holds train.beton and val.beton, and for each a JSON file with the class names, the
source and the options. A file gets its name when it is complete and has been compared with its source.
Existing files with the same options are kept, so that the same command continues an interrupted one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from data.beton import Beton
from data.ffcv_loader import import_ffcv
from data.sources import Source, open_source
from data.sources.base import Split, shorten_list
from data.sources.ffcv import description_file
from data.sources.held_out import has_held_out_images
from data.unreadable_images import max_unreadable_images
from vil.command_line import ToolParser, bounded_int, parse
from vil.config import DataConfig
from vil.errors import UserError, error_reason
from vil.runtime.console import print_line, progress_bar
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text, write_durably

MIN_PAGE_BYTES, MAX_PAGE_BYTES = 8 << 20, 1 << 31
"""Size of a page of the file; an image lies within one page."""
MAX_SIDE = 65_535
TOO_LARGE = -1
"""Index of a note about an image that exceeds the page size, with its bytes."""
COMPARED_IMAGES = 256


@dataclass(frozen=True)
class WriteOptions:
    """Options of the files; `max_resolution` is None for full size, `jpeg_share` in [0, 1]."""

    output: Path
    max_resolution: int | None
    jpeg_share: float
    jpeg_quality: int
    progress: bool


@dataclass
class DataOptions:
    """The section `data` of train.py."""

    data: DataConfig = field(default_factory=DataConfig)


def main(argv: Sequence[str]) -> None:
    """Write the splits that do not exist yet."""
    arguments, data_argv = _parser().parse_known_args(argv)
    splits = arguments.__dict__.pop("splits")
    options = WriteOptions(**vars(arguments))
    command = parse(DataOptions, data_argv, prog="write_ffcv.py")
    data = command.config.data
    try:
        for key in ("train_fraction", "images_per_class", "list_file"):
            if getattr(data, key) != getattr(DataConfig(), key):
                raise UserError(f"data.{key}", "applies to training; a file holds the whole split")
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("--output", f"{options.output} cannot be made: {error.strerror}") from None
        for split in splits:
            write_split(data, options, split)
    except UserError as error:
        raise command.locate(error) from error


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="write_ffcv.py",
        description=__doc__,
        allow_abbrev=False,
        epilog="The data set is given by --data and --data.NAME, as for train.py.",
    )
    add, splits = parser.add_argument, get_args(Split)
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder of the files")
    add("--splits", nargs="+", choices=splits, default=splits, help="default: both")
    limit = "longer side to which larger images are reduced; none for full size (default: 500)"
    add("--max-resolution", type=_side, default=500, metavar="PIXELS", help=limit)
    share = "share of the images stored as JPEG; others are stored as pixels: faster, larger (default: 0.5)"
    add("--jpeg-share", type=_share, default=0.5, metavar="SHARE", help=share)
    add("--jpeg-quality", type=bounded_int(1, 100), default=90, metavar="QUALITY", help="default: 90")
    add("--no-progress", dest="progress", action="store_false", help="show no bar")
    return parser


def _side(text: str) -> int | None:
    return None if text == "none" else bounded_int(1, MAX_SIDE)(text)


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


class Samples:
    """Images for FFCV's writer: (pixels (H, W, 3) uint8, class).

    The writer hangs when one of its processes raises. Errors are therefore noted in a file, and a black pixel
    replaces the image.
    """

    def __init__(self, source: Source, options: WriteOptions, page_bytes: int, notes: Path) -> None:
        self.source, self.options, self.page_bytes, self.notes = source, options, page_bytes, notes

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = int(index)
        try:
            pixels = self.pixels(index)
            if pixels.nbytes > self.page_bytes:
                self.note(TOO_LARGE, pixels.nbytes)
                pixels = pixels[:1, :1]
        except Exception as error:  # decoders raise any error on damaged files
            self.note(index, error_reason(error))
            pixels = np.zeros((1, 1, 3), np.uint8)
        # Afterwards FFCV draws from the global generator whether the image becomes a JPEG.
        np.random.seed(index)  # noqa: NPY002
        return pixels, int(self.source.targets[index])

    def note(self, index: int, value: str | int) -> None:
        """Append a line in one write, so that lines of several processes do not mix."""
        with open(self.notes, "a", encoding="utf-8") as notes:
            notes.write(json.dumps([index, value]) + "\n")

    def pixels(self, index: int) -> np.ndarray:
        """Return the image (H, W, 3), reduced to the maximum resolution."""
        image, _ = self.source.load(index)
        longer_side, limit = max(image.size), self.options.max_resolution
        if limit is not None and longer_side > limit:
            width, height = (max(1, side * limit // longer_side) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if max(image.size) > MAX_SIDE:
            raise ValueError(f"a side is longer than {MAX_SIDE} pixels; --max-resolution reduces images")
        pixels = np.asarray(image)
        if pixels.nbytes > MAX_PAGE_BYTES:
            size = f"{image.width}×{image.height}"
            raise ValueError(f"{size} pixels are larger than a page; --max-resolution reduces images")
        return pixels


def write_split(data: DataConfig, options: WriteOptions, split: Split) -> None:
    """Write one file and its description; compare it with the source before it gets its name."""
    path = options.output / f"{split}.beton"
    source = open_source(data, split, 3)
    description = describe(data, options, split, source)
    if path.exists():
        check_existing(path, description)
        return
    import_ffcv()
    start = time.perf_counter()
    indices = np.arange(len(source))
    page_bytes = page_size(3 * (options.max_resolution or 0) ** 2)
    # FFCV opens its file by name and follows links; the folder's name is unpredictable.
    with _write_errors():
        temporary = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with temporary:
        partial, notes = Path(temporary.name) / path.name, Path(temporary.name) / "unreadable.jsonl"
        while True:  # repeat with larger pages, or without the images that turn out to be unreadable
            notes.unlink(missing_ok=True)
            samples = Samples(source, options, page_bytes, notes)
            write_images(partial, samples, indices, data.workers)
            noted = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
            if not noted:
                break
            page_bytes = page_size(max([page_bytes, *(value for i, value in noted if i == TOO_LARGE)]))
            if unreadable := {i: value for i, value in noted if i != TOO_LARGE}:
                description["unreadable"] += skip_unreadable(source, unreadable, data)
                indices = np.setdiff1d(indices, list(unreadable))
        compare(partial, samples, indices)
        with _write_errors():
            write_durably(description_file(path), json.dumps(description, indent=1) + "\n")
            os.replace(partial, path)
    megabytes, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
    print_line(f"{path}: {len(indices)} images, {megabytes:.1f} MB, {seconds:.0f} s")


@contextmanager
def _write_errors() -> Iterator[None]:
    """Convert an OSError to a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError("--output", f"cannot be written: {error_reason(error)}") from None


def describe(data: DataConfig, options: WriteOptions, split: Split, source: Source) -> dict[str, Any]:
    """Return the content of the JSON file: class names in the order of their indices, source and options."""
    return {
        "class_names": list(source.class_names),
        "images": len(source),
        "source": data.source,
        "root": data.root,
        "split": data.train_split if split == "train" else data.val_split,
        **{key: getattr(options, key) for key in ("max_resolution", "jpeg_share", "jpeg_quality")},
        "unreadable": [],
        **({"held_out": _digest(source)} if has_held_out_images(data) else {}),
    }


def _digest(source: Source) -> str:
    """Return a digest of the names of the images: which ones are held out is not seen in their number."""
    names = "\0".join(source.name(index) for index in range(len(source)))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def check_existing(path: Path, description: dict[str, Any]) -> None:
    """Raise UserError unless an existing file was written from the same source with the same options."""
    with suppress(OSError, ValueError):
        existing = parse_json(read_text(description_file(path), MAX_JSON_BYTES))
        if {**existing, "unreadable": []} == description:
            images = description["images"] - len(existing["unreadable"])
            if len(Beton(path)) == images:
                print_line(f"{path}: {images} images, exists already")
                return
    reason = f"{path} exists and was written with other options; remove it, or name another folder"
    raise UserError("--output", reason)


def page_size(image_bytes: int) -> int:
    """Return the smallest power of two that holds an image; each process of the writer adds a page."""
    return max(MIN_PAGE_BYTES, 1 << max(0, image_bytes - 1).bit_length())


def write_images(path: Path, samples: Samples, indices: np.ndarray, workers: int) -> None:
    """Write the images with FFCV."""
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    options, workers = samples.options, max(1, workers)
    image = RGBImageField(
        write_mode="proportion", jpeg_quality=options.jpeg_quality, compress_probability=options.jpeg_share
    )
    ffcv.writer.tqdm = functools.partial(
        progress_bar, desc=path.stem, unit=" images", is_hidden=not options.progress
    )
    fields = {"image": image, "label": IntField()}
    writer = ffcv.writer.DatasetWriter(str(path), fields, samples.page_bytes, workers)
    with _detect_dead_processes(ffcv.writer):
        writer.from_indexed_dataset(samples, indices, chunksize=min(100, -(-len(indices) // (4 * workers))))


@contextmanager
def _detect_dead_processes(writer: Any) -> Iterator[None]:
    """Raise UserError when a process of FFCV's writer dies; its loop would wait for images forever."""
    processes: list[multiprocessing.Process] = []

    class TrackedProcess(multiprocessing.Process):
        def start(self) -> None:
            super().start()
            processes.append(self)

    def sleep(seconds: float) -> None:
        if any(process.exitcode for process in processes):
            raise UserError("--output", "a writer process died; memory or disk may be full")
        time.sleep(seconds)

    originals = writer.Process, writer.sleep
    writer.Process, writer.sleep = TrackedProcess, sleep
    try:
        with _write_errors():
            yield
    finally:
        writer.Process, writer.sleep = originals
        for process in processes:
            process.terminate()
            process.join()


def skip_unreadable(source: Source, unreadable: dict[int, str], data: DataConfig) -> list[str]:
    """Return the names of the unreadable images. Raise UserError if the configuration allows fewer."""
    names = [f"{source.describe(index)}: {reason}" for index, reason in sorted(unreadable.items())]
    if data.unreadable_images == "fail":
        raise UserError("data.root", f"cannot be read: {shorten_list(names)}")
    if len(unreadable) > max_unreadable_images(data.max_unreadable_fraction, len(source)):
        count = f"{len(unreadable)} of {len(source)} images cannot be read"
        reason = f"{count}, more than {data.max_unreadable_fraction:.2%}: {shorten_list(names)}"
        raise UserError("data.max_unreadable_fraction", reason)
    return [source.describe(index) for index in sorted(unreadable)]


def compare(path: Path, samples: Samples, indices: np.ndarray) -> None:
    """Raise UserError if a class or one of some images of a file differs from the source."""
    from ffcv.fields.rgb_image import encode_jpeg

    beton = Beton(path)
    if not np.array_equal(beton.targets, samples.source.targets[indices]):
        raise UserError("--output", f"{path}: classes differ from those of the source")
    for position in np.unique(np.linspace(0, len(indices) - 1, COMPARED_IMAGES).astype(int)):
        pixels = samples.pixels(int(indices[position]))
        expected = pixels if beton.raw[position] else encode_jpeg(pixels, samples.options.jpeg_quality)
        if not np.array_equal(beton.stored(position), expected):
            raise UserError("--output", f"{path}: image {position} differs from that of the source")
