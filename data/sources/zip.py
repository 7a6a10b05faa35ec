"""Zip archives with a map, the format of the paper's code: root/train.zip and root/train_map.txt.

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
from data.index import Index, open_index, size_and_mtime
from data.sources.archive import ENCRYPTED, ArchivedImages, Member, check_file, index_members, safe_name
from data.sources.base import Source, Split, refuse_validation_split, root_folder, split_name
from data.sources.class_paths import class_depth, parent_folders
from vil.config import DataConfig
from vil.errors import UserError, error_reason
from vil.runtime.files import read_text

_CLASS = re.compile("[0-9]{1,6}")
_ENCRYPTED, _UTF8 = 1, 1 << 11  # flag bits of a file (APPNOTE 4.4.4)


class ZipImages(ArchivedImages):
    """The images of a map, in its order."""

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open root/<split>_map.txt and its archives; the training map names the classes."""
        root = root_folder(data)
        path = root / f"{split_name(data, split)}_map.txt"
        training = root / f"{data.train_split}_map.txt"
        check_file(path, "lines archive@/path/in/zip<TAB>index")
        if split == "train" or path == training or not training.is_file():
            training = path
        names = [os.path.relpath(map_path, root) for map_path in dict.fromkeys((path, training))]
        identity = ["zip", *names]
        index = open_index(data.index, root, identity, lambda _: _index_map(root, path, training), maps=names)
        # Behind the maps, the archives were listed.
        archives = [root / name for name, _, _ in index.listed[len(names) :]]
        return cls(archives, index, index.classes, mode)

    @classmethod
    def unsplit_name(cls, data: DataConfig) -> str:
        """Return the training split."""
        validation = root_folder(data) / f"{data.val_split}_map.txt"
        if data.val_split != data.train_split and validation.exists():
            raise refuse_validation_split(data, validation)
        return data.train_split


def _index_map(root: Path, path: Path, training: Path) -> Index:
    """Find the images of a map in its archives; the training map names the classes, and may be the same."""
    maps = list(dict.fromkeys((path, training)))
    listed = [(os.path.relpath(map_path, root), *size_and_mtime(map_path)) for map_path in maps]
    entries = training_entries = read_map(path)
    if training != path:
        training_entries = read_map(training)
        check_indices(path, entries, training, training_entries)
    class_names = map_class_names(training_entries)
    contents: dict[str, dict[str, Member]] = {}
    for number, archive in enumerate(sorted({entry.archive for entry in entries})):
        check_file(root / archive, f"the archive that {path.name} names")
        listed.append((archive, *size_and_mtime(root / archive)))
        contents[archive] = list_members(root / archive, number)
    members = []
    for entry in entries:
        member = contents[entry.archive].get(entry.name)
        if entry.target >= len(class_names):
            reason = f"class {entry.target}, but {training.name} has {len(class_names)} classes"
        elif member is None:
            reason = f"{entry.name} is not in {entry.archive}"
        elif member.kind not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = f"{entry.name} is encrypted, or neither stored nor deflated, in {entry.archive}"
        else:
            members.append(member)
            continue
        raise UserError("data.root", f"{path}, line {entry.line}: {reason}")
    return index_members(members, [entry.target for entry in entries], class_names, listed)


class MapEntry(NamedTuple):
    """One line of a map."""

    line: int
    archive: str
    name: str
    target: int


def read_map(path: Path) -> list[MapEntry]:
    """Read a map, in UTF-8 with or without a byte order mark; empty lines are ignored."""
    try:
        lines = read_text(path).split("\n")  # names may contain other line separators of Unicode
    except (OSError, ValueError) as error:
        raise UserError("data.root", f"{path}: {error_reason(error)}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, tab, label = line.rpartition("\t")
        archive, at, inside = image.partition("@")
        name = safe_name(inside)
        if not (tab and at and archive and inside):
            reason = f"expected archive@/path/in/zip<TAB>index, got {line[:80]!r}"
        elif not _CLASS.fullmatch(label.strip()):
            reason = f"the class is not an integer below 1,000,000: {label[:80]!r}"
        elif name is None or os.path.isabs(archive) or safe_name(archive) is None:
            reason = f"leads outside of the folder or the archive: {image[:80]!r}"
        else:
            entries.append(MapEntry(number, archive, name, int(label)))
            continue
        raise UserError("data.root", f"{path}, line {number}: {reason}")
    if not entries:
        raise UserError("data.root", f"{path}: does not name any image")
    return entries


def indices_by_folder(
    entries: Sequence[MapEntry], known: Collection[str] | None = None
) -> dict[str, set[int]]:
    """Return the class indices of the images in each class folder; "" is for images outside of them."""
    folders = [parent_folders(entry.name) for entry in entries]
    distinct = set(folders) - {()}
    depth = class_depth(distinct, known) if distinct else 0
    indices: dict[str, set[int]] = {}
    for entry, parts in zip(entries, folders):
        indices.setdefault(parts[depth] if len(parts) > depth else "", set()).add(entry.target)
    return indices


def map_class_names(entries: Sequence[MapEntry]) -> tuple[str, ...]:
    """Return the class folders if each class has exactly one, else the class indices."""
    by_folder = indices_by_folder(entries)
    pairs = sorted((index, folder) for folder, indices in by_folder.items() for index in indices)
    classes = range(pairs[-1][0] + 1)
    is_one_to_one = len(pairs) == len(by_folder) and [index for index, _ in pairs] == list(classes)
    is_named = is_one_to_one and "" not in by_folder
    return tuple(folder for _, folder in pairs) if is_named else tuple(map(str, classes))


def check_indices(
    path: Path, entries: Sequence[MapEntry], training: Path, training_entries: Sequence[MapEntry]
) -> None:
    """Raise UserError if a validation map gives a class folder another index than the training map.

    Folders with images of several classes in training are not class folders, and are not compared.
    """
    expected = indices_by_folder(training_entries)
    expected.pop("", None)
    for folder, indices in indices_by_folder(entries, expected).items():
        known = expected.get(folder, set())
        if len(known) == 1 and indices != known:
            index, other = min(indices - known), next(iter(known))
            reason = f"folder {folder} has class {index}, but class {other} in {training.name}"
            raise UserError("data.root", f"{path}: {reason}")


def list_members(path: Path, index: int) -> dict[str, Member]:
    """Return the files of a zip by their normalized paths. Raises UserError if it is not a zip."""
    members = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = safe_name(_decode_name(info))
                if name is None or info.is_dir():
                    continue
                kind = ENCRYPTED if info.flag_bits & _ENCRYPTED else info.compress_type
                offset, size = info.header_offset, info.compress_size
                members[name] = Member(index, offset, size, name, kind, info.CRC, info.file_size)
    except Exception as error:  # zipfile lets struct.error and others through
        raise UserError("data.root", f"{path}: cannot be read as a zip: {error_reason(error)}") from None
    return members


def _decode_name(info: zipfile.ZipInfo) -> str:
    """Decode a path in UTF-8, which Info-ZIP's `zip` stores without its flag.

    zipfile decodes names without the flag as code page 437, which is kept if the bytes are not UTF-8.
    """
    if info.flag_bits & _UTF8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
