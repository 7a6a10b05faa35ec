"""Tar archives of class folders or of classes: root/<split>.tar, or all of root/<split>/*.tar.

They are read once to index their members, and then in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.decoding import Mode, image_extensions
from data.image_files import SkippedFiles, has_image_extension, is_metadata
from data.index import Index, Progress, open_index, size_and_mtime
from data.sources.archive import ArchivedImages, Member, index_members
from data.sources.base import (
    Source,
    Split,
    check_known_classes,
    refuse_validation_split,
    root_folder,
    split_name,
)
from data.sources.class_paths import AmbiguousClassesError, ArchiveFolders, classes_by_folder, parent_folders
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


class TarImages(ArchivedImages):
    """The images of the tar archives of a split, in the order of class, archive and name."""

    @classmethod
    def open(cls, data: DataConfig, split: Split, mode: Mode) -> Source:
        """Open root/<split>.tar, or all of root/<split>/*.tar; the split's name may end in `.tar`.

        The classes are those of the folder source after unpacking, see `classes_by_folder`. An archive whose
        images lie in no folder is a class, as are ImageNet's own archives.
        """
        root = root_folder(data)
        archives = _find_archives(root, split_name(data, split))
        known = None
        if split == "val" and data.train_split != data.val_split:
            training = archives_if_present(_find_archives, root, data.train_split)
            if training:
                key = (data.train_split, data.val_split)
                known = cached_by_archives(
                    "tar", training, lambda: _open_index(data, training, None).classes, *key
                )
        index = _open_index(data, archives, known)
        log_skipped_files(archives, index)
        return cls(archives, index, index.classes, mode)

    @classmethod
    def unsplit_name(cls, data: DataConfig) -> str:
        """Return the training split if it exists, else all tar archives of the root."""
        root = root_folder(data)
        if data.val_split != data.train_split:
            for path in archives_if_present(_find_archives, root, data.val_split):
                raise refuse_validation_split(data, path)
        return data.train_split if archives_if_present(_find_archives, root, data.train_split) else "."


def _open_index(data: DataConfig, archives: list[Path], known: tuple[str, ...] | None) -> Index:
    """Return the index of archives, whose classes are `known`, or those of their images."""
    splits = (data.train_split, data.val_split)
    folder = archives[0].parent

    def build(progress: Progress) -> Index:
        listed = [(str(path), *size_and_mtime(path)) for path in archives]
        skipped = skipped_files(archives)
        images = _list_images(archives, splits, skipped, data.workers, progress, known)
        found = tuple(sorted({name for _, name in images}))
        class_names = found if known is None else known
        check_known_classes(folder, found, class_names)
        class_to_index = {name: index for index, name in enumerate(class_names)}
        images.sort(key=lambda image: (class_to_index[image[1]], image[0].archive, image[0].name))
        targets = [class_to_index[name] for _, name in images]
        return index_members(
            [member for member, _ in images], targets, class_names, listed, (skipped.count, skipped.first)
        )

    return open_index(data.index, folder, ["tar", *splits, *(known or ())], build, archives, known)


def _find_archives(root: Path, split: str) -> list[Path]:
    try:
        if (root / split).is_dir():
            paths = sorted((root / split).iterdir())
            archives = [p for p in paths if p.suffix.lower() == ".tar" and not is_metadata(p.name)]
        else:
            archives = [path for path in (root / split, root / f"{split}.tar") if path.is_file()][:1]
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError("data.root", f"{root}: {error_reason(error)}") from None
    if not archives:
        reason = f"contains neither {split}.tar nor tar files in a folder {split}"
        raise UserError("data.root", f"{root}: {reason}")
    return archives


def _list_archive(path: Path, index: int) -> tuple[list[Member], SkippedFiles]:
    """List the images of an archive, and count its other files."""
    skipped = SkippedFiles(path)
    files = {member.name: member for member in read_index(path, index, skipped)}  # the last of a name
    images = []
    for name, member in files.items():
        if has_image_extension(name) and not is_metadata(name):
            images.append(member)
        else:
            skipped.add(name)
    return images, skipped


def _list_images(
    archives: list[Path],
    split_names: Sequence[str],
    skipped: SkippedFiles,
    workers: int,
    progress: Progress,
    known: Sequence[str] | None,
) -> list[tuple[Member, str]]:
    """List images and the names of their classes; count other files in `skipped`."""
    members: list[Member] = []
    contents: list[ArchiveFolders] = []
    for path, (images, others) in zip(archives, map_archives(_list_archive, archives, workers)):
        skipped.add(others.first, others.count)
        contents.append(ArchiveFolders(path.stem, {parent_folders(member.name) for member in images}))
        members += images
        progress(len(images))
    if not members:
        extensions = ", ".join(sorted(image_extensions()))
        raise UserError("data.root", f"{archives[0]}: no images in it ({extensions})")
    try:
        classes = classes_by_folder(contents, known, split_names)
    except AmbiguousClassesError as error:
        raise UserError("data.root", f"{archives[0].parent}: {error}") from None
    labeled = []
    for member in members:
        class_name = classes[member.archive][parent_folders(member.name)]
        if class_name is None:
            skipped.add(member.name)
        else:
            labeled.append((member, class_name))
    return labeled
