"""What a source of images is, and what all sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data.decoding import Mode, Picture
from vil.config import ConfigError, DataConfig

Split = Literal["train", "val"]


class Source(ABC):
    """A set of labelled images that can be read in any order, by any number of processes.

    Attributes:
        class_names: in the order of their indices.
        targets: (images,), int64, the class of each.
    """

    class_names: tuple[str, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    @abstractmethod
    def picture(self, index: int) -> Picture:
        """The image, read but not decoded. Raises what comes of a file that cannot be read."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The decoded image and its class. Raises UnreadableImageError, or what `picture` raises."""
        return self.picture(index).image(), int(self.targets[index])

    @abstractmethod
    def describe(self, index: int) -> str:
        """The image's file, or what else finds it again, for messages."""

    def name(self, index: int) -> str:
        """The image's name in lists of images: a path below the split's folder or in its archive."""
        return self.describe(index)


Opener = Callable[[DataConfig, Split, Mode], Source]


def split_name(data: DataConfig, split: Split) -> str:
    """The data set's own name of a split."""
    return data.train_split if split == "train" else data.val_split


def root_folder(data: DataConfig) -> Path:
    """`data.root`, which the source needs. Raises ConfigError where it is not given."""
    if not data.root:
        raise ConfigError("data.root", f"is needed for source {data.source}: the folder of the data set")
    try:
        return Path(data.root).expanduser()
    except RuntimeError as error:
        raise ConfigError("data.root", f"{data.root}: {error}") from None


def listed(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
