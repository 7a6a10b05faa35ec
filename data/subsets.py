"""Subsets of a training set: the images of a list, a fraction of each class, a number of images per class.

The images of a subset never depend on the run, and a larger subset contains a smaller one.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data.decoding import EncodedImage
from data.sources.base import Source
from vil.config import DataConfig, UserError, error_reason
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
        source = Subset(source, read_image_list(source, data.list_file))
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


def read_image_list(source: Source, path: str) -> np.ndarray:
    """Return the indices, rising, of the images that a text file names.

    A line is the image's path below the split's folder or in its archive, or its file name if no two images
    share it. Empty lines are ignored. Raises UserError if a line names no image or several.
    """
    try:
        lines = read_text(Path(path).expanduser(), errors="surrogateescape").split("\n")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError("data.list_file", f"{path}: {error_reason(error)}") from None
    by_name: dict[str, int] = {}
    by_file: dict[str, int] = {}  # -1: several images
    for index in range(len(source)):
        name = source.name(index)
        by_name[name] = index
        file = os.path.basename(name)
        by_file[file] = -1 if file in by_file else index
    indices: set[int] = set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        match = by_name.get(line.removeprefix("./"), by_file.get(line))
        if match is None or match < 0:
            problem = "not an image of the training split" if match is None else "the name of several images"
            raise UserError("data.list_file", f"{path}, line {number}: {line} is {problem}")
        indices.add(match)
    if not indices:
        raise UserError("data.list_file", f"{path}: does not name any image")
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
