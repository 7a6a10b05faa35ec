"""Classes of images in archives, from the folders that they lie in, as the folder source finds them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

Folders = tuple[str, ...]
"""The folders of a path, outermost first."""

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


class AmbiguousClassesError(ValueError):
    """Folders and archives name different classes; the text says how."""


def parent_folders(path: str) -> Folders:
    """Split off the folders of a path with slashes: `train/ant/0.jpg` → `("train", "ant")`."""
    return tuple(path.split("/")[:-1])


def class_depth(
    folders: Collection[Folders], known: Collection[str] | None = None, split_names: Collection[str] = ()
) -> int:
    """Find which of the folders of a path is the class: the outermost one that tells images apart.

    `train/ant/images/0.jpg` and `train/bear/images/0.jpg` have it at depth 1. Where the classes are known,
    it is the outermost depth at which all folders are classes. Where all images lie in one folder, it is the
    outermost folder that is not named like a split.

    Args:
        folders: the distinct folders of images, none of them empty.
        known: names of all classes, where another split has told them.
        split_names: names of the data set's splits, beside the usual ones.
    """
    shared = _shared_length(folders)
    if known is not None:
        for depth in range(shared + 1):
            names = {parts[depth] for parts in folders if len(parts) > depth}
            if names and names <= set(known):
                return depth
    splits = SPLIT_NAMES | {name.lower() for name in split_names}
    first = next(iter(folders))
    if len(folders) == 1:
        return next((i for i, name in enumerate(first) if name.lower() not in splits), len(first) - 1)
    alone = shared > 0 and any(len(parts) == shared for parts in folders)
    if alone and first[shared - 1].lower() not in splits:
        return shared - 1  # images lie in that folder itself and in folders below it: one class
    return shared


def _shared_length(folders: Collection[Folders]) -> int:
    smallest, largest = min(folders), max(folders)  # what these two share, all share
    pairs = enumerate(zip(smallest, largest))
    return next((i for i, (one, other) in pairs if one != other), min(len(smallest), len(largest)))


@dataclass
class Archive:
    """The name of an archive without its extension, and the folders in which its images lie."""

    stem: str
    folders: set[Folders]
    """Of each image; () is the archive's own top."""


def classes_by_folder(
    archives: Sequence[Archive], known: Collection[str] | None = None, split_names: Collection[str] = ()
) -> list[dict[Folders, str | None]]:
    """Name the class of each folder of each archive; None stands for images beside the class folders.

    Archives of a split hold class folders, any of them, or one class each. In the first case a folder is
    found by `class_depth`, over all archives. In the second the archive's name is the class, whatever folders
    its images lie in, as where each of ImageNet's archives holds a folder `images`.

    Raises:
        AmbiguousClassesError: it could be both.
    """
    distinct = {parts for archive in archives for parts in archive.folders if parts}
    depth = class_depth(distinct, known, split_names) if distinct else 0
    by_folder = [
        {
            parts: parts[depth] if len(parts) > depth else archive.stem if archive.folders == {()} else None
            for parts in archive.folders
        }
        for archive in archives
    ]
    if len(archives) == 1:
        return by_folder
    by_archive: list[dict[Folders, str | None]] = [
        dict.fromkeys(archive.folders, archive.stem) for archive in archives
    ]
    names = [{name for name in found.values() if name is not None} for found in by_folder]
    stems = [archive.stem for archive in archives]
    if known is not None:
        fits = not set().union(*names) <= set(known) and set(stems) <= set(known)
        return by_archive if fits else by_folder
    return by_archive if _one_class_each(stems, names) else by_folder


def _one_class_each(stems: Sequence[str], names: Sequence[set[str]]) -> bool:
    """Return True if archives are classes, False if their folders are. Raises AmbiguousClassesError."""
    numbered = len({re.sub("[0-9]+", "", stem) for stem in stems}) == 1  # as part0, part1; and n01440764
    shared = [name for name, count in Counter(name for found in names for name in found).items() if count > 1]
    if all(len(found) == 1 for found in names):
        if len(set().union(*names)) == 1:
            return True
        if all(stem.startswith(name) for stem, found in zip(stems, names) for name in found):
            return False  # as ant.tar with ant/, or ant-0.tar and ant-1.tar with ant/
        if not shared:
            return not numbered
    if shared and not numbered:
        place = next(i for i, found in enumerate(names) if shared[0] in found)
        raise AmbiguousClassesError(
            f"the classes may be the archives ({stems[place]}, …) or the folders in them ({shared[0]}, …, "
            "which several archives have); store images of an archive that is a class in no folder, or name "
            "archives of many classes by number"
        )
    return False
