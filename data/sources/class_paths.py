"""Classes of images in archives by their folders, as the folder source assigns them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

Folders = tuple[str, ...]
"""The folders of a path, outermost first."""

VALIDATION_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = frozenset({"train", "training", "test", *VALIDATION_NAMES})


class AmbiguousClassesError(ValueError):
    """Folders and archives name different classes; the text explains it."""


def parent_folders(path: str) -> Folders:
    """Return the folders of a path: `train/ant/0.jpg` → `("train", "ant")`."""
    return tuple(path.split("/")[:-1])


def class_depth(
    folders: Collection[Folders], known: Collection[str] | None = None, split_names: Collection[str] = ()
) -> int:
    """Return the depth of the class folder in the paths: the outermost one that differs between images.

    It is 1 for `train/ant/images/0.jpg` and `train/bear/images/0.jpg`. If the classes are known, it is the
    outermost depth, not below that one, at which all folders are classes. If all images lie in one folder, it
    is the outermost folder that is not named like a split.
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
    has_images = shared > 0 and any(len(parts) == shared for parts in folders)
    if has_images and first[shared - 1].lower() not in splits:
        return shared - 1  # images lie in the shared folder and in folders below it: one class
    return shared


def _shared_length(folders: Collection[Folders]) -> int:
    smallest, largest = min(folders), max(folders)  # the common prefix of these two is that of all
    pairs = enumerate(zip(smallest, largest))
    return next((i for i, (one, other) in pairs if one != other), min(len(smallest), len(largest)))


@dataclass
class ArchiveFolders:
    """The name of an archive without its extension, and the folders of its images."""

    stem: str
    folders: set[Folders]
    """() is the top of the archive."""


def classes_by_folder(
    archives: Sequence[ArchiveFolders],
    known: Collection[str] | None = None,
    split_names: Collection[str] = (),
) -> Sequence[Mapping[Folders, str | None]]:
    """Return the class of each folder of each archive; None for images outside of the class folders.

    The archives of a split contain class folders, or are one class each. In the first case the class folder
    is found by `class_depth` over all archives. In the second the archive's name is the class, whatever its
    folders.

    Raises:
        AmbiguousClassesError: both are possible.
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
    by_archive = [dict.fromkeys(archive.folders, archive.stem) for archive in archives]
    names = [{name for name in classes.values() if name is not None} for classes in by_folder]
    stems = [archive.stem for archive in archives]
    if known is not None:
        is_by_archive = not set().union(*names) <= set(known) and set(stems) <= set(known)
        return by_archive if is_by_archive else by_folder
    return by_archive if _is_class_per_archive(stems, names) else by_folder


def _is_class_per_archive(stems: Sequence[str], names: Sequence[set[str]]) -> bool:
    """Return True if archives are classes, False if their folders are. Raises AmbiguousClassesError."""
    # E.g. part0, part1; also n01440764.
    is_numbered = len({re.sub("[0-9]+", "", stem) for stem in stems}) == 1
    counts = Counter(name for classes in names for name in classes)
    shared = [name for name, count in counts.items() if count > 1]
    if all(len(classes) == 1 for classes in names):
        if len(set().union(*names)) == 1:
            return True
        if all(stem.startswith(name) for stem, classes in zip(stems, names) for name in classes):
            return False  # e.g. ant.tar with ant/, or ant-0.tar and ant-1.tar with ant/
        if not shared:
            return not is_numbered
    if shared and not is_numbered:
        index = next(i for i, classes in enumerate(names) if shared[0] in classes)
        reason = (
            f"the archives ({stems[index]}, …) or the folders in them ({shared[0]}, …, in several of them)"
        )
        advice = "store the images of a class archive in no folder, or number the archives of many classes"
        raise AmbiguousClassesError(f"the classes may be {reason}; {advice}")
    return False
