"""Image folders in ImageNet's layout: root/train/<class>/..., root/val/<class>/..."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.decoding import EncodedImage, Mode, image_extensions
from data.image_files import SkippedFiles, find_files, is_folder, is_metadata
from data.index import OFF, Index, NameWriter, Progress, is_inside, open_index
from data.sources.base import (
    Source,
    Split,
    check_known_classes,
    refuse_validation_split,
    root_folder,
    shorten_list,
    split_name,
    validation_path,
)
from data.sources.class_paths import SPLIT_NAMES, VALIDATION_NAMES
from vil.config import DataConfig, Tree
from vil.errors import UserError, error_reason
from vil.runtime.files import read_bytes
from vil.runtime.images import MAX_ENCODED_BYTES


class ImageFolder(Source):
    """The images below a folder with one folder per class, in the order of their sorted paths.

    The folder may lack some of `class_names`.
    """

    def __init__(
        self, folder: Path, class_names: tuple[str, ...], mode: Mode, index: str | None = OFF
    ) -> None:
        present = class_folders(folder)
        check_known_classes(folder, present, class_names)
        self._index = open_index(
            index,
            folder,
            ["folder"],
            lambda progress: _list_images(folder, present, progress),
            classes=present,
        )
        count, example = self._index.skipped
        SkippedFiles(folder, example, count).log()
        self.targets = self._index.targets
        if self._index.classes != class_names:
            class_to_index = {name: index for index, name in enumerate(class_names)}
            self.targets = np.array([class_to_index[name] for name in self._index.classes])[self.targets]
        self.class_names = class_names
        self._folder = folder
        self._mode = mode

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open root/<split>, with the classes of the training split if there is one."""
        root = root_folder(data)
        folder, training = root / split_name(data, split), root / data.train_split
        has_training = split == "train" or os.path.isdir(training)
        return cls(folder, class_folders(training if has_training else folder), mode, data.index)

    @classmethod
    def unsplit_name(cls, data: DataConfig) -> str:
        """Return the training split if it exists, else `.` for root/<class>/..."""
        root = root_folder(data)
        has_training = os.path.isdir(root / data.train_split)
        for name in (data.val_split, *(VALIDATION_NAMES if has_training else ())):
            if os.path.isdir(root / name) and name not in (data.train_split, "."):
                raise refuse_validation_split(data, root / name)
        return data.train_split if has_training else "."

    @classmethod
    def dataset_name(cls, data: DataConfig) -> str:
        """Return the validation folder."""
        return validation_path(data)

    def read(self, index: int) -> EncodedImage:
        """Read the image's file."""
        if not is_inside(self._index.name(index)):
            raise OSError("its path in the index leads out of the data set")
        return EncodedImage(read_bytes(self.describe(index), MAX_ENCODED_BYTES), self._mode)

    def describe(self, index: int) -> str:
        """Return the image's path."""
        return os.fspath(self._folder / self.name(index))

    def name(self, index: int) -> str:
        """Return the image's path below the split's folder."""
        return os.fsdecode(self._index.name(index))


def class_folder_options(folder: str) -> Tree:
    """Return the options that evaluate on a folder of class folders.

    It is its own training split, or else a class named train would be used as the split.
    """
    splits = {
        "data.train_split": ".",
        "data.val_split": ".",
        "data.val_fraction": None,
        "data.val_list": None,
    }
    return {"data.source": "folder", "data.root": folder, **splits}


def _list_images(folder: Path, class_names: tuple[str, ...], progress: Progress) -> Index:
    """List the images below each class folder by `find_files`."""
    folders = [folder / name for name in class_names]
    try:
        resolved = {os.path.realpath(path): path.name for path in folders}
        images, others, mtimes = find_files(folder, class_names, progress)
    except OSError as error:
        path = error.filename or folder
        raise UserError("data.root", f"{path}: cannot be listed: {error.strerror}") from None
    if len(resolved) < len(folders):
        duplicate = next(path for path in folders if resolved[os.path.realpath(path)] != path.name)
        other = resolved[os.path.realpath(duplicate)]
        reason = f"the classes {duplicate.name} and {other} are the same folder"
        raise UserError("data.root", f"{folder}: {reason}")
    names = NameWriter()
    counts = [names.add(class_images) for class_images in images]
    if empty := [name for name, count in zip(class_names, counts) if not count]:
        extensions = ", ".join(sorted(image_extensions()))
        reason = f"class folders without images ({extensions}): {shorten_list(empty)}"
        raise UserError("data.root", f"{folder}: {reason}")
    arrays = {**names.arrays(), "targets": np.repeat(np.arange(len(counts)), counts)}
    return Index(arrays, class_names, [(path, -1, mtime) for path, mtime in mtimes], others)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders, without hidden folders and those of `is_metadata`."""
    try:
        entries = list(os.scandir(folder))
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        is_missing = isinstance(error, FileNotFoundError)
        reason = "no such folder" if is_missing else error_reason(error)
        with suppress(OSError, ValueError):
            siblings = shorten_list(sorted(os.listdir(folder.parent)), 6)
            reason += f"; {folder.parent} contains {siblings or 'nothing'}"
        if is_missing and folder.name in SPLIT_NAMES and folder.parent.is_dir():
            reason += "; without a validation split, data.val_fraction 0.2 holds out a fifth of each class"
        raise UserError("data.root", f"{folder}: {reason}") from None
    names = sorted(
        entry.name
        for entry in entries
        if is_folder(entry) and not entry.name.startswith(".") and not is_metadata(entry.name)
    )
    if not names:
        state = "no class folders in it" if entries else "the folder is empty"
        raise UserError("data.root", f"{folder}: {state}; expected {folder.name}/<class>/<images>")
    return tuple(names)
