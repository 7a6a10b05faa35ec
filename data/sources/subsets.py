"""Subsets of a training set: the images of a list, a fraction of each class, a number of images per class.

The images of a subset never depend on the run, and a larger subset contains a smaller one.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.decoding import EncodedImage
from data.sources.base import Source
from vil.config import DataConfig
from vil.errors import UserError, error_reason
from vil.runtime.class_names import normal_form
from vil.runtime.files import read_text
from vil.runtime.seeding import seed_sequence

SUBSET_SEED = 20210515
"""A constant: published results on a tenth of ImageNet refer to one tenth."""


class Subset(Source):
    """The images of a source with these indices, (images,), rising, and all of its classes."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices
        self.class_names = source.class_names
        self.targets = source.targets[indices]

    def read(self, index: int) -> EncodedImage:
        """Read an image."""
        return self._source.read(int(self._indices[index]))

    def describe(self, index: int) -> str:
        """Return the image's description by its source."""
        return self._source.describe(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Return the image's name in its source."""
        return self._source.name(int(self._indices[index]))


def unwrap_subset(source: Source) -> tuple[Source, np.ndarray]:
    """Return the source that `source` is a subset of, or itself, and the indices of the subset's images."""
    indices = np.arange(len(source))
    while isinstance(source, Subset):
        indices = source._indices[indices]
        source = source._source
    return source, indices


def select_subset(source: Source, data: DataConfig) -> Source:
    """Apply `list_file`, then `train_fraction`, then `images_per_class` to a training set."""
    if data.list_file is not None:
        source = Subset(source, ImageList.read(data.list_file, "data.list_file").find(source))
        if len(np.unique(source.targets)) < 2:
            reason = f"all of its images are of one class, {source.class_names[source.targets[0]]}"
            raise UserError("data.list_file", f"{data.list_file}: {reason}; training needs two or more")
    if data.train_fraction == 1 and data.images_per_class is None:
        return source
    ranks, class_sizes = _ranks_in_class(source)
    is_kept = ranks < np.ceil(data.train_fraction * class_sizes - 1e-9)  # at least one image per class
    if data.images_per_class is not None:
        is_kept &= ranks < data.images_per_class
    return Subset(source, np.flatnonzero(is_kept))


def image_names(source: Source) -> list[str]:
    """Return the name of each image; names that several images share are prefixed with the class."""
    names = [source.name(index) for index in range(len(source))]
    counts = Counter(names)
    return [
        f"{source.class_names[target]}/{name}" if counts[name] > 1 else name
        for name, target in zip(names, source.targets.tolist())
    ]


@dataclass(frozen=True)
class ImageList:
    """A text file that names images, one per line.

    A line is the image's path below the split's folder or in its archive, with the class in front if several
    archives have the path, or its file name if no two images share it. Empty lines are ignored.

    Attributes:
        path: the file, for messages.
        option: the option that names it.
        lines: its lines.
    """

    path: str
    option: str
    lines: list[str]

    @classmethod
    def read(cls, path: str, option: str) -> ImageList:
        """Read the file. Raise UserError if that fails."""
        try:
            text = read_text(Path(path).expanduser(), errors="surrogateescape")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(option, f"{path}: {error_reason(error)}") from None
        return cls(path, option, text.split("\n"))

    def find(self, source: Source) -> np.ndarray:
        """Return the indices of the images in a source, rising.

        Raises:
            UserError: the list is empty, or has a line that names no image or several.
        """
        by_name: dict[str, int] = {}  # -1: several images
        by_file: dict[str, int] = {}
        for index, name in enumerate(map(normal_form, image_names(source))):
            by_name[name] = -1 if name in by_name else index
            file = os.path.basename(name)
            by_file[file] = -1 if file in by_file else index
        indices: set[int] = set()
        for number, line in enumerate(map(str.strip, map(normal_form, self.lines)), start=1):
            if not line:
                continue
            match = by_name.get(line.removeprefix("./"), by_file.get(line))
            if match is None or match < 0:
                is_unknown = match is None
                problem = "not an image of the training split" if is_unknown else "the name of several images"
                raise UserError(self.option, f"{self.path}, line {number}: {line} is {problem}")
            indices.add(match)
        if not indices:
            raise UserError(self.option, f"{self.path}: does not name any image")
        return np.array(sorted(indices), dtype=np.int64)


def _ranks_in_class(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's rank in a fixed shuffled order of its class, and the size of its class."""
    targets = source.targets
    drawn = np.random.default_rng(seed_sequence(SUBSET_SEED, "subset")).random(len(targets))
    by_class = np.lexsort((drawn, targets))  # sorted by class, shuffled within each
    class_sizes = np.bincount(targets, minlength=len(source.class_names))
    starts = np.cumsum(class_sizes) - class_sizes
    ranks = np.empty(len(targets), dtype=np.int64)
    ranks[by_class] = np.arange(len(targets)) - starts[targets[by_class]]
    return ranks, class_sizes[targets]
