"""ReaL: ImageNet's validation images with reassessed labels, several for one image or none.

Source: Beyer et al., Are we done with ImageNet?, https://arxiv.org/abs/2006.07159; its file real.json is a
list with the class numbers of ILSVRC2012_val_00000001.JPEG, of ..2.JPEG, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from data.loaders import EvaluationImages, Unreadable
from data.sources import Source
from vil.config import ConfigError
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


class ForeignImagesError(ConfigError):
    """The images are not ImageNet's validation images."""


class RelabelledImages(EvaluationImages):
    """Evaluation images whose target is (1 + K,): the class, then the ReaL labels, filled up with -1.

    Args:
        images: the images.
        path: real.json.

    Raises:
        ConfigError: the file is not such a list, or (ForeignImagesError) does not belong to these images.
    """

    def __init__(self, images: EvaluationImages, path: str) -> None:
        super().__init__(images.source, images.transform, images.normalised)
        labels = read_real_labels(path)
        places = _class_places(images.source)
        kept = [[places[number] for number in numbers if places[number] >= 0] for numbers in labels]
        self._width = max(map(len, kept), default=0)  # K
        # Flat: a table would have the width of its longest row everywhere.
        self._labels = torch.tensor([target for row in kept for target in row], dtype=torch.int64)
        self._ends = torch.tensor([len(row) for row in kept], dtype=torch.int64).cumsum(0)
        image_number(images.source, 0, len(labels))  # of many, the first is asked; each is when it is loaded

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | Unreadable:  # type: ignore[override]
        sample = super().__getitem__(index)
        if isinstance(sample, Unreadable):
            return sample
        image, target = sample
        number = image_number(self.source, index, len(self._ends)) - 1
        start = self._ends[number - 1] if number else 0
        row = self._labels[start : self._ends[number]]
        filler = torch.full((self._width - len(row),), -1)
        return image, torch.cat([torch.tensor([target]), row, filler])


def read_real_labels(path: str) -> list[list[int]]:
    """Return the class numbers of every image, each once.

    Raises:
        ConfigError: the file is no list of such lists, or larger than `MAX_JSON_BYTES`.
    """
    try:
        content = parse_json(read_text(Path(path).expanduser(), MAX_JSON_BYTES))
    except ValueError as error:
        raise ConfigError("data.real_labels", f"{path} is not JSON: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("data.real_labels", f"{path}: {reason}") from None
    rows: list[Any] = content if isinstance(content, list) else [None]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or not all(type(c) is int and 0 <= c < 1000 for c in row):
            reason = f"expected a list with a list of classes 0 to 999 for each image, not so for {number}"
            raise ConfigError("data.real_labels", f"{path}: {reason}")
    return [list(dict.fromkeys(row)) for row in rows]


def image_number(source: Source, index: int, most: int) -> int:
    """The number in the name of a validation image. Raises ForeignImagesError where there is none."""
    name = source.describe(index)
    found = _NUMBER.search(name)
    if found is None or not 1 <= int(found[1]) <= most:
        reason = f"{name} is none of the {most} images with such labels, ILSVRC2012_val_00000001.JPEG, ..."
        raise ForeignImagesError("data.real_labels", reason)
    return int(found[1])


def _class_places(source: Source) -> Sequence[int]:
    """For each number of a class of ImageNet its target in `source`, -1 where it has no such class."""
    names = tuple(ImageNetInfo().label_names())
    if set(source.class_names) <= set(names):
        places = {name: place for place, name in enumerate(source.class_names)}
        return [places.get(name, -1) for name in names]
    if len(source.class_names) != len(names):
        reason = f"the classes must be named by WordNet ids, not {source.class_names[0]!r}"
        raise ForeignImagesError("data.real_labels", reason)
    numbers = [str(number) for number in range(len(names))]
    if set(source.class_names) == set(numbers):  # folders, which are sorted as text: 0, 1, 10, 100, ...
        places = {name: place for place, name in enumerate(source.class_names)}
        return [places[number] for number in numbers]
    return range(len(names))  # by their names in words, in the same order, as torch/imagenet has them
