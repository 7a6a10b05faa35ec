"""Hold out training images for validation, for data sets without a validation split.

The images are a fraction of each class (`data.val_fraction`) or those of a list (`data.val_list`). Which ones
are held out is a function of `data.val_seed`, of the class and of the images' names alone: it depends neither
on the run nor on the machine, and a larger fraction includes the images of a smaller one.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data.decoding import Mode
from data.sources.base import Source, Split, held_out_option, shorten_list
from data.sources.class_paths import SPLIT_NAMES
from data.sources.subsets import ImageList, Subset, image_names, unwrap_subset
from vil.config import DataConfig
from vil.errors import UserError
from vil.runtime.class_names import normal_form
from vil.runtime.files import write_durably
from vil.runtime.run_files import SPLIT


def has_held_out_images(data: DataConfig) -> bool:
    """Return True if validation images are taken from the training split."""
    return data.val_fraction is not None or data.val_list is not None


def open_held_out(
    source_class: type[Source], data: DataConfig, split: Split, mode: Mode, stored: ImageList | None
) -> Source:
    """Open the images of a data set without a validation split, and return one side of its division.

    Args:
        source_class: class of the source.
        data: the data set.
        split: the side.
        mode: RGB or L (gray).
        stored: validation images of the run that continues; None divides the images.

    Raises:
        UserError: the source supports no division, the data set has a validation split, the list or the data
            set cannot be used, a class has one image only, or one side would be empty.
    """
    if data.val_fraction is not None and data.val_list is not None:
        raise UserError("data.val_list", "cannot be combined with data.val_fraction")
    name = source_class.unsplit_name(data)
    source = source_class.open(replace(data, train_split=name, val_split=name), "train", mode)
    if splits := [name for name in source.class_names if name.lower() in SPLIT_NAMES]:
        reason = f"folders named like splits beside the classes: {shorten_list(splits)}; expected "
        raise UserError("data.root", f"{data.root}: {reason}{data.train_split}/<class>/<images>")
    if stored is None and data.val_list is not None:
        stored = ImageList.read(data.val_list, "data.val_list")
    held_out = draw_validation_images(source, data) if stored is None else stored.find(source)
    if split == "val":
        return Subset(source, held_out)
    is_kept = np.ones(len(source), dtype=bool)
    is_kept[held_out] = False
    if not is_kept.any():
        assert stored is not None
        raise UserError(stored.option, f"{stored.path}: names all images; none are left for training")
    return Subset(source, np.flatnonzero(is_kept))


def draw_validation_images(source: Source, data: DataConfig) -> np.ndarray:
    """Return the indices of the images that `data.val_fraction` holds out, rising: at least one per class.

    Raises:
        UserError: a class has one image only.
    """
    assert data.val_fraction is not None
    names = image_names(source)
    if len(set(names)) < len(names):
        raise UserError("data.val_fraction", "several images have the same name and class")
    sizes = np.bincount(source.targets)
    if single := [source.class_names[index] for index in np.flatnonzero(sizes == 1)]:
        reason = f"a class needs two images or more, one for each split; one image: {shorten_list(single)}"
        raise UserError("data.val_fraction", reason)
    by_class: list[list[tuple[bytes, int]]] = [[] for _ in sizes]
    for index, (name, target) in enumerate(zip(names, source.targets.tolist())):
        text = f"{data.val_seed}\0{source.class_names[target]}\0{name}"
        key = normal_form(text).encode(errors="surrogateescape")  # the same on every machine
        by_class[target].append((blake2b(key, digest_size=8).digest(), index))
    held_out: list[int] = []
    for ranked, size in zip(by_class, sizes.tolist()):
        count = min(max(1, int(data.val_fraction * size + 0.5)), size - 1)
        held_out += [index for _, index in sorted(ranked)[: max(0, count)]]
    return np.array(sorted(held_out), dtype=np.int64)


def read_split(folder: Path, data: DataConfig) -> ImageList | None:
    """Return the held-out images of the run in a folder; None if it has not recorded any.

    Raises:
        UserError: split.txt cannot be read.
    """
    path = folder / SPLIT
    return ImageList.read(str(path), held_out_option(data)) if path.exists() else None


def write_split(folder: Path, validation: Source, data: DataConfig) -> None:
    """Write the names of the held-out images to split.txt in a run's folder, one per line.

    The file is one that `data.val_list` reads.

    Raises:
        UserError: a name contains a line break, or the file cannot be written.
    """
    source, indices = unwrap_subset(validation)
    all_names = image_names(source)
    names = [all_names[index] for index in indices]
    if broken := [name for name in names if "\n" in name or name != name.strip()]:
        reason = f"the name {broken[0]!r} cannot be written to a list of images"
        raise UserError(held_out_option(data), reason)
    try:
        content = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")
        write_durably(folder / SPLIT, content)
    except OSError as error:
        raise UserError("output", f"{folder / SPLIT} cannot be written: {error.strerror}") from None
