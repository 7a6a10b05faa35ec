"""WebDataset shards: tar archives of samples, indexed once and read in any order instead of streamed."""

from __future__ import annotations

import glob
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import BinaryIO

from data.decoding import Mode
from data.image_files import SkippedFiles, has_image_extension, is_metadata
from data.index import Index, Progress, open_index, size_and_mtime
from data.sources.archive import ArchivedImages, Member, index_members
from data.sources.base import Source, Split, refuse_validation_split, root_folder, shorten_list, split_name
from data.sources.tar_index import (
    archives_if_present,
    cached_by_archives,
    log_skipped_files,
    map_archives,
    read_index,
    skipped_files,
)
from vil.config import DataConfig
from vil.errors import UserError, error_reason
from vil.runtime.files import open_regular

_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_MAX_SHARDS = 1_000_000
_MAX_CLS_BYTES = 64
_MAX_JSON_BYTES = 1 << 20
LABEL_KEYS = ("cls", "label")
"""Keys of the class in a .json file of a sample."""


class WebDataset(ArchivedImages):
    """The images of the shards of a split, in the order of the shards."""

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open the shards that match `data.train_split` or `data.val_split`, patterns below the root.

        Patterns are `imagenet-train-{0000..1023}.tar`, `imagenet-train-*.tar`, or `train` for `train-*.tar`
        or `train*.tar`. A sample is one image and, with the same name up to the first dot, a `.cls` file with
        its class index, or a `.json` file with the index, alone or under the key `cls` or `label`. Other
        files are not read.
        """
        root = root_folder(data)
        archives = _find_shards(root, split_name(data, split))
        index = _open_index(data, archives)
        log_skipped_files(archives, index)
        num_classes = len(index.classes)
        if split == "val" and data.train_split != data.val_split:
            training = archives_if_present(_find_shards, root, data.train_split)
            if training:
                trained = cached_by_archives(
                    "wds", training, lambda: len(_open_index(data, training).classes)
                )
                num_classes = max(num_classes, trained)
        return cls(archives, index, tuple(map(str, range(num_classes))), mode)

    @classmethod
    def unsplit_name(cls, data: DataConfig) -> str:
        """Return the training split if it exists, else all tar archives of the root."""
        root = root_folder(data)
        if data.val_split != data.train_split:
            for path in archives_if_present(_find_shards, root, data.val_split):
                raise refuse_validation_split(data, path)
        return data.train_split if archives_if_present(_find_shards, root, data.train_split) else "*.tar"


def _find_shards(root: Path, pattern: str) -> list[Path]:
    if span := _RANGE.search(pattern):
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MAX_SHARDS:
            raise UserError("data.root", f"{pattern}: expected a rising range of numbers")
        numbers = (str(number).zfill(len(span[1])) for number in range(first, last + 1))
        paths = [root / f"{pattern[: span.start()]}{number}{pattern[span.end() :]}" for number in numbers]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise UserError("data.root", f"no such shards: {shorten_list(missing)}")
        return paths
    try:
        for name in (pattern, f"{pattern}-*.tar", f"{pattern}*.tar"):
            matches = [Path(path) for path in sorted(glob.glob(str(root / name))) if os.path.isfile(path)]
            if matches:
                return matches
    except (OSError, ValueError) as error:
        raise UserError("data.root", f"{root}: {error_reason(error)}") from None
    raise UserError("data.root", f"{root}: contains no shards {pattern}, {pattern}-*.tar or {pattern}*.tar")


_SampleFiles = dict[str, list[Member]]
"""The files of a shard with one key (the path up to the first dot of the name): image, cls, json, other."""


def _open_index(data: DataConfig, archives: list[Path]) -> Index:
    """Return the index of shards, in their order; classes are numbers."""

    def build(progress: Progress) -> Index:
        listed = [(str(path), *size_and_mtime(path)) for path in archives]
        skipped = skipped_files(archives)
        members: list[Member] = []
        targets: list[int] = []
        for images, labels, others in map_archives(_list_samples, archives, data.workers):
            skipped.add(others.first, others.count)
            members += images
            targets += labels
            progress(len(images))
        if not members:
            raise UserError("data.root", f"{archives[0]}: no images with classes in it")
        class_names = tuple(map(str, range(max(targets) + 1)))
        return index_members(members, targets, class_names, listed, (skipped.count, skipped.first))

    return open_index(data.index, archives[0].parent, ["wds", *map(str, archives)], build, archives)


def _list_samples(path: Path, index: int) -> tuple[list[Member], list[int], SkippedFiles]:
    """List the images of a shard and their classes; each sample has one of both."""
    skipped = SkippedFiles(path)
    members: list[Member] = []
    targets: list[int] = []
    samples: dict[str, _SampleFiles] = {}
    for member in read_index(path, index, skipped):
        if is_metadata(member.name):
            skipped.add(member.name)
            continue
        folder, file = posixpath.split(member.name)
        key = posixpath.join(folder, file.partition(".")[0])
        extension = file.rpartition(".")[2].lower()
        other = "image" if has_image_extension(file) else "other"
        kind = extension if extension in ("cls", "json") else other
        samples.setdefault(key, defaultdict(list))[kind].append(member)
    with open_regular(path) as shard:
        for key, files in samples.items():
            if not files["image"] and not files["cls"]:
                for member in (*files["json"], *files["other"]):
                    skipped.add(member.name)
                continue
            try:
                pairs = _pair_labels(files)
            except ValueError as error:
                raise UserError("data.root", f"{path}: sample {key}: {error}") from None
            members += (image for image, _ in pairs)
            targets += (_read_class(path, shard, label) for _, label in pairs)
    return members, targets, skipped


def _pair_labels(files: _SampleFiles) -> list[tuple[Member, Member]]:
    """Pair the images of a key with the files of their classes: one of each, or several with dotted names.

    `photo.1.jpg` and `photo.1.cls` share the key `photo` with `photo.2.jpg`: an image then has the class of
    the file whose name is equal up to the last dot. Raises ValueError if one is missing or ambiguous.
    """
    images = files["image"]
    labels = files["cls"] or files["json"]
    if len(images) == len(labels) == 1:
        return [(images[0], labels[0])]
    stems = [Counter(posixpath.splitext(file.name)[0] for file in group) for group in (images, labels)]
    if stems[0] == stems[1] and all(count == 1 for count in stems[0].values()):
        label_by_stem = {posixpath.splitext(label.name)[0]: label for label in labels}
        return [(image, label_by_stem[posixpath.splitext(image.name)[0]]) for image in images]

    def names(group: list[Member]) -> str:
        return shorten_list([file.name for file in group])

    if not images:
        raise ValueError(f"a class without an image ({names([*labels, *files['other']])})")
    if not labels:
        raise ValueError(f"images without a .cls or .json file: {names(images)}")
    duplicates, kind = (images, "images") if len(images) > 1 else (labels, "classes")
    raise ValueError(f"{len(duplicates)} {kind} under one key: {names(duplicates)}")


def _read_class(path: Path, shard: BinaryIO, label: Member) -> int:
    """Read the class index of a sample, from 0 to 999,999, from its .cls or .json file in the shard."""
    is_json = label.name.lower().endswith(".json")
    shard.seek(label.offset)
    is_too_large = label.size > (_MAX_JSON_BYTES if is_json else _MAX_CLS_BYTES)
    content = b"" if is_too_large else shard.read(label.size)
    text = content.decode("utf-8-sig", "replace").strip()
    if is_json:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError("data.root", f"{path}: {label.name} is not JSON") from None
        is_mapping = isinstance(document, dict)
        values = [document[key] for key in LABEL_KEYS if key in document] if is_mapping else [document]
        if len(values) != 1 or type(values[0]) is not int:
            reason = f"has no class: expected an integer, alone or under one of {', '.join(LABEL_KEYS)}"
            raise UserError("data.root", f"{path}: {label.name} {reason}")
        text = str(values[0])
    if not (text.isascii() and text.isdecimal() and len(text) < 7):
        raise UserError("data.root", f"{path}: {label.name} is not a class index: {text[:40]!r}")
    return int(text)
