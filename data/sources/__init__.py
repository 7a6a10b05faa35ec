"""Where images come from: one file per kind of data set, found by its name.

To add a source, write a file with a function (data, split, mode) -> Source and add a line to `SOURCES`.
"""

from __future__ import annotations

import logging

import numpy as np

from data.sources.base import Mode, Opener, Source, Split, listed, split_name
from data.sources.beton import open_beton
from data.sources.class_paths import SPLIT_NAMES
from data.sources.digits import open_digits
from data.sources.folder import open_folder
from data.sources.tarred import open_shards, open_tar
from data.sources.timm_datasets import open_timm, refuse_stream
from data.sources.zipped import open_zip
from vil.config import ConfigError, DataConfig

__all__ = ["SOURCES", "Source", "Split", "open_source"]

_logger = logging.getLogger("vil.data")  # a child of vil, whose records are shown

SOURCES: dict[str, Opener] = {
    "digits": open_digits,
    "folder": open_folder,
    "ffcv": open_beton,
    "zip": open_zip,
    "tar": open_tar,
    "wds": open_shards,
    "torch/": open_timm,
    "hfds/": open_timm,
    "hfids/": refuse_stream,
    "tfds/": refuse_stream,
    "wds/": refuse_stream,
}
"""What `data.source` may be; a name that ends in a slash is the beginning of one."""


def open_source(data: DataConfig, split: Split, in_chans: int) -> Source:
    """Open the training or the validation split of the data set that `data` names.

    Args:
        data: the data set.
        split: which of the two; `data.train_split` and `data.val_split` are their names.
        in_chans: 3 for RGB images, 1 for grey ones.

    Raises:
        ConfigError: the source is unknown, its files are missing or not what it expects, or all training
            images are of one class.
    """
    if in_chans not in (1, 3):
        raise ConfigError("model.in_chans", f"images have 3 channels (RGB) or 1 (grey), not {in_chans}")
    mode: Mode = "RGB" if in_chans == 3 else "L"
    kind, slash, _ = data.source.partition("/")
    opener = SOURCES.get(kind.lower() + slash)
    if opener is None:
        known = ", ".join(f"{name}..." if name.endswith("/") else name for name in SOURCES)
        raise ConfigError("data.source", f"unknown source {data.source!r}; known are {known}")
    source = opener(data, split, mode)
    _check_classes(source, data, split)
    return source


def _check_classes(source: Source, data: DataConfig, split: Split) -> None:
    """Refuse a split whose classes cannot be what was meant, and log classes without training images.

    A validation split may hold one class alone: a part of the classes of a model, which are found by name.

    Raises:
        ConfigError: all training images are of one class, the classes are named like splits, or an image has
            none of them, as in test splits that are published with -1 in place of labels.
    """
    key = "data.source" if data.root is None else "data.root"
    place = f"{data.source if data.root is None else data.root}, split {split_name(data, split)}"
    names = source.class_names
    if {name.lower() for name in names} <= SPLIT_NAMES:
        reason = f"the classes are named like splits ({listed(names)}); expected <split>/<class>/<images>"
        raise ConfigError(key, f"{place}: {reason}")
    outside = np.flatnonzero((source.targets < 0) | (source.targets >= len(names)))
    if len(outside):
        reason = f"{source.describe(int(outside[0]))} has the class {source.targets[outside[0]]}"
        raise ConfigError(key, f"{place}: {reason}, expected 0 to {len(names) - 1}: images without labels?")
    if split != "train":
        return
    counts = np.bincount(source.targets, minlength=len(names))
    if np.count_nonzero(counts) < 2:
        only = ", ".join(names[index] for index in np.flatnonzero(counts))
        reason = f"all {len(source)} images are of one class, {only}; training needs two classes or more"
        raise ConfigError(key, f"{place}: {reason}")
    if absent := [names[index] for index in np.flatnonzero(counts == 0)]:
        count = "1 class has" if len(absent) == 1 else f"{len(absent)} classes have"
        _logger.warning("%s: %s no training images: %s", place, count, listed(absent))
