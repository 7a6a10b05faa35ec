"""The report on a data set, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data.sources.base import shorten_list
from tools.data_inspection.duplicates import HASH_BITS, DuplicatePair
from tools.data_inspection.images import ImageRecord
from vil.config import Size, as_size, format_size
from vil.errors import printable
from vil.runtime.console import align

MAX_SHOWN = 10
"""Names, classes and pairs in each part of the table; the JSON file has all of them."""


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
