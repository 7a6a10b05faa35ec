"""Image folders in ImageNet's form: root/train/<class>/..., root/val/<class>/..."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.decoding import MAX_ENCODED_BYTES, Mode, Picture
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
        ConfigError: `folder` is missing, has a class that `class_names` lacks, or one without images.
    """

    def __init__(self, folder: Path, class_names: tuple[str, ...], mode: Mode) -> None:
        present = class_folders(folder)
        unknown = sorted(set(present) - set(class_names))
        if unknown:
            reason = f"class folders that the training split lacks: {listed(unknown)}"
            raise ConfigError("data.root", f"{folder}: {reason}")
        class_to_index = {name: index for index, name in enumerate(class_names)}
        samples = [(path, class_to_index[name]) for name in present for path in image_files(folder / name)]
        # Arrays, not lists: reading a list changes the reference counts of its elements, and so copies its
        # memory, page by page, into every forked worker.
        self._paths = np.array([os.fsencode(path) for path, _ in samples], dtype=np.bytes_)
        self.targets = np.array([target for _, target in samples], dtype=np.int64)
        empty = sorted(set(present) - {class_names[index] for index in np.unique(self.targets)})
        if empty:
            reason = f"class folders without images ({', '.join(IMG_EXTENSIONS)}): {listed(empty)}"
            raise ConfigError("data.root", f"{folder}: {reason}")
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


def image_files(folder: Path) -> list[str]:
    """The paths of all images below a folder, in the order in which torchvision's ImageFolder finds them.

    Broken links are among them, and also folders without images that are named like an image: what was meant
    to be an image and cannot be read is the business of `data.on_error`, not passed over here.
    """
    found: list[str] = []
    for parent, folders, files in sorted(os.walk(folder, followlinks=True)):
        meant = [name for name in folders if _named_like_image(name) and not image_files(Path(parent, name))]
        found += [os.path.join(parent, name) for name in sorted([*filter(_named_like_image, files), *meant])]
    return found


def _named_like_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def class_folders(folder: Path) -> tuple[str, ...]:
    """The sorted names of the class folders, but hidden ones. Raises ConfigError where there are none."""
    try:
        entries = list(os.scandir(folder))
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        missing = isinstance(error, FileNotFoundError)
        reason = "no such folder" if missing else str(getattr(error, "strerror", None) or error)
        with suppress(OSError, ValueError):
            reason += f"; {folder.parent} holds {listed(sorted(os.listdir(folder.parent)), 6) or 'nothing'}"
        raise ConfigError("data.root", f"{folder}: {reason}") from None
    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
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
