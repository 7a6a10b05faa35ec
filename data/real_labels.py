"""ReaL: reassessed labels of ImageNet's validation images, any number of them per image.

Source: Beyer et al., Are we done with ImageNet?, https://arxiv.org/abs/2006.07159; its file real.json is a
list with the class indices of ILSVRC2012_val_00000001.JPEG, ..2.JPEG, and so on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.loaders import EvaluationImages, Sample
from data.sources import Source
from vil.errors import UserError, error_reason
from vil.runtime import consistency
from vil.runtime.class_names import imagenet_classes
from vil.runtime.distributed import Process
from vil.runtime.files import MAX_JSON_BYTES, parse_json, read_text

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\b")


class NotImageNetError(UserError):
    """The images are not ImageNet's validation images."""


class RealLabelImages(EvaluationImages):
    """Evaluation images whose target is (1 + K,): the class, then the ReaL labels, padded with -1.

    Raises:
        UserError: real.json at `path` is invalid.
        NotImageNetError: the images are not those of the file.
    """

    def __init__(self, images: EvaluationImages, path: str) -> None:
        super().__init__(images.source, images.transform)
        labels = read_real_labels(path)
        targets = _imagenet_targets(images.source)
        kept = [[targets[number] for number in numbers if targets[number] >= 0] for numbers in labels]
        self._width = max(map(len, kept), default=0)  # K
        # Flat, as one long row would widen a table.
        self._labels = torch.tensor([target for row in kept for target in row], dtype=torch.int64)
        self._ends = torch.tensor([len(row) for row in kept], dtype=torch.int64).cumsum(0)
        image_number(images.source, 0, len(labels))  # the others are checked when they are loaded

    def __getitem__(self, index: int) -> Sample[tuple[Tensor, int | Tensor]]:
        sample = super().__getitem__(index)
        if sample.content is None:
            return sample
        image, target = sample.content
        number = image_number(self.source, index, len(self._ends)) - 1
        start = self._ends[number - 1] if number else 0
        row = self._labels[start : self._ends[number]]
        filler = torch.full((self._width - len(row),), -1)
        return Sample((image, torch.cat([torch.tensor([target]), row, filler])))


def read_real_labels(path: str) -> list[list[int]]:
    """Return the class indices of every image, without duplicates, from a JSON list of lists."""
    try:
        content = parse_json(read_text(Path(path).expanduser(), MAX_JSON_BYTES))
    except ValueError as error:
        raise UserError("data.real_labels", f"{path} is not JSON: {error}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise UserError("data.real_labels", f"{path}: {error_reason(error)}") from None
    rows: list[list[int]] = content if isinstance(content, list) else [[-1]]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or not all(type(c) is int and 0 <= c < 1000 for c in row):
            reason = f"expected a list of classes from 0 to 999 for each image, which entry {number} is not"
            raise UserError("data.real_labels", f"{path}: {reason}")
    return [list(dict.fromkeys(row)) for row in rows]


def check_same_real_labels(path: str | None, process: Process) -> None:
    """Raise UserError on every rank if the labels of a machine are not those of rank 0."""

    def describe() -> dict[str, str]:
        if path is None or process.local_rank > 0:
            return {}
        return {"ReaL labels": hashlib.sha256(str(read_real_labels(path)).encode()).hexdigest()}

    consistency.check_data("data.real_labels", describe)


def image_number(source: Source, index: int, count: int) -> int:
    """Return the number in the name of a validation image. Raises NotImageNetError unless 1 to `count`."""
    name = source.describe(index)
    match = _NUMBER.search(name)
    if match is None or not 1 <= int(match[1]) <= count:
        reason = f"{name} is none of the {count} images with such labels, ILSVRC2012_val_00000001.JPEG, ..."
        raise NotImageNetError("data.real_labels", reason)
    return int(match[1])


def _imagenet_targets(source: Source) -> Sequence[int]:
    """Return the target in `source` of each class of ImageNet, -1 for a missing class."""
    names = imagenet_classes()
    targets = {name: target for target, name in enumerate(source.class_names)}
    if set(targets) <= set(names):
        return [targets.get(name, -1) for name in names]
    if len(source.class_names) != len(names):
        reason = f"the classes must be named by WordNet ids, not {source.class_names[0]!r}"
        raise NotImageNetError("data.real_labels", reason)
    # Folders of numbers are sorted as text: 0, 1, 10, 100, ... Names in words are in ImageNet's order.
    return [targets.get(str(number), number) for number in range(len(names))]
