"""Data sources, one file per kind.

To add a source, write a file with a subclass of `Source` and add one line to `SOURCES`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace

import numpy as np

from data.decoding import Mode
from data.sources.base import Source, Split, root_folder, shorten_list, split_name
from data.sources.class_paths import SPLIT_NAMES
from data.sources.digits import Digits
from data.sources.ffcv import FFCVImages
from data.sources.folder import ImageFolder
from data.sources.held_out import has_held_out_images, open_held_out
from data.sources.subsets import ImageList
from data.sources.tar import TarImages
from data.sources.timm_datasets import StreamedDataset, TimmDataset
from data.sources.webdataset import WebDataset
from data.sources.zip import ZipImages
from vil.config import DataConfig
from vil.errors import UserError
from vil.runtime.class_names import normal_form

__all__ = ["SOURCES", "Source", "Split", "check_root", "dataset_name", "open_source"]

_logger = logging.getLogger("vil.data")

SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "folder": ImageFolder,
    "ffcv": FFCVImages,
    "zip": ZipImages,
    "tar": TarImages,
    "wds": WebDataset,
    "torch/": TimmDataset,
    "hfds/": TimmDataset,
    "hfids/": StreamedDataset,
    "tfds/": StreamedDataset,
    "wds/": StreamedDataset,
}
"""Values of `data.source`, in lower case; names that end in a slash are prefixes."""


def open_source(
    data: DataConfig, split: Split, in_chans: int, stored_split: ImageList | None = None
) -> Source:
    """Open the training or the validation split of the data set that `data` names.

    Images have `in_chans` channels: 3 for RGB, 1 for gray. `stored_split` names the validation images of a
    run that continues, if they are held out of the training split.

    Raises:
        UserError: the source is unknown, its files are missing or invalid, or all training images are of one
            class.
    """
    if in_chans not in (1, 3):
        raise UserError("model.in_chans", f"images have 3 channels (RGB) or 1 (gray), not {in_chans}")
    source_class = _source_class(data)
    if source_class is None:
        known = ", ".join(f"{name}..." if name.endswith("/") else name for name in SOURCES)
        raise UserError("data.source", f"unknown source {data.source!r}; expected one of {known}")
    if data.download and not source_class.can_download:
        known = ", ".join(f"{name}..." for name, known_class in SOURCES.items() if known_class.can_download)
        raise UserError("data.download", f"source {data.source} cannot be downloaded; supported by {known}")
    mode: Mode = "RGB" if in_chans == 3 else "L"
    if has_held_out_images(data):
        source = open_held_out(source_class, data, split, mode, stored_split)
    else:
        source = source_class.open(data, split, mode)
    _check_classes(source, data, split)
    return source


def check_root(data: DataConfig) -> None:
    """Raise UserError if the folder of the data set is not given or does not exist.

    With `data.download` it need not exist. An unknown source is reported when it is opened.
    """
    source_class = _source_class(data)
    if source_class is None or not (data.root or source_class.requires_root(data)):
        return
    if not data.download and not os.path.exists(root_folder(data)):  # False for names that are too long, too
        raise UserError("data.root", f"{data.root}: no such folder")


def dataset_name(data: DataConfig) -> str:
    """Return the name of the validation set in results: digits, the folder, zip:<folder>, ..."""
    source_class = _source_class(data) or Source
    if not has_held_out_images(data):
        return source_class.dataset_name(data)
    share = data.val_list if data.val_fraction is None else f"{100 * data.val_fraction:g} %"
    return f"{source_class.dataset_name(replace(data, val_split='.'))}, held out: {share}"


def _source_class(data: DataConfig) -> type[Source] | None:
    kind, slash, _ = data.source.partition("/")
    return SOURCES.get(kind.lower() + slash)


def _check_classes(source: Source, data: DataConfig, split: Split) -> None:
    """Check that the classes are plausible, and log classes without images.

    A validation split may have one class: a part of a model's classes, which are matched by name. Test splits
    may be published with -1 for unknown labels.
    """
    key = "data.source" if data.root is None else "data.root"
    location = f"{data.source if data.root is None else data.root}, split {split_name(data, split)}"
    names = source.class_names
    if {name.lower() for name in names} <= SPLIT_NAMES:
        reason = f"the classes are named like splits ({shorten_list(names)})"
        raise UserError(key, f"{location}: {reason}; expected <split>/<class>/<images>")
    forms = Counter(map(normal_form, names))
    if duplicate := next((name for name, count in forms.items() if count > 1), None):
        forms_differ = len(set(names)) == len(names)
        how = ", in different forms of Unicode" if forms_differ else ""
        raise UserError(key, f"{location}: two classes are named {duplicate!r}{how}; rename one of them")
    invalid = np.flatnonzero((source.targets < 0) | (source.targets >= len(names)))
    if len(invalid):
        reason = f"{source.describe(int(invalid[0]))} has the class {source.targets[invalid[0]]}"
        raise UserError(key, f"{location}: {reason}, expected 0 to {len(names) - 1}: images without labels?")
    counts = np.bincount(source.targets, minlength=len(names))
    if split == "train" and np.count_nonzero(counts) < 2:
        present = ", ".join(names[index] for index in np.flatnonzero(counts))
        reason = f"all {len(source)} images are of one class, {present}; training needs two classes or more"
        raise UserError(key, f"{location}: {reason}")
    if absent := [names[index] for index in np.flatnonzero(counts == 0)]:
        subject = "1 class has" if len(absent) == 1 else f"{len(absent)} classes have"
        kind = "training" if split == "train" else "validation"
        _logger.warning("%s: %s no %s images: %s", location, subject, kind, shorten_list(absent))
