"""Image folders in ImageNet's form: root/train/<class>/..., root/val/<class>/..."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.decoding import MAX_ENCODED_BYTES, Mode, Picture, extensions
from data.image_files import SkippedFiles, find_files, is_metadata
from data.sources.base import Source, Split, listed, root_folder, split_name
from vil.config import ConfigError, DataConfig
from vil.runtime.files import read_bytes


class Folder(Source):
    """The images below a folder with one folder per class, in the order of their sorted paths.

    Args:
        folder: the folder of the class folders.
        class_names: all classes, sorted; a class's index is its place. `folder` may lack some.
        mode: RGB or L (grey).

    Raises:
        ConfigError: `folder` is missing or cannot be listed, has a class that `class_names` lacks, one
            without images, or two that are the same folder.
    """

    def __init__(self, folder: Path, class_names: tuple[str, ...], mode: Mode) -> None:
        present = class_folders(folder)
        unknown = sorted(set(present) - set(class_names))
        if unknown:
            reason = f"class folders that the training split lacks: {listed(unknown)}"
            raise ConfigError("data.root", f"{folder}: {reason}")
        class_to_index = {name: index for index, name in enumerate(class_names)}
        samples = [
            (path, class_to_index[name])
            for name, paths in zip(present, _images_by_class(folder, present))
            for path in paths
        ]
        # Arrays, not lists: reading a list changes the reference counts of its elements, and so copies its
        # memory, page by page, into every forked worker.
        self._paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        self.targets = np.array([target for _, target in samples], dtype=np.int64)
        self.class_names = class_names
        self._folder = folder
        self._mode = mode

    def picture(self, index: int) -> Picture:
        """The image's file, read."""
        return Picture(read_bytes(self.describe(index), MAX_ENCODED_BYTES), self._mode)

    def describe(self, index: int) -> str:
        """The image's path."""
        return os.fsdecode(self._paths[index])

    def name(self, index: int) -> str:
        """The image's path below the split's folder."""
        return os.path.relpath(self.describe(index), self._folder)


def _images_by_class(folder: Path, class_names: Sequence[str]) -> list[list[str]]:
    """List the images below each class folder, see `find_files`, and log how many files were skipped.

    Raises:
        ConfigError: a folder cannot be listed, a class has no images, or two classes are the same folder.
    """
    folders = [folder / name for name in class_names]
    try:
        real = {os.path.realpath(path): path.name for path in folders}
        found = find_files(folders)
    except OSError as error:
        place = error.filename or folder
        raise ConfigError("data.root", f"{place}: cannot be listed: {error.strerror}") from None
    if len(real) < len(folders):
        twice = next(path for path in folders if real[os.path.realpath(path)] != path.name)
        other = real[os.path.realpath(twice)]
        raise ConfigError("data.root", f"{folder}: the classes {twice.name} and {other} are the same folder")
    empty = [name for name, files in zip(class_names, found) if not files.images]
    if empty:
        reason = f"class folders without images ({', '.join(sorted(extensions()))}): {listed(empty)}"
        raise ConfigError("data.root", f"{folder}: {reason}")
    skipped = SkippedFiles(folder)
    for path in (path for files in found for path in files.others):
        skipped.add(os.path.relpath(path, folder))
    skipped.report()
    return [files.images for files in found]


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the class folders, without hidden folders and those of `is_metadata`.

    Raises:
        ConfigError: the folder cannot be listed, or has no class folders.
    """
    try:
        entries = list(os.scandir(folder))
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        missing = isinstance(error, FileNotFoundError)
        reason = "no such folder" if missing else str(getattr(error, "strerror", None) or error)
        with suppress(OSError, ValueError):
            reason += f"; {folder.parent} holds {listed(sorted(os.listdir(folder.parent)), 6) or 'nothing'}"
        raise ConfigError("data.root", f"{folder}: {reason}") from None
    names = sorted(
        entry.name
        for entry in entries
        if os.path.isdir(entry.path) and not entry.name.startswith(".") and not is_metadata(entry.name)
    )
    if not names:
        state = "no class folders in it" if entries else "the folder is empty"
        raise ConfigError("data.root", f"{folder}: {state}; expected {folder.name}/<class>/<images>")
    return tuple(names)


def open_folder(data: DataConfig, split: Split, mode: Mode) -> Source:
    """root/<split>; both splits share the classes of the training split, where there is one."""
    if data.download:
        raise ConfigError("data.download", "folders are not downloaded; timm data sets are, as torch/cifar10")
    root = root_folder(data)
    folder = root / split_name(data, split)
    training = root / data.train_split
    named_by = training if split == "train" or os.path.isdir(training) else folder
    return Folder(folder, class_folders(named_by), mode)
