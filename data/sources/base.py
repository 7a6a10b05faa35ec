"""The interface of a data source, and functions that several sources share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data.decoding import EncodedImage, Mode
from vil.config import DataConfig
from vil.errors import UserError

Split = Literal["train", "val"]


class Source(ABC):
    """Labeled images that any number of processes can read in any order.

    A source that `data.source` can name overrides `open`, and the other class methods and attributes if the
    defaults do not fit.

    Attributes:
        class_names: names of the classes, by index.
        targets: (images,), int64, class indices.
        can_download: True if `data.download` is supported.
    """

    class_names: tuple[str, ...]
    targets: np.ndarray
    can_download = False

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open a split. Raises UserError if a file is missing or invalid."""
        raise NotImplementedError

    @classmethod
    def requires_root(cls, data: DataConfig) -> bool:
        """Return True if the source needs `data.root`."""
        return True

    @classmethod
    def unsplit_name(cls, data: DataConfig) -> str:
        """Return the name of the split with all images of a data set that has no validation split.

        Raises:
            UserError: the source does not support it, or there is a validation split.
        """
        raise UserError(held_out_option(data), f"is not supported for source {data.source}")

    @classmethod
    def dataset_name(cls, data: DataConfig) -> str:
        """Return the name of the validation set in results."""
        return data.source

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.targets)

    @abstractmethod
    def read(self, index: int) -> EncodedImage:
        """Read an image without decoding it. Raises exceptions of any type if it cannot be read."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded image and its class. Raises UnreadableImageError, and as `read`."""
        return self.read(index).to_pil(), int(self.targets[index])

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return the image's file or another identification, for messages."""

    def name(self, index: int) -> str:
        """Return the image's name in lists of images: its path below the split's folder or in its archive."""
        return self.describe(index)


def split_name(data: DataConfig, split: Split) -> str:
    """Return the data set's name of a split."""
    return data.train_split if split == "train" else data.val_split


def held_out_option(data: DataConfig) -> str:
    """Return the option that holds images out for validation."""
    return "data.val_fraction" if data.val_list is None else "data.val_list"


def refuse_validation_split(data: DataConfig, path: Path) -> UserError:
    """Return the error for a data set with both held-out images and a validation split."""
    reason = f"{path} is a validation split; set {held_out_option(data)} to null to use it"
    return UserError(held_out_option(data), reason)


def validation_path(data: DataConfig) -> str:
    """Return root/<validation split>, without redundant separators."""
    return os.path.normpath(f"{data.root}/{data.val_split}")


def root_folder(data: DataConfig) -> Path:
    """Return `data.root` as a path. Raises UserError if it is not set."""
    if not data.root:
        raise UserError("data.root", f"is needed for source {data.source}: the folder of the data set")
    try:
        return Path(data.root).expanduser()
    except RuntimeError as error:
        raise UserError("data.root", f"{data.root}: {error}") from None


def check_known_classes(folder: Path, names: Collection[str], known: Collection[str]) -> None:
    """Raise UserError if a split has classes that the training split lacks."""
    if unknown := sorted(set(names) - set(known)):
        reason = f"classes that the training split lacks: {shorten_list(unknown)}"
        raise UserError("data.root", f"{folder}: {reason}")


def shorten_list(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names of a list, as `a, b, c and 4 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
