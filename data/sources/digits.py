"""The handwritten digits that scikit-learn carries: real images with nothing to download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data.decoding import Mode, Picture
from data.sources.base import Source, Split, split_name
from vil.config import ConfigError, DataConfig

SPLIT_SEED = 20210515  # a constant: which digits are held out never depends on the run
SIZE = 32


class Digits(Source):
    """1,797 handwritten digits (8×8, 17 grey levels) as 32×32 images.

    The split is fixed: 1,437 for training and 360 for validation, each with its share of every class.

    Args:
        split: `train` or `val`.
        mode: RGB or L (grey).

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
    """

    class_names = tuple("0123456789")

    def __init__(self, split: str, mode: Mode) -> None:
        from sklearn.datasets import load_digits  # takes a second, and only this source needs it

        digits = load_digits()
        self._indices = split_indices(digits.target)[split]
        self.targets = digits.target[self._indices].astype(np.int64)
        self._mode = mode
        levels = np.rint(digits.images[self._indices] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
        enlarged = [Image.fromarray(level).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for level in levels]
        self._images = np.stack([np.asarray(image) for image in enlarged])  # (N, 32, 32)

    def picture(self, index: int) -> Picture:
        """The digit, white on black."""
        return Picture(Image.fromarray(self._images[index]), self._mode)

    def describe(self, index: int) -> str:
        """Its place among scikit-learn's 1,797."""
        return f"digit {self._indices[index]}"


def split_indices(targets: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the two splits: every fifth image of each class, in a fixed shuffled order, is held out.

    Args:
        targets: (images,), the class of each.
    """
    shuffled = np.random.default_rng(SPLIT_SEED).random(len(targets))
    by_class = np.lexsort((shuffled, targets))  # sorted by class, shuffled within each
    held_out = np.zeros(len(targets), dtype=bool)
    held_out[by_class[::5]] = True
    return {"train": np.flatnonzero(~held_out), "val": np.flatnonzero(held_out)}


def open_digits(data: DataConfig, split: Split, mode: Mode) -> Source:
    """The bundled digits; `data.val_split train` evaluates on the training images."""
    if data.root is not None:
        raise ConfigError(
            "data.root", "the digits are bundled and read no folder; did you mean --data.source folder?"
        )
    if data.download:
        raise ConfigError("data.download", "the digits are bundled; there is nothing to download")
    name = split_name(data, split)
    if name not in ("train", "val"):
        raise ConfigError(f"data.{split}_split", f"the digits have the splits train and val, not {name!r}")
    return Digits(name, mode)
