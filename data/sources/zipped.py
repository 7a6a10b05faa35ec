"""Zip archives with a map, as the paper's code read ImageNet: root/train.zip and root/train_map.txt.

A line of the map is `archive@/path/in/zip<TAB>index`: the archive below the root, the image, its class.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
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
from vil.config import ConfigError, DataConfig
from vil.runtime.files import read_text

_CLASS = re.compile("[0-9]{1,6}")
_KINDS = {zipfile.ZIP_STORED: ZIP_STORED, zipfile.ZIP_DEFLATED: ZIP_DEFLATED}
_ENCRYPTED = 1


class Entry(NamedTuple):
    """One line of a map."""

    line: int
    archive: str
    name: str
    target: int


def read_map(path: Path) -> list[Entry]:
    """The lines of a map; empty ones are passed over.

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


def class_names(entries: Sequence[Entry]) -> tuple[str, ...]:
    """The folders of the images, where each class has one of its own, else the numbers of the classes."""
    folders: dict[int, set[str]] = {}
    for entry in entries:
        folders.setdefault(entry.target, set()).add(os.path.basename(os.path.dirname(entry.name)))
    numbers = range(max(folders) + 1)
    names = tuple(next(iter(folders[n])) if len(folders.get(n, ())) == 1 else "" for n in numbers)
    unique = all(names) and len(set(names)) == len(names)
    return names if unique else tuple(str(number) for number in numbers)


def members(path: Path, index: int) -> dict[str, Member]:
    """The files of a zip by their plain paths. Raises ConfigError where it is none."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = safe_name(info.filename)
                if name is None or info.is_dir():
                    continue
                kind = -1 if info.flag_bits & _ENCRYPTED else _KINDS.get(info.compress_type, -1)
                place = Member(index, info.header_offset, info.compress_size, name, kind, info.CRC)
                found[name] = place._replace(full_size=info.file_size)
    except Exception as error:  # of whatever kind: zipfile lets struct.error and others through
        raise ConfigError("data.root", f"{path}: cannot be read as a zip: {one_line(error)}") from None
    return found


def open_zip(data: DataConfig, split: Split, mode: Mode) -> Source:
    """root/<split>_map.txt and the archives that it names; the training map names the classes of both splits.

    Raises:
        ConfigError: a map or an archive is missing, or not what it should be; a map names what is not there.
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
