"""Find the image files of a folder or an archive by their names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
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
    stem, _, extension = name.rpartition(".")  # faster than os.path.splitext
    return f".{extension.lower()}" in image_extensions() and bool(stem.rpartition("/")[2].strip("."))


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

    def add(self, path: str, count: int = 1) -> None:
        """Count a file, or several of which it is the first."""
        self.first = self.first or path
        self.count += count

    def log(self) -> None:
        """Log one line with the count, if any file was skipped."""
        if self.count:
            files = "1 file was" if self.count == 1 else f"{self.count:,} files were"
            reason = "not named like images, or metadata"
            _logger.warning("%s: %s skipped (%s), e.g. %s", self.origin, files, reason, self.first)


class Listing(NamedTuple):
    """The files below the class folders of a folder."""

    images: Iterator[bytes]
    """By class: paths below the folder, sorted by folder, then by name, each followed by a null byte."""
    others: tuple[int, str]
    """Number of the other files, and the path of the first one."""
    mtimes: list[tuple[str, int]]
    """Path and modification time, in ns, of the folder (".") and of every folder below it that is entered."""


class _Files(NamedTuple):
    """Files of one folder."""

    images: bytes
    """Sorted names, each followed by a null byte."""
    others: int
    first_other: str
    """Its path; empty if there is none."""


def find_files(
    root: Path, class_names: Sequence[str], progress: Callable[[int], object] = lambda count: None
) -> Listing:
    """List the files below the class folders `root/<class name>`; links to folders are followed.

    Every folder is entered once, by its real path rather than through a link; class folders and their parent
    are never entered from inside a class. Circular links, or links into another class, therefore neither
    repeat an image nor cause an endless loop.

    Broken links, and folders without images, that are named like images count as images: they are unreadable
    images, see `data.unreadable_images`. Images are in the order of torchvision's ImageFolder. `progress` is
    called with the number of images of each folder.
    """
    base = os.fspath(root)
    mtimes = [(".", os.stat(base).st_mtime_ns)]
    entered = {_identity(os.path.join(base, name)) for name in (*class_names, ".")}
    files_by_class: list[dict[str, _Files]] = [{} for _ in class_names]  # by folder
    links: list[tuple[int, str]] = []

    def walk(index: int, top: str) -> None:
        pending = [top]
        while pending:
            folder = pending.pop()
            images: list[str] = []
            others: list[str] = []
            path = os.path.join(base, folder)
            mtimes.append((folder, os.stat(path).st_mtime_ns))  # before it is listed
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=attrgetter("name")):
                    if entry.name in METADATA_FOLDERS or entry.name.startswith("._"):
                        others.append(entry.name)
                    elif not is_folder(entry):
                        (images if has_image_extension(entry.name) else others).append(entry.name)
                    elif entry.is_symlink():
                        links.append((index, f"{folder}/{entry.name}"))
                    elif (identity := _identity(entry.path)) not in entered:
                        entered.add(identity)
                        pending.append(f"{folder}/{entry.name}")
            first_other = f"{folder}/{others[0]}" if others else ""
            files_by_class[index][folder] = _Files(_as_bytes(images), len(others), first_other)
            progress(len(images))

    for index, name in enumerate(class_names):
        walk(index, name)
    for index, link in links:  # the list grows in the loop
        if (identity := _identity(os.path.join(base, link))) not in entered:
            entered.add(identity)
            walk(index, link)
    others = [files[folder] for files in files_by_class for folder in sorted(files)]
    first_other = next((files.first_other for files in others if files.others), "")
    count = sum(files.others for files in others)
    # One class at a time: the names of all images need some hundred MB.
    images = (_sorted_images(files_by_class.pop(0)) for _ in class_names)
    return Listing(images, (count, first_other), mtimes)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one; False if that is unknown."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or without permission
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _as_bytes(names: Sequence[str]) -> bytes:
    return os.fsencode("".join(f"{name}\0" for name in names))


def _sorted_images(by_folder: dict[str, _Files]) -> bytes:
    images = {folder: files.images for folder, files in by_folder.items()}
    for folder in sorted(images, key=len, reverse=True):  # children before their parents
        parent, name = os.path.split(folder)
        if parent not in images or not has_image_extension(folder):
            continue
        if not any(images[below] for below in images if f"{below}/".startswith(f"{folder}/")):
            names = [*os.fsdecode(images[parent]).split("\0")[:-1], name]
            images[parent] = _as_bytes(sorted(names))
    return b"".join(_with_folder(folder, images[folder]) for folder in sorted(images))


def _with_folder(folder: str, names: bytes) -> bytes:
    prefix = os.fsencode(f"{folder}/")
    return prefix + names[:-1].replace(b"\0", b"\0" + prefix) + b"\0" if names else b""
