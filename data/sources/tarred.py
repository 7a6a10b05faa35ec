"""Tar archives: a split in one file, a folder of them, or the shards of a WebDataset, without unpacking.

They are read through once for the places of their members; after that the images are read in any order, as
from a folder: shuffled over all archives, resumed exactly, each rank its own.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.decoding import Mode
from data.sources.archive import ArchivedImages, Member, one_line, safe_name
from data.sources.base import Source, Split, listed, root_folder, split_name
from vil.config import ConfigError, DataConfig

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 1_000_000


def walk(path: Path, index: int) -> Iterator[tuple[Member, bytes]]:
    """The files of an uncompressed tar in its order; of small ones that are no images also their content."""
    try:
        # r: would accept nothing compressed, whose members have no place in the file.
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = safe_name(info.name)
                if name is None or not info.isreg() or info.sparse is not None:
                    continue
                label = name.endswith(".cls") and info.size <= 64
                file = archive.extractfile(info) if label else None
                yield Member(index, info.offset_data, info.size, name), file.read() if file else b""
                archive.members = []  # type: ignore[attr-defined]  # which tarfile would keep all
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise ConfigError(
            "data.root", f"{path}: cannot be read as an uncompressed tar: {one_line(error)}"
        ) from None


def open_tar(data: DataConfig, split: Split, mode: Mode) -> Source:
    """root/<split>.tar, or all of root/<split>/*.tar; also a split that is named `train.tar`.

    An image's class is its folder in the archive, or the archive's name where it has none there, as in
    ImageNet's own archives, one for each class.

    Raises:
        ConfigError: there is no such archive, no image in it, or a class that the training split lacks.
    """
    root = root_folder(data)
    if data.download:
        raise ConfigError("data.download", "tar archives are not downloaded")
    archives = _archives(root, split_name(data, split))
    images = _images(archives)
    classes = own = _remembered("tar", archives, {name for _, name in images})
    if split == "val" and data.train_split != data.val_split:
        training = _if_there(_archives, root, data.train_split)
        classes = _classes("tar", training, lambda: {n for _, n in _images(training)}) if training else own
    places = {name: place for place, name in enumerate(classes)}
    unknown = [name for name in own if name not in places]
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
            found = sorted(path for path in (root / split).iterdir() if path.suffix == ".tar")
        else:
            found = [path for path in (root / split, root / f"{split}.tar") if path.is_file()][:1]
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError("data.root", f"{root}: {one_line(error)}") from None
    if not found:
        raise ConfigError("data.root", f"{root}: holds neither {split}.tar nor tar files in a folder {split}")
    return found


def _images(archives: list[Path]) -> list[tuple[Member, str]]:
    found = [
        (member, os.path.basename(os.path.dirname(member.name)) or path.stem)
        for index, path in enumerate(archives)
        for member, _ in walk(path, index)
        if member.name.lower().endswith(IMG_EXTENSIONS)
    ]
    if not found:
        raise ConfigError("data.root", f"{archives[0]}: no images in it ({', '.join(IMG_EXTENSIONS)})")
    return found


def open_shards(data: DataConfig, split: Split, mode: Mode) -> Source:
    """WebDataset shards: `data.train_split` and `data.val_split` are patterns below the root.

    As `imagenet-train-{0000..1023}.tar` or `imagenet-train-*.tar`; a plain `train` stands for `train-*.tar`
    or `train*.tar`. A sample is an image and, of the same name before the first dot, a `.cls` with its class
    as a number.

    Raises:
        ConfigError: a shard is missing or broken, an image has no class.
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


def _labelled(archives: list[Path]) -> tuple[list[Member], list[int]]:
    members: list[Member] = []
    targets: list[int] = []
    for index, path in enumerate(archives):
        images: dict[str, Member] = {}
        labels: dict[str, int] = {}
        for member, content in walk(path, index):
            folder, file = os.path.split(member.name)
            stem, _, extension = file.partition(".")
            key = f"{folder}/{stem}"
            if extension == "cls":
                text = content.decode("ascii", "replace").strip()
                if not (text.isascii() and text.isdecimal() and len(text) < 7):
                    raise ConfigError("data.root", f"{path}: {member.name} is no class: {text[:40]!r}")
                labels[key] = int(text)
            elif f".{extension.lower()}" in IMG_EXTENSIONS:
                images[key] = member
        unlabelled = [member.name for key, member in images.items() if key not in labels]
        if unlabelled:
            raise ConfigError("data.root", f"{path}: images without a .cls beside them: {listed(unlabelled)}")
        members += images.values()
        targets += (labels[key] for key in images)
    if not members:
        raise ConfigError("data.root", f"{archives[0]}: no images with classes in it")
    return members, targets
