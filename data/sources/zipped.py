"""Zip archives with a map, as the paper's code read ImageNet: root/train.zip and root/train_map.txt.

A line of the map is `archive@/path/in/zip<TAB>index`: the archive below the root, the image, its class.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from data.decoding import Mode
from data.sources.archive import (
    ZIP_DEFLATED,
    ZIP_STORED,
    ArchivedImages,
    Member,
    check_file,
    one_line,
    safe_name,
)
from data.sources.base import Source, Split, root_folder, split_name
from data.sources.class_paths import class_depth, parent_folders
from vil.config import ConfigError, DataConfig
from vil.runtime.files import read_text

_CLASS = re.compile("[0-9]{1,6}")
_KINDS = {zipfile.ZIP_STORED: ZIP_STORED, zipfile.ZIP_DEFLATED: ZIP_DEFLATED}
_ENCRYPTED, _UTF8 = 1, 1 << 11  # bits of a file's flags (APPNOTE 4.4.4)


class Entry(NamedTuple):
    """One line of a map."""

    line: int
    archive: str
    name: str
    target: int


def read_map(path: Path) -> list[Entry]:
    """Read the lines of a map, in UTF-8 with or without a byte order mark; empty ones are passed over.

    Raises:
        ConfigError: the file cannot be read, has no image, or a line that is none or leads out of the root.
    """
    try:
        lines = read_text(path).split("\n")  # names may hold other line ends of Unicode
    except (OSError, ValueError) as error:
        raise ConfigError("data.root", f"{path}: {one_line(error)}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place, tab, label = line.rpartition("\t")
        archive, at, inside = place.partition("@")
        name = safe_name(inside)
        if not (tab and at and archive and inside):
            reason = f"expected archive@/path/in/zip<TAB>index, got {line[:80]!r}"
        elif not _CLASS.fullmatch(label.strip()):
            reason = f"the class is no number below 1,000,000: {label[:80]!r}"
        elif name is None or os.path.isabs(archive) or safe_name(archive) is None:
            reason = f"leads outside of the folder or the archive: {place[:80]!r}"
        else:
            entries.append(Entry(number, archive, name, int(label)))
            continue
        raise ConfigError("data.root", f"{path}, line {number}: {reason}")
    if not entries:
        raise ConfigError("data.root", f"{path}: names no image")
    return entries


def class_folders(entries: Sequence[Entry], known: Collection[str] | None = None) -> list[str | None]:
    """Find the class folder of each image, see `class_depth`; None for images beside the class folders."""
    folders = [parent_folders(entry.name) for entry in entries]
    distinct = set(folders) - {()}
    depth = class_depth(distinct, known) if distinct else 0
    return [parts[depth] if len(parts) > depth else None for parts in folders]


def numbers_by_folder(entries: Sequence[Entry], folders: Sequence[str | None]) -> dict[str, set[int]]:
    """Collect the numbers of the classes of the images in each class folder."""
    numbers: dict[str, set[int]] = {}
    for entry, folder in zip(entries, folders):
        if folder is not None:
            numbers.setdefault(folder, set()).add(entry.target)
    return numbers


def class_names(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Return the folders of the classes where each has one of its own, else the numbers of the classes."""
    folders: dict[int, set[str]] = {}
    for entry, folder in zip(entries, class_folders(entries)):
        folders.setdefault(entry.target, set()).add(folder or "")
    numbers = range(max(folders) + 1)
    names = tuple(next(iter(folders[n])) if len(folders.get(n, ())) == 1 else "" for n in numbers)
    unique = all(names) and len(set(names)) == len(names)
    return names if unique else tuple(str(number) for number in numbers)


def check_numbers(path: Path, entries: Sequence[Entry], training: Path, trained: Sequence[Entry]) -> None:
    """Refuse a validation map that numbers a class folder otherwise than the training map.

    Folders with images of several classes in training are no class folders, and say nothing.

    Raises:
        ConfigError: naming the folder.
    """
    expected = numbers_by_folder(trained, class_folders(trained))
    for folder, numbers in numbers_by_folder(entries, class_folders(entries, expected)).items():
        known = expected.get(folder, set())
        if len(known) == 1 and numbers != known:
            number, other = min(numbers - known), next(iter(known))
            reason = f"folder {folder} has class {number}, but class {other} in {training.name}"
            raise ConfigError("data.root", f"{path}: {reason}")


def members(path: Path, index: int) -> dict[str, Member]:
    """List the files of a zip by their plain paths. Raises ConfigError where it is none."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = safe_name(_decoded_name(info))
                if name is None or info.is_dir():
                    continue
                kind = -1 if info.flag_bits & _ENCRYPTED else _KINDS.get(info.compress_type, -1)
                place = Member(index, info.header_offset, info.compress_size, name, kind, info.CRC)
                found[name] = place._replace(full_size=info.file_size)
    except Exception as error:  # of whatever kind: zipfile lets struct.error and others through
        raise ConfigError("data.root", f"{path}: cannot be read as a zip: {one_line(error)}") from None
    return found


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """Return the path of a file in UTF-8, as Info-ZIP's `zip` stores it without the flag that says so.

    zipfile takes names without the flag for code page 437; what is no UTF-8 stays that.
    """
    if info.flag_bits & _UTF8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def open_zip(data: DataConfig, split: Split, mode: Mode) -> Source:
    """Open root/<split>_map.txt and the archives that it names; classes have their names by the training map.

    Raises:
        ConfigError: a map or an archive is missing, or not what it should be; a map names what is not there;
            the maps give a class folder different numbers.
    """
    if data.download:
        raise ConfigError("data.download", "zip archives are not downloaded")
    root = root_folder(data)
    path = root / f"{split_name(data, split)}_map.txt"
    training = root / f"{data.train_split}_map.txt"
    check_file(path, "lines archive@/path/in/zip<TAB>index")
    entries = read_map(path)
    named_by = read_map(training) if split == "val" and path != training and training.is_file() else entries
    names = class_names(named_by)
    if named_by is not entries:
        check_numbers(path, entries, training, named_by)
    archives = sorted({entry.archive for entry in entries})
    contents: dict[str, dict[str, Member]] = {}
    for index, archive in enumerate(archives):
        check_file(root / archive, f"the archive that {path.name} names")
        contents[archive] = members(root / archive, index)
    images = []
    for entry in entries:
        member = contents[entry.archive].get(entry.name)
        if member is None or member.kind < 0:
            reason = "is not in" if member is None else "is encrypted, or neither stored nor deflated, in"
            raise ConfigError(
                "data.root", f"{path}, line {entry.line}: {entry.name} {reason} {entry.archive}"
            )
        if entry.target >= len(names):
            reason = f"class {entry.target}, but {training.name} has {len(names)} classes"
            raise ConfigError("data.root", f"{path}, line {entry.line}: {reason}")
        images.append(member)
    targets = [entry.target for entry in entries]
    return ArchivedImages([root / archive for archive in archives], images, targets, names, mode)
