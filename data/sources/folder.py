"""Image folders in ImageNet's layout: root/train/<class>/..., root/val/<class>/..."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.decoding import EncodedImage, Mode, image_extensions
from data.image_files import SkippedFiles, find_files, is_metadata
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
from data.sources.class_paths import VALIDATION_NAMES
from vil.config import DataConfig, Tree, UserError, error_reason
from vil.runtime.files import read_bytes
from vil.runtime.images import MAX_ENCODED_BYTES


class ImageFolder(Source):
    """The images below a folder with one folder per class, in the order of their sorted paths.

    The folder may lack some of `class_names`.
    """

    def __init__(self, folder: Path, class_names: tuple[str, ...], mode: Mode) -> None:
        present = class_folders(folder)
        check_known_classes(folder, present, class_names)
        class_to_index = {name: index for index, name in enumerate(class_names)}
        samples = [
            (path, class_to_index[name])
            for name, paths in zip(present, _images_by_class(folder, present))
            for path in paths
        ]
        # Arrays, not lists: reading a list changes the reference counts of its elements, which copies its
        # memory, page by page, into every forked worker.
        self._paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        self.targets = np.array([target for _, target in samples], dtype=np.int64)
        self.class_names = class_names
        self._folder = folder
        self._mode = mode

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open root/<split>, with the classes of the training split if there is one."""
        root = root_folder(data)
        folder, training = root / split_name(data, split), root / data.train_split
        has_training = split == "train" or os.path.isdir(training)
        return cls(folder, class_folders(training if has_training else folder), mode)

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
        return EncodedImage(read_bytes(self.describe(index), MAX_ENCODED_BYTES), self._mode)

    def describe(self, index: int) -> str:
        """Return the image's path."""
        return os.fsdecode(self._paths[index])

    def name(self, index: int) -> str:
        """Return the image's path below the split's folder."""
        return os.path.relpath(self.describe(index), self._folder)


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


def _images_by_class(folder: Path, class_names: Sequence[str]) -> list[list[str]]:
    """List the images below each class folder by `find_files`, and log the number of skipped files."""
    folders = [folder / name for name in class_names]
    try:
        resolved = {os.path.realpath(path): path.name for path in folders}
        files_by_class = find_files(folders)
    except OSError as error:
        path = error.filename or folder
        raise UserError("data.root", f"{path}: cannot be listed: {error.strerror}") from None
    if len(resolved) < len(folders):
        duplicate = next(path for path in folders if resolved[os.path.realpath(path)] != path.name)
        other = resolved[os.path.realpath(duplicate)]
        reason = f"the classes {duplicate.name} and {other} are the same folder"
        raise UserError("data.root", f"{folder}: {reason}")
    if empty := [name for name, files in zip(class_names, files_by_class) if not files.images]:
        extensions = ", ".join(sorted(image_extensions()))
        reason = f"class folders without images ({extensions}): {shorten_list(empty)}"
        raise UserError("data.root", f"{folder}: {reason}")
    skipped = SkippedFiles(folder)
    for path in (path for files in files_by_class for path in files.others):
        skipped.add(os.path.relpath(path, folder))
    skipped.log()
    return [files.images for files in files_by_class]


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
        raise UserError("data.root", f"{folder}: {reason}") from None
    names = sorted(
        entry.name
        for entry in entries
        if os.path.isdir(entry.path) and not entry.name.startswith(".") and not is_metadata(entry.name)
    )
    if not names:
        state = "no class folders in it" if entries else "the folder is empty"
        raise UserError("data.root", f"{folder}: {state}; expected {folder.name}/<class>/<images>")
    return tuple(names)
