"""Tar archives: a split in one file, a folder of them, or the shards of a WebDataset, without unpacking.

They are read through once for the places of their members; after that the images are read in any order, as
from a folder: shuffled over all archives, resumed exactly, each rank its own.
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data.decoding import Mode, extensions
from data.image_files import SkippedFiles, has_image_extension, is_metadata
from data.sources.archive import ArchivedImages, Member, one_line, safe_name
from data.sources.base import Source, Split, listed, root_folder, split_name
from data.sources.class_paths import AmbiguousClassesError, Archive, classes_by_folder, parent_folders
from vil.config import ConfigError, DataConfig
from vil.runtime.files import open_regular

_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_MOST_SHARDS = 1_000_000


_BLOCK = 512
_MAX_LABEL = 64  # bytes of a .cls file
_MAX_JSON = 1 << 20
_MAX_LINKS = 40
LABEL_KEYS = ("cls", "label")
"""Keys of the class in a .json file of a WebDataset sample."""


def read_index(path: Path, index: int, skipped: SkippedFiles) -> list[Member]:
    """List the files of an uncompressed tar in the order of the archive, those appended again once more.

    Hard links and symbolic links to files in the archive are files, as after unpacking.

    Args:
        path: the archive.
        index: its place among the archives.
        skipped: counts links that lead elsewhere, and files whose names lead out of the archive.

    Raises:
        ConfigError: the archive cannot be read, is damaged, cut, or followed by further content.
    """
    members: list[Member] = []
    files: dict[str, Member] = {}
    links: dict[str, str] = {}
    try:
        # r: would accept nothing compressed, whose members have no place in the file.
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep all
                name = safe_name(info.name)
                if info.isdir():
                    continue
                if info.sparse is not None:
                    raise ValueError(f"{info.name} is stored with holes (a sparse file), not supported")
                if name is None:
                    skipped.add(info.name)
                    continue
                if info.isreg():
                    files[name] = Member(index, info.offset_data, info.size, name)
                    members.append(files[name])
                elif info.islnk() and (original := files.get(safe_name(info.linkname) or "")) is not None:
                    files[name] = original._replace(name=name)
                    members.append(files[name])
                elif info.issym():
                    folder = posixpath.dirname(name)
                    links[name] = posixpath.normpath(posixpath.join(folder, info.linkname))
                else:
                    skipped.add(name)
            _check_end(path, archive.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise ConfigError(
            "data.root", f"{path}: cannot be read as an uncompressed tar: {one_line(error)}"
        ) from None
    for name, target in links.items():
        for _ in range(_MAX_LINKS):
            target = links.get(target, target) if target not in files else target
        if target in files:
            members.append(files[target]._replace(name=name))
        else:
            skipped.add(name)
    return members


def _check_end(path: Path, offset: int) -> None:
    """Raise ValueError unless an archive ends at `offset`: a block of zeros, and after it nothing but zeros.

    tarfile stops at the first damaged header, and at the end of the first of several archives, as if there
    were nothing behind.
    """
    with open_regular(path) as file:
        file.seek(offset)
        position = offset
        while content := file.read(1 << 20):
            if content.strip(b"\0"):
                position += len(content) - len(content.lstrip(b"\0"))
                if position < offset + _BLOCK:
                    raise ValueError(f"damaged: no header of a file at byte {offset:,}")
                reason = "is followed by further content, as of archives joined by cat"
                raise ValueError(f"its end mark at byte {offset:,} {reason}")
            position += len(content)
    if position < offset + _BLOCK:
        raise ValueError(f"it ends at byte {position:,} without an end mark, as if it were cut")


def open_tar(data: DataConfig, split: Split, mode: Mode) -> Source:
    """Open root/<split>.tar, or all of root/<split>/*.tar; also a split that is named `train.tar`.

    The classes are those that the folder source finds in the unpacked archives; see `classes_by_folder`. An
    archive whose images lie in no folder is a class, as ImageNet's own archives are, one for each class.

    Raises:
        ConfigError: there is no such archive, one is damaged, no image in it, or a class that the training
            split lacks.
    """
    root = root_folder(data)
    if data.download:
        raise ConfigError("data.download", "tar archives are not downloaded")
    splits = (data.train_split, data.val_split)
    archives = _archives(root, split_name(data, split))
    known, training = None, []
    if split == "val" and data.train_split != data.val_split:
        training = _if_there(_archives, root, data.train_split)
    if training:
        known = _classes("tar", training, lambda: {name for _, name in _images(training, splits)})
    images = _images(archives, splits, known)
    classes = _remembered("tar", archives, {name for _, name in images}) if known is None else known
    places = {name: place for place, name in enumerate(classes)}
    unknown = sorted({name for _, name in images} - set(classes))
    if unknown:
        reason = f"classes that the training split lacks: {listed(unknown)}"
        raise ConfigError("data.root", f"{archives[0].parent}: {reason}")
    images.sort(key=lambda image: (places[image[1]], image[0].archive, image[0].name))
    targets = [places[name] for _, name in images]
    return ArchivedImages(archives, [member for member, _ in images], targets, classes, mode)


_known: dict[tuple[Any, ...], tuple[str, ...]] = {}
"""Classes by source and archives: a million images take a minute to list, both splits need those of one."""


def _key(kind: str, archives: Sequence[Path]) -> tuple[Any, ...]:
    return kind, *((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in archives)


def _remembered(kind: str, archives: Sequence[Path], names: Iterable[str]) -> tuple[str, ...]:
    return _known.setdefault(_key(kind, archives), tuple(sorted(names)))


def _classes(kind: str, archives: Sequence[Path], read: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    return _known.get(_key(kind, archives)) or _remembered(kind, archives, read())


def _if_there(find: Callable[[Path, str], list[Path]], root: Path, split: str) -> list[Path]:
    try:
        return find(root, split)
    except ConfigError:
        return []


def _archives(root: Path, split: str) -> list[Path]:
    try:
        if (root / split).is_dir():
            found = sorted(
                path
                for path in (root / split).iterdir()
                if path.suffix.lower() == ".tar" and not is_metadata(path.name)
            )
        else:
            found = [path for path in (root / split, root / f"{split}.tar") if path.is_file()][:1]
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError("data.root", f"{root}: {one_line(error)}") from None
    if not found:
        raise ConfigError("data.root", f"{root}: holds neither {split}.tar nor tar files in a folder {split}")
    return found


def _images(
    archives: list[Path], split_names: Sequence[str], known: Sequence[str] | None = None
) -> list[tuple[Member, str]]:
    """List images and the names of their classes.

    Raises:
        ConfigError: an archive cannot be read, there are no images, or their classes are ambiguous.
    """
    skipped = SkippedFiles(archives[0] if len(archives) == 1 else archives[0].parent)
    found: list[Member] = []
    contents: list[Archive] = []
    for index, path in enumerate(archives):
        files = {
            member.name: member for member in read_index(path, index, skipped)
        }  # the last of a name counts
        images = []
        for name, member in files.items():
            if has_image_extension(name) and not is_metadata(name):
                images.append(member)
            else:
                skipped.add(name)
        contents.append(Archive(path.stem, {parent_folders(member.name) for member in images}))
        found += images
    if not found:
        reason = f"no images in it ({', '.join(sorted(extensions()))})"
        raise ConfigError("data.root", f"{archives[0]}: {reason}")
    try:
        classes = classes_by_folder(contents, known, split_names)
    except AmbiguousClassesError as error:
        raise ConfigError("data.root", f"{archives[0].parent}: {error}") from None
    labelled = []
    for member in found:
        class_name = classes[member.archive][parent_folders(member.name)]
        if class_name is None:
            skipped.add(member.name)
        else:
            labelled.append((member, class_name))
    skipped.report()
    return labelled


def open_shards(data: DataConfig, split: Split, mode: Mode) -> Source:
    """WebDataset shards: `data.train_split` and `data.val_split` are patterns below the root.

    As `imagenet-train-{0000..1023}.tar` or `imagenet-train-*.tar`; a plain `train` stands for `train-*.tar`
    or `train*.tar`. A sample is one image and, of the same name before the first dot, a `.cls` with its class
    as a number, or a `.json` with that number, alone or under the key `cls` or `label`. Other files of a
    sample are not read.

    Raises:
        ConfigError: a shard is missing or broken, or a sample has not one image and one class.
    """
    if data.download:
        raise ConfigError("data.download", "shards are not downloaded")
    root = root_folder(data)
    archives = _shards(root, split_name(data, split))
    members, targets = _labelled(archives)
    classes = _remembered("wds", archives, _numbers(targets))
    if split == "val" and data.train_split != data.val_split:
        training = _if_there(_shards, root, data.train_split)
        if training:
            classes = max(
                classes, _classes("wds", training, lambda: _numbers(_labelled(training)[1])), key=len
            )
    return ArchivedImages(archives, members, targets, tuple(map(str, range(len(classes)))), mode)


def _numbers(targets: Sequence[int]) -> list[str]:
    return [str(number) for number in range(max(targets) + 1)]


def _shards(root: Path, pattern: str) -> list[Path]:
    if span := _RANGE.search(pattern):
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MOST_SHARDS:
            raise ConfigError("data.root", f"{pattern}: expected a rising range of numbers")
        numbers = (str(number).zfill(len(span[1])) for number in range(first, last + 1))
        paths = [root / f"{pattern[: span.start()]}{number}{pattern[span.end() :]}" for number in numbers]
        lacking = [str(path) for path in paths if not path.is_file()]
        if lacking:
            raise ConfigError("data.root", f"no such shards: {listed(lacking)}")
        return paths
    try:
        for name in (pattern, f"{pattern}-*.tar", f"{pattern}*.tar"):
            found = [Path(path) for path in sorted(glob.glob(str(root / name))) if os.path.isfile(path)]
            if found:
                return found
    except (OSError, ValueError) as error:
        raise ConfigError("data.root", f"{root}: {one_line(error)}") from None
    raise ConfigError("data.root", f"{root}: holds no shards {pattern}, {pattern}-*.tar or {pattern}*.tar")


@dataclass
class _Files:
    """What a shard holds under one key, the part of a path before the first dot of the file's name."""

    images: list[Member] = field(default_factory=list)
    labels: list[Member] = field(default_factory=list)
    """Files .cls."""
    documents: list[Member] = field(default_factory=list)
    """Files .json."""
    others: list[Member] = field(default_factory=list)


def _labelled(archives: list[Path]) -> tuple[list[Member], list[int]]:
    """List the images of all shards and their classes.

    Raises:
        ConfigError: a shard cannot be read, a sample has not one image and one class, or there are none.
    """
    skipped = SkippedFiles(archives[0] if len(archives) == 1 else archives[0].parent)
    members: list[Member] = []
    targets: list[int] = []
    for index, path in enumerate(archives):
        samples: dict[str, _Files] = {}
        for member in read_index(path, index, skipped):
            if is_metadata(member.name):
                skipped.add(member.name)
                continue
            folder, file = posixpath.split(member.name)
            files = samples.setdefault(posixpath.join(folder, file.partition(".")[0]), _Files())
            extension = file.rpartition(".")[2].lower()
            if extension == "cls":
                files.labels.append(member)
            elif extension == "json":
                files.documents.append(member)
            elif has_image_extension(file):
                files.images.append(member)
            else:
                files.others.append(member)
        with open_regular(path) as shard:
            for key, files in samples.items():
                if not files.images and not files.labels:
                    for member in (*files.documents, *files.others):
                        skipped.add(member.name)
                    continue
                try:
                    pairs = _pairs(files)
                except ValueError as error:
                    raise ConfigError("data.root", f"{path}: sample {key}: {error}") from None
                members += (image for image, _ in pairs)
                targets += (_class_number(path, shard, label) for _, label in pairs)
    if not members:
        raise ConfigError("data.root", f"{archives[0]}: no images with classes in it")
    skipped.report()
    return members, targets


def _pairs(files: _Files) -> list[tuple[Member, Member]]:
    """Pair the images of a key with the files of their classes: one of each, or several of dotted names.

    Names as `photo.1.jpg` and `photo.1.cls` share the key `photo` with `photo.2.jpg`: an image then belongs
    to the class whose name is the same up to the last dot.

    Raises:
        ValueError: an image has no class, a class no image, or there are several of one.
    """
    images = files.images
    labels = files.labels or files.documents
    if len(images) == len(labels) == 1:
        return [(images[0], labels[0])]
    by_name = [Counter(posixpath.splitext(file.name)[0] for file in group) for group in (images, labels)]
    if by_name[0] == by_name[1] and all(count == 1 for count in by_name[0].values()):
        label_of = {posixpath.splitext(label.name)[0]: label for label in labels}
        return [(image, label_of[posixpath.splitext(image.name)[0]]) for image in images]
    if not images:
        raise ValueError(
            f"a class without an image ({listed([file.name for file in (*labels, *files.others)])})"
        )
    if not labels:
        raise ValueError(
            f"images without a .cls or .json beside them: {listed([file.name for file in images])}"
        )
    several = images if len(images) > 1 else labels
    what = "images" if several is images else "classes"
    raise ValueError(f"{len(several)} {what} under one key: {listed([file.name for file in several])}")


def _class_number(path: Path, shard: BinaryIO, label: Member) -> int:
    """Read the class of a sample from its .cls, or from a number or the key cls or label of its .json.

    Args:
        path: the shard, for messages.
        shard: the same, open.
        label: the file in it.

    Raises:
        ConfigError: it is no whole number from 0 to 999,999.
    """
    is_json = label.name.lower().endswith(".json")
    limit = _MAX_JSON if is_json else _MAX_LABEL
    shard.seek(label.offset)
    content = b"" if label.size > limit else shard.read(label.size)
    text = content.decode("utf-8-sig", "replace").strip()
    if is_json:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise ConfigError("data.root", f"{path}: {label.name} is not JSON") from None
        found = [document]
        if isinstance(document, dict):
            found = [document[key] for key in LABEL_KEYS if key in document]
        if len(found) != 1 or type(found[0]) is not int:
            reason = f"holds no class: expected a whole number, alone or under one of {', '.join(LABEL_KEYS)}"
            raise ConfigError("data.root", f"{path}: {label.name} {reason}")
        text = str(found[0])
    if not (text.isascii() and text.isdecimal() and len(text) < 7):
        raise ConfigError("data.root", f"{path}: {label.name} is no class: {text[:40]!r}")
    return int(text)
