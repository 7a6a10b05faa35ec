"""The handwritten digits bundled with scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data.decoding import EncodedImage, Mode
from data.sources.base import Source, Split, split_name
from vil.config import DataConfig
from vil.errors import UserError

SPLIT_SEED = 20210515
"""A constant: the split never depends on the run."""
SIDE = 32


class Digits(Source):
    """1,797 handwritten digits (8×8, 17 gray levels) as 32×32 images.

    The split is fixed and stratified: 1,437 for training and 360 for validation.

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
        enlarged = [Image.fromarray(level).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for level in levels]
        self._images = np.stack([np.asarray(image) for image in enlarged])  # (N, 32, 32)

    @classmethod
    def requires_root(cls, data: DataConfig) -> bool:
        """See `Source.requires_root`."""
        return False

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open a split; `data.val_split train` evaluates on the training images."""
        if data.root is not None:
            raise UserError("data.root", "the digits are bundled; did you mean --data.source folder?")
        name = split_name(data, split)
        if name not in ("train", "val"):
            raise UserError(f"data.{split}_split", f"the digits have the splits train and val, not {name!r}")
        return cls(name, mode)

    def read(self, index: int) -> EncodedImage:
        """Return the digit, white on black."""
        return EncodedImage(Image.fromarray(self._images[index]), self._mode)

    def describe(self, index: int) -> str:
        """Return the index among scikit-learn's 1,797 digits."""
        return f"digit {self._indices[index]}"


def split_indices(targets: np.ndarray) -> dict[str, np.ndarray]:
    """Return the indices of the splits: every fifth image of a shuffled class is held out."""
    drawn = np.random.default_rng(SPLIT_SEED).random(len(targets))
    by_class = np.lexsort((drawn, targets))  # sorted by class, shuffled within each
    is_held_out = np.zeros(len(targets), dtype=bool)
    is_held_out[by_class[::5]] = True
    return {"train": np.flatnonzero(~is_held_out), "val": np.flatnonzero(is_held_out)}
