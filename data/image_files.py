"""Find the image files of a folder or an archive by their names."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from data.decoding import image_extensions

_logger = logging.getLogger("vil.data")

METADATA_FOLDERS = frozenset(
    {"__MACOSX", ".AppleDouble", "@eaDir", ".@__thumb", ".ipynb_checkpoints", "lost+found"}
)
"""Folders of macOS, network storage and others with metadata and previews that are named like images."""


def has_image_extension(name: str) -> bool:
    """Return True if a file name has the extension of a supported format, in any case."""
    return os.path.splitext(name)[1].lower() in image_extensions()


def is_metadata(path: str) -> bool:
    """Return True for the path of metadata of macOS or network storage: `._x.jpg`, `__MACOSX/x.jpg`, …"""
    parts = path.split("/")
    return parts[-1].startswith("._") or not METADATA_FOLDERS.isdisjoint(parts)


@dataclass
class SkippedFiles:
    """Count the files of a folder or archive that are skipped because they are not named like images."""

    origin: Path
    first: str = ""
    count: int = 0

    def add(self, path: str) -> None:
        """Count a file."""
        self.first = self.first or path
        self.count += 1

    def log(self) -> None:
        """Log one line with the count, if any file was skipped."""
        if self.count:
            files = "1 file was" if self.count == 1 else f"{self.count:,} files were"
            reason = "not named like images, or metadata"
            _logger.warning("%s: %s skipped (%s), e.g. %s", self.origin, files, reason, self.first)


class FolderFiles(NamedTuple):
    """Files and folders below one class folder."""

    images: list[str]
    """Paths, sorted by folder, then by name."""
    others: list[str]
    """Paths of the other files."""


def find_files(class_folders: Sequence[Path]) -> list[FolderFiles]:
    """List the files below each class folder; links to folders are followed.

    Every folder is entered once, by its real path rather than through a link; class folders and their parent
    are never entered from inside a class. Circular links, or links into another class, therefore neither
    repeat an image nor cause an endless loop.

    Broken links, and folders without images, that are named like images count as images: they are unreadable
    images, see `data.unreadable_images`.

    Returns:
        One entry per class folder, with the images in the order of torchvision's ImageFolder.
    """
    entered = {_identity(path) for folder in class_folders for path in (folder, folder.parent)}
    files_by_class: list[dict[str, tuple[list[str], list[str]]]] = [{} for _ in class_folders]  # by folder
    links: list[tuple[int, str]] = []

    def walk(index: int, top: str) -> None:
        pending = [top]
        while pending:
            folder = pending.pop()
            images, others = files_by_class[index].setdefault(folder, ([], []))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=attrgetter("name")):
                    if is_metadata(entry.name):
                        others.append(entry.path)
                    elif not _is_folder(entry):
                        (images if has_image_extension(entry.name) else others).append(entry.path)
                    elif entry.is_symlink():
                        links.append((index, entry.path))
                    elif (identity := _identity(entry.path)) not in entered:
                        entered.add(identity)
                        pending.append(entry.path)

    for index, folder in enumerate(class_folders):
        walk(index, os.fspath(folder))
    for index, link in links:  # the list grows in the loop
        if (identity := _identity(link)) not in entered:
            entered.add(identity)
            walk(index, link)
    return [_sorted_files(folders) for folders in files_by_class]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or without permission
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _sorted_files(by_folder: dict[str, tuple[list[str], list[str]]]) -> FolderFiles:
    images = {folder: files for folder, (files, _) in by_folder.items()}
    for folder in sorted(images, key=len, reverse=True):  # children before their parents
        parent = os.path.dirname(folder)
        if parent not in images or not has_image_extension(folder):
            continue
        if not any(images[below] for below in images if f"{below}/".startswith(f"{folder}/")):
            images[parent].append(folder)
    return FolderFiles(
        [path for folder in sorted(images) for path in sorted(images[folder], key=os.path.basename)],
        [path for folder in sorted(by_folder) for path in by_folder[folder][1]],
    )
