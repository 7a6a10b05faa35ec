"""Parts of a training set: named in a list, a share of each class, so many of each class.

Which images a part holds never depends on the run, and a larger part holds those of a smaller one.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data.decoding import Picture
from data.sources.base import Source
from vil.config import ConfigError, DataConfig
from vil.randomness import seed_sequence
from vil.runtime.files import read_text

SUBSET_SEED = 20210515  # a constant: figures of a tenth of ImageNet belong to one tenth


class Subset(Source):
    """Some images of a source, with its classes.

    Args:
        source: all images.
        indices: (images,), those to keep, rising.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source = source
        self._indices = indices
        self.class_names = source.class_names
        self.targets = source.targets[indices]

    def picture(self, index: int) -> Picture:
        """The image."""
        return self._source.picture(int(self._indices[index]))

    def describe(self, index: int) -> str:
        """The image, as its source says it."""
        return self._source.describe(int(self._indices[index]))

    def name(self, index: int) -> str:
        """The image, as its source lists it."""
        return self._source.name(int(self._indices[index]))


def origin(source: Source) -> tuple[Source, np.ndarray]:
    """The source of which `source` is a part, or itself, and which of its images that part holds."""
    indices = np.arange(len(source))
    while isinstance(source, Subset):
        indices = source._indices[indices]
        source = source._source
    return source, indices


def chosen(source: Source, data: DataConfig) -> Source:
    """The part of a training set that `data` asks for: of those in list_file, the share, of these the number.

    Raises:
        ConfigError: an option is out of range, the list is not one of images of the source, or its images
            are all of one class.
    """
    if not 0 < data.train_fraction <= 1:
        raise ConfigError("data.train_fraction", f"expected a share in (0, 1], got {data.train_fraction}")
    if data.images_per_class is not None and data.images_per_class < 1:
        raise ConfigError("data.images_per_class", f"expected at least 1, got {data.images_per_class}")
    if data.list_file is not None:
        source = Subset(source, listed_images(source, data.list_file))
        if len(np.unique(source.targets)) < 2:
            reason = f"all of its images are of one class, {source.class_names[source.targets[0]]}"
            raise ConfigError("data.list_file", f"{data.list_file}: {reason}; training needs two or more")
    if data.train_fraction == 1 and data.images_per_class is None:
        return source
    places, sizes = _places_in_class(source)
    kept = places < np.ceil(data.train_fraction * sizes - 1e-9)  # a class keeps one image at least
    if data.images_per_class is not None:
        kept &= places < data.images_per_class
    return Subset(source, np.flatnonzero(kept))


def listed_images(source: Source, path: str) -> np.ndarray:
    """Indices, rising, of the images that a text file names.

    A line is the image's path below the split's folder or in its archive, or its plain file name where no two
    images share it. Empty lines are passed over.

    Raises:
        ConfigError: the file cannot be read, names none, or one that is not there or not alone.
    """
    try:
        lines = read_text(Path(path).expanduser(), errors="surrogateescape").split("\n")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("data.list_file", f"{path}: {reason}") from None
    by_name: dict[str, int] = {}
    by_file: dict[str, int] = {}
    for index in range(len(source)):
        name = source.name(index)
        by_name[name] = index
        file = os.path.basename(name)
        by_file[file] = -1 if file in by_file else index
    found: set[int] = set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        place = by_name.get(line.removeprefix("./"), by_file.get(line))
        if place is None or place < 0:
            reason = "is no image of the training split" if place is None else "is the name of several images"
            raise ConfigError("data.list_file", f"{path}, line {number}: {line} {reason}")
        found.add(place)
    if not found:
        raise ConfigError("data.list_file", f"{path}: names no image")
    return np.array(sorted(found), dtype=np.int64)


def _places_in_class(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """For each image its place in a fixed shuffled order of its class, and the size of its class."""
    targets = source.targets
    drawn = np.random.default_rng(seed_sequence(SUBSET_SEED, "subset")).random(len(targets))
    by_class = np.lexsort((drawn, targets))  # sorted by class, shuffled within each
    sizes = np.bincount(targets, minlength=len(source.class_names))
    firsts = np.cumsum(sizes) - sizes
    places = np.empty(len(targets), dtype=np.int64)
    places[by_class] = np.arange(len(targets)) - firsts[targets[by_class]]
    return places, sizes[targets]
