"""Which of a model's logits the classes of a data set are."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

from vil.config import ConfigError


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of their numbers."""
    return tuple(ImageNetInfo().label_names())


def find_rows(
    names: Sequence[str],
    trained: Sequence[str] | None,
    num_classes: int | None,
    by_position: bool = False,
) -> list[int] | None:
    """Return the rows of the head that classes belong to, found by their names.

    A data set may hold a part of the classes that a model knows, as ImageNet-A and -R do: it is evaluated
    with the logits of these classes alone, as their papers do. ImageNet-V2 names its folders by number. Names
    are compared in Unicode's normal form NFC, as file systems store them in several.

    Args:
        names: the classes of the data, in the order of its targets.
        trained: the classes of the model, in the order of the head's rows; None if nothing tells them. A
            model of 1,000 classes is then one of ImageNet, if any name is one of ImageNet's.
        num_classes: rows of the head.
        by_position: let class k be row k where the names do not say otherwise.

    Returns:
        One row per name; None if the targets are the rows themselves.

    Raises:
        ConfigError: targets and rows cannot mean the same, or nothing says that they do.
    """
    names = _normalised(names, "the data has")
    imagenet = imagenet_classes()
    if (
        trained is None
        and num_classes == len(imagenet)
        and (_are_numbers(names, 1000) or set(names) & set(imagenet))
    ):
        trained = imagenet
    if trained is None:
        if by_position or num_classes is None:
            return _positions(names, num_classes)
        if _are_numbers(names, num_classes):
            numbers = [int(name) for name in names]
            return None if numbers == list(range(num_classes)) else numbers
        raise ConfigError("data.source", f"nothing says which row of the head is {names[0]!r}; {_HINT}")
    trained = _normalised(trained, "the checkpoint was trained on")
    if names == trained:
        return None
    rows = {name: row for row, name in enumerate(trained)}
    unknown = [name for name in names if name not in rows]
    if trained == imagenet and _are_numbers(names, len(trained)):
        return [int(name) for name in names]
    moved = [position for position, name in enumerate(names) if rows.get(name, position) != position]
    if not unknown and len(names) < len(trained):
        return [rows[name] for name in names]
    if unknown and by_position and not moved:
        return _positions(names, len(trained))
    if len(unknown) == len(names):
        reason = f"none of its classes, as {names[0]!r}, is one that the checkpoint was trained on"
        raise ConfigError("data.source", f"{reason} (as {trained[0]!r}); {_HINT}")
    if unknown:
        close = difflib.get_close_matches(unknown[0], trained, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        reason = f"class {unknown[0]!r} is none of the {len(trained)} that the checkpoint was trained on"
        raise ConfigError("data.source", f"{reason}, {len(names) - len(unknown)} others are{hint}")
    position = moved[0]
    reason = f"class {position} is {names[position]!r} in the data, {trained[position]!r} in the checkpoint"
    raise ConfigError("data.source", f"the classes have another order: {reason}")


_HINT = "--match_classes position takes class k for row k"


def _normalised(names: Sequence[str], owner: str) -> tuple[str, ...]:
    """Return names in NFC. Raise ConfigError if two of them are the same then."""
    normalised = tuple(unicodedata.normalize("NFC", name) for name in names)
    if len(set(normalised)) < len(normalised):
        twice = next(name for index, name in enumerate(normalised) if name in normalised[:index])
        raise ConfigError("data.source", f"{owner} two classes that are both called {twice!r}")
    return normalised


def _positions(names: Sequence[str], num_classes: int | None) -> list[int] | None:
    if num_classes is None or len(names) == num_classes:
        return None
    if len(names) > num_classes:
        reason = f"the data has {len(names)} classes, the checkpoint was trained on {num_classes}"
        raise ConfigError("data.source", reason)
    return list(range(len(names)))


def _are_numbers(names: Sequence[str], count: int) -> bool:
    """Return True if every name is a number below `count`, without leading zeros."""
    return set(names) <= set(map(str, range(count)))
