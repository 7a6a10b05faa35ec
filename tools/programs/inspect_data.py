"""Report what a data set contains, before training on it.

    python tools/inspect_data.py photos                   root/<class>/<image>, or root/train and root/val
    python tools/inspect_data.py photos --json report.json --sheet sheet.png
    python tools/inspect_data.py /datasets/imagenet --source zip --splits train

The table has images per class and split, sizes, file formats, gray and deep images, unreadable files, exact
and near duplicates within and across splits, and class imbalance. Exact duplicates have equal pixels; near
duplicates have perceptual hashes (pHash of the package ImageHash, 64 bits) that differ in at most
--near-distance bits. Duplicates of another class or in another split come first: they are wrong labels, or
make the validation too optimistic. The sheet shows the first images of each class.

Exit status: 0, or 1 if an image cannot be read; 2 for invalid arguments or a data set that cannot be opened.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from argparse import ArgumentTypeError
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import refuse_images_as_outputs
from data.decoding import EncodedImage, UnreadableImageError, decoding_errors
from data.sources import SOURCES, open_source
from data.sources.base import Source, shorten_list
from data.workers import exit_with_parent, explain_shared_memory, limit_workers
from tools.png import as_png
from vil.command_line import ToolParser, bounded_int
from vil.config import DataConfig, Size, UserError, as_size, format_size, printable
from vil.runtime.console import align, print_line
from vil.runtime.files import check_outputs, check_writable, write_output

HASH_BITS = 64
MAX_NEAR_DISTANCE = 12
MAX_SHOWN = 10
"""Names, classes and pairs in each part of the table; the JSON file has all of them."""
MAX_SHEET_CLASSES = 60
THUMBNAIL = 128
"""Side of an image in the sheet, in pixels."""


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set.

    Attributes:
        split, class_name, name: of the image; `name` is its path below the split's folder or in its archive.
        error: why it cannot be read; the other attributes are then empty.
        width, height: in pixels, without the EXIF orientation.
        file_format: JPEG, PNG, ...
        mode: Pillow's mode: RGB, L, I;16, P, ...
        pixels: digest of the RGB pixels and the size.
        perceptual_hash: 64 bits.
    """

    split: str
    class_name: str
    name: str
    error: str | None = None
    width: int = 0
    height: int = 0
    file_format: str = ""
    mode: str = ""
    pixels: bytes = b""
    perceptual_hash: int = 0

    def __str__(self) -> str:
        """Return split and name, on one line."""
        return printable(f"{self.split}: {self.name}")


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that are equal (distance 0 and equal pixels) or similar.

    Attributes:
        distance: differing bits of the perceptual hashes.
        is_exact: True if the pixels are equal.
    """

    first: ImageRecord
    second: ImageRecord
    distance: int
    is_exact: bool

    @property
    def is_across_splits(self) -> bool:
        """True if the images are in different splits."""
        return self.first.split != self.second.split

    @property
    def is_across_classes(self) -> bool:
        """True if the images have different classes."""
        return self.first.class_name != self.second.class_name

    def as_json(self) -> dict[str, object]:
        """Return the pair for the JSON file."""
        images = [
            {"split": x.split, "class": x.class_name, "name": x.name} for x in (self.first, self.second)
        ]
        return {"images": images, "distance": self.distance, "exact": self.is_exact}


@dataclass(frozen=True)
class Report:
    """The findings about a data set.

    Attributes:
        images: all images, split by split.
        class_names: names of the classes, by index.
        image_size: (height, width) of the model's images in pixels, or one number for both.
        duplicates: pairs of similar images.
    """

    images: list[ImageRecord]
    class_names: tuple[str, ...]
    image_size: int | Size
    duplicates: list[DuplicatePair]

    @property
    def readable(self) -> list[ImageRecord]:
        """Images that can be read."""
        return [image for image in self.images if image.error is None]

    @property
    def unreadable(self) -> list[ImageRecord]:
        """Images that cannot be read."""
        return [image for image in self.images if image.error is not None]

    def images_per_class(self, split: str) -> Counter[str]:
        """Return the number of images of each class in a split, 0 for absent classes."""
        counts = Counter(dict.fromkeys(self.class_names, 0))
        counts.update(image.class_name for image in self.images if image.split == split)
        return counts

    @property
    def splits(self) -> list[str]:
        """Names of the inspected splits."""
        return list(dict.fromkeys(image.split for image in self.images))

    def smaller_images(self) -> list[ImageRecord]:
        """Return the images that do not cover the model's image size, the smallest first."""
        height, width = as_size(self.image_size)
        small = [image for image in self.readable if image.height < height or image.width < width]
        return sorted(small, key=lambda image: min(image.width, image.height))


def main(argv: Sequence[str]) -> None:
    """Inspect a data set; print the table, and write the JSON file and the sheet.

    Raises:
        UserError: an argument or the data set cannot be used.
        SystemExit: with status 1 if an image cannot be read.
    """
    arguments = _parser().parse_args(argv)
    outputs = {"--json": arguments.json, "--sheet": arguments.sheet}
    check_outputs(outputs, ())
    refuse_images_as_outputs(outputs, [arguments.root])
    for option, path in outputs.items():
        if path is not None:
            check_writable(path, option)
    sources = open_splits(arguments.root, arguments.source, arguments.splits)
    images = list(read_images(sources, arguments.workers))
    class_names = next(iter(sources.values())).class_names
    duplicates = find_duplicates(images, arguments.near_distance)
    report = Report(images, class_names, arguments.image_size, duplicates)
    if arguments.json is not None:
        write_output(arguments.json, json.dumps(as_json(report), indent=1) + "\n", "--json")
    if arguments.sheet is not None:
        write_output(arguments.sheet, contact_sheet(sources, arguments.columns), "--sheet")
    for line in as_text(report).splitlines():
        print_line(line)  # also into a pipe that is closed, as of head
    if report.unreadable:
        raise SystemExit(1)


def _parser() -> ToolParser:
    parser = ToolParser(prog="inspect_data.py", description=__doc__)
    add, workers = parser.add_argument, min(4, os.cpu_count() or 1)
    add("root", help="folder of the data set, as data.root")
    add("--source", default="folder", help=f"as data.source: {', '.join(SOURCES)} (default: folder)")
    splits_help = "as data.train_split and data.val_split; default: those that exist of train and val, or "
    splits_help += "the images of the root itself"
    add("--splits", nargs="+", metavar="NAME", help=splits_help)
    size_help = "PIXELS or HEIGHT,WIDTH of the model: smaller images are counted (default: 224)"
    add("--image-size", type=_image_size, default=224, metavar="PIXELS", help=size_help)
    distance_help = f"largest number of differing bits of {HASH_BITS} (default: 4)"
    near = bounded_int(0, MAX_NEAR_DISTANCE)
    add("--near-distance", type=near, default=4, metavar="BITS", help=distance_help)
    add("--json", type=Path, metavar="FILE", help="write the full report, with every file name")
    add("--sheet", type=Path, metavar="FILE", help="write a PNG with the first images of each class")
    add("--columns", type=bounded_int(1, 30), default=8, metavar="N", help="images per class of the sheet")
    add("--workers", type=bounded_int(0), default=workers, metavar="N", help="processes that read images")
    return parser


def _image_size(text: str) -> int | Size:
    sides = tuple(map(bounded_int(1), text.split(",")))
    if len(sides) > 2:
        raise ArgumentTypeError(f"expected PIXELS or HEIGHT,WIDTH, e.g. 160,224, got {text!r}")
    return sides[0] if len(set(sides)) == 1 else (sides[0], sides[1])


# --- Reading ------------------------------------------------------------------------------------------------


def open_splits(root: str, source: str, names: Sequence[str] | None) -> dict[str, Source]:
    """Return the sources of the splits by name.

    Without names: train and val if both can be opened, else all images as one split.

    Raises:
        UserError: a split cannot be opened.
    """

    def open_split(name: str, training: str) -> Source:
        data = DataConfig(source=source, root=root, train_split=training, val_split=name)
        return open_source(data, "val", 3)

    if names is not None:
        return {name: open_split(name, names[0]) for name in names}
    defaults = DataConfig(source=source, root=root)
    unsplit = DataConfig(source=source, root=root, val_fraction=0.5)
    try:
        name = SOURCES[source].unsplit_name(unsplit) if source in SOURCES else defaults.train_split
    except UserError:  # there is a validation split, or the source always has one
        return {name: open_split(name, defaults.train_split) for name in ("train", "val")}
    return {"all" if name in (".", "*.tar") else name: open_split(name, name)}


class _Images(Dataset[ImageRecord]):
    """The images of all splits, in order."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self._sources = sources
        self._index = [(split, index) for split, source in sources.items() for index in range(len(source))]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._index)

    def __getitem__(self, index: int) -> ImageRecord:
        split, position = self._index[index]
        source = self._sources[split]
        class_name = source.class_names[int(source.targets[position])]
        name = source.name(position)
        try:
            with decoding_errors():
                return describe_image(source.read(position), split, class_name, name)
        except UnreadableImageError as error:
            return ImageRecord(split, class_name, name, error=str(error))


def describe_image(encoded: EncodedImage, split: str, class_name: str, name: str) -> ImageRecord:
    """Decode an image and return its record. Raises UnreadableImageError."""
    file_format, mode = encoded.header()
    image = encoded.to_pil()
    digest = blake2b(image.tobytes(), digest_size=16, person=f"{image.width}x{image.height}".encode())
    bits = imagehash.phash(image).hash.flatten()
    perceptual_hash = int.from_bytes(np.packbits(bits).tobytes(), "big")
    size = (image.width, image.height)
    return ImageRecord(
        split, class_name, name, None, *size, file_format, mode, digest.digest(), perceptual_hash
    )


def read_images(sources: dict[str, Source], workers: int) -> Iterator[ImageRecord]:
    """Yield the record of every image, with a progress bar on standard error."""
    loader = DataLoader(
        _Images(sources),
        batch_size=None,
        num_workers=limit_workers(workers),
        worker_init_fn=exit_with_parent,
    )
    with tqdm(total=len(loader), unit="image", disable=None, file=sys.stderr, leave=False) as bar:
        for record in explain_shared_memory(loader):
            yield record
            bar.update()


# --- Duplicates ---------------------------------------------------------------------------------------------


def find_duplicates(images: Sequence[ImageRecord], distance: int) -> list[DuplicatePair]:
    """Return the pairs of readable images with equal pixels or hashes of at most this distance.

    Pairs of different splits or classes come first. Of a group of images with equal pixels, or with equal
    hashes, each is paired with the first of the group alone.
    """
    groups: dict[bytes, list[ImageRecord]] = defaultdict(list)
    for image in images:
        if image.error is None:
            groups[image.pixels].append(image)
    pairs = [
        DuplicatePair(group[0], other, 0, is_exact=True) for group in groups.values() for other in group[1:]
    ]
    by_hash: dict[int, list[ImageRecord]] = defaultdict(list)
    for group in groups.values():
        by_hash[group[0].perceptual_hash].append(group[0])
    for group in by_hash.values():
        pairs += [DuplicatePair(group[0], other, 0, is_exact=False) for other in group[1:]]
    different = [group[0] for group in by_hash.values()]
    for first, second in near_pairs(np.array(list(by_hash), dtype=np.uint64), distance):
        one, other = different[first], different[second]
        bits = (one.perceptual_hash ^ other.perceptual_hash).bit_count()
        pairs.append(DuplicatePair(one, other, bits, is_exact=False))
    return sorted(
        pairs,
        key=lambda pair: (
            not (pair.is_across_splits or pair.is_across_classes),
            not pair.is_exact,
            pair.distance,
            str(pair.first),
            str(pair.second),
        ),
    )


def near_pairs(hashes: np.ndarray, distance: int) -> list[tuple[int, int]]:
    """Return the pairs (i, j), i < j, of 64-bit hashes that differ in at most `distance` bits.

    Two hashes that differ in d bits are equal in at least one of d + 1 groups of bits, so that only hashes
    with an equal group are compared.
    """
    found: set[tuple[int, int]] = set()
    for bits in np.array_split(np.arange(HASH_BITS, dtype=np.uint64), distance + 1):
        mask = np.bitwise_or.reduce(np.uint64(1) << bits)
        order = np.argsort(hashes & mask, kind="stable")
        keys = (hashes & mask)[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True])
        for start, end in itertools.pairwise(starts.tolist()):
            bucket = np.sort(order[start:end])
            for position, index in enumerate(bucket[:-1]):
                others = bucket[position + 1 :]
                differing = (hashes[others] ^ hashes[index]).view(np.uint8).reshape(-1, 8)
                is_near = np.unpackbits(differing, axis=1).sum(axis=1) <= distance
                found.update((int(index), int(other)) for other in others[is_near])
    return sorted(found)


# --- Output -------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, object]:
    """Return the full report."""
    counts = {split: dict(report.images_per_class(split)) for split in report.splits}
    return {
        "classes": list(report.class_names),
        "images": {split: sum(by_class.values()) for split, by_class in counts.items()},
        "images_per_class": counts,
        "imbalance": {split: _imbalance(by_class.values()) for split, by_class in counts.items()},
        "formats": dict(Counter(image.file_format for image in report.readable)),
        "modes": dict(Counter(image.mode for image in report.readable)),
        "widths": _quartiles([image.width for image in report.readable]),
        "heights": _quartiles([image.height for image in report.readable]),
        "image_size": report.image_size,
        "smaller_images": [
            {"split": x.split, "name": x.name, "width": x.width, "height": x.height}
            for x in report.smaller_images()
        ],
        "unreadable": [{"split": x.split, "name": x.name, "reason": x.error} for x in report.unreadable],
        "duplicates": [pair.as_json() for pair in report.duplicates],
    }


def as_text(report: Report) -> str:
    """Return the table."""
    readable = report.readable
    lines = [f"{len(report.images):,} images of {len(report.class_names)} classes", ""]
    lines += _class_table(report)
    lines += ["", *_absent_classes(report)]
    if readable:
        for name in ("width", "height"):
            low, middle, high = _quartiles([getattr(x, name) for x in readable])[::2]
            lines.append(f"{name:12}{low} to {high} pixels, median {middle}")
    lines.append(f"{'formats':12}{_counted(x.file_format for x in readable)}")
    lines.append(f"{'modes':12}{_counted(_mode_name(x.mode) for x in readable)}")
    if small := report.smaller_images():
        size = report.image_size if isinstance(report.image_size, int) else format_size(report.image_size)
        example = f"the smallest is {small[0]}, {small[0].width}×{small[0].height}"
        lines.append(f"{'small':12}{len(small):,} images are smaller than {size}; {example}")
    if unreadable := report.unreadable:
        lines.append(f"{'unreadable':12}{len(unreadable):,}")
        lines += _limited([printable(f"{image}: {image.error}") for image in unreadable])
    lines += _duplicate_lines(report.duplicates)
    return "\n".join(lines)


def _class_table(report: Report) -> list[str]:
    """Return the images per class and split: all classes, or the largest and smallest ones."""
    splits = report.splits
    counts = {split: report.images_per_class(split) for split in splits}
    shown = names = list(report.class_names)
    if len(names) > 2 * MAX_SHOWN:
        by_size = sorted(names, key=lambda name: -counts[splits[0]][name])
        shown = [*by_size[:MAX_SHOWN], *by_size[-MAX_SHOWN:]]
    rows = [["class", *splits], *([printable(x), *(f"{counts[s][x]:,}" for s in splits)] for x in shown)]
    if len(shown) < len(names):
        rows.insert(1 + MAX_SHOWN, [f"… {len(names) - len(shown)} more", *("…" for _ in splits)])
    rows.append(["all", *(f"{sum(counts[split].values()):,}" for split in splits)])
    ratios = [_imbalance(counts[split].values()) for split in splits]
    rows.append(["largest / smallest", *("–" if ratio is None else f"{ratio:.1f}" for ratio in ratios)])
    return align(rows)


def _absent_classes(report: Report) -> list[str]:
    lines = []
    for split in report.splits:
        if absent := [name for name, count in report.images_per_class(split).items() if not count]:
            names = printable(shorten_list(absent, MAX_SHOWN))
            lines.append(f"{split} lacks {len(absent)} of {len(report.class_names)} classes: {names}")
    return lines


def _duplicate_lines(pairs: Sequence[DuplicatePair]) -> list[str]:
    lines = []
    for title, is_exact in (("equal", True), ("similar", False)):
        selected = [pair for pair in pairs if pair.is_exact == is_exact]
        splits = sum(pair.is_across_splits for pair in selected)
        classes = sum(pair.is_across_classes for pair in selected)
        count = "1 pair" if len(selected) == 1 else f"{len(selected):,} pairs"
        lines.append(f"{title:12}{count}, {splits:,} across splits, {classes:,} across classes")
        notes = []
        for pair in selected:
            kinds = ["across splits"] * pair.is_across_splits + ["across classes"] * pair.is_across_classes
            kinds += [] if is_exact else [f"{pair.distance} of {HASH_BITS} bits differ"]
            sign = "=" if is_exact else "≈"
            notes.append(f"{pair.first} {sign} {pair.second}" + (f" ({', '.join(kinds)})" if kinds else ""))
        lines += _limited(notes)
    return lines


def _limited(lines: Sequence[str]) -> list[str]:
    more = [f"  … {len(lines) - MAX_SHOWN:,} more in the JSON file"] if len(lines) > MAX_SHOWN else []
    return [*(f"  {line}" for line in lines[:MAX_SHOWN]), *more]


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in Counter(names).most_common()) or "–"


def _mode_name(mode: str) -> str:
    """Return Pillow's mode with its meaning: gray, deep (more than 8 bits), ..."""
    names = {"L": "gray", "1": "black and white", "P": "palette", "RGBA": "alpha", "LA": "gray with alpha"}
    name = "deep" if mode in ("I", "F") or mode.startswith("I;") else names.get(mode, "")
    return f"{mode} ({name})" if name else mode


def _imbalance(counts: Iterable[int]) -> float | None:
    """Return the size of the largest class as a multiple of the smallest present one's; None without any."""
    present = [count for count in counts if count]
    return max(present) / min(present) if present else None


def _quartiles(values: Sequence[int]) -> list[int]:
    """Return minimum, quartiles and maximum, as (minimum, first, median, third, maximum); empty for none."""
    return [int(value) for value in np.percentile(values, (0, 25, 50, 75, 100))] if values else []


def contact_sheet(sources: dict[str, Source], columns: int) -> bytes:
    """Return a PNG with a row per class of up to `columns` readable images, of the first split that has it.

    Of more than `MAX_SHEET_CLASSES` classes, the first ones are shown.
    """
    from matplotlib.figure import Figure

    class_names = next(iter(sources.values())).class_names
    shown = class_names[:MAX_SHEET_CLASSES]
    figure = Figure(figsize=(1.1 * columns + 2, 1.1 * len(shown)), layout="compressed")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, (target, name) in zip(grid, enumerate(shown)):
        row[0].set_ylabel(printable(name), rotation=0, ha="right", va="center", fontsize=9)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
        for axes, image in zip(row, itertools.islice(_class_images(sources, target), columns)):
            axes.imshow(image)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of scripts that no installed font has
        return as_png(figure)


def _class_images(sources: dict[str, Source], target: int) -> Iterator[Image.Image]:
    """Yield the readable images of a class, as squares of `THUMBNAIL` pixels, padded with white."""
    for source in sources.values():
        for index in np.flatnonzero(source.targets == target):
            try:
                with decoding_errors():
                    image = source.read(int(index)).to_pil()
            except UnreadableImageError:
                continue
            yield ImageOps.pad(image, (THUMBNAIL, THUMBNAIL), color="white")
