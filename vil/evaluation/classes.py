"""Which of a model's logits the classes of a data set are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

from vil.config import ConfigError


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of their numbers."""
    return tuple(ImageNetInfo().label_names())


def find_rows(
    names: Sequence[str], trained: Sequence[str] | None, num_classes: int | None
) -> list[int] | None:
    """The rows of the head that classes belong to, found by their names.

    A data set may hold a part of the classes that a model knows, as ImageNet-A and -R do: it is evaluated
    with the logits of these classes alone, as their papers do. ImageNet-V2 names its folders by number.

    Args:
        names: the classes of the data, in the order of its targets.
        trained: the classes of the model, in the order of the head's rows; None where nothing says them. A
            model of 1,000 classes is then one of ImageNet, if the names are ImageNet's.
        num_classes: rows of the head.

    Returns:
        One row per name; None where the targets are the rows themselves.

    Raises:
        ConfigError: targets and rows cannot mean the same.
    """
    names = tuple(names)
    if trained is None:
        known = imagenet_classes()
        if num_classes != len(known) or not (_are_numbers(names, len(known)) or set(names) <= set(known)):
            return None
        trained = known
    trained = tuple(trained)
    if names == trained:
        return None
    rows = {name: row for row, name in enumerate(trained)}
    if set(names) < set(trained):
        return [rows[name] for name in names]
    if trained == imagenet_classes() and _are_numbers(names, len(trained)):
        return [int(name) for name in names]
    if len(names) != len(trained):
        unknown = next(name for name in names if name not in rows) if set(names) - set(rows) else None
        reason = f"the data has {len(names)} classes, the checkpoint was trained on {len(trained)}"
        raise ConfigError("data.source", f"{reason}, without {unknown!r}" if unknown else reason)
    if set(names) == set(trained):
        place = next(i for i, pair in enumerate(zip(names, trained)) if pair[0] != pair[1])
        reason = f"class {place} is {names[place]!r} in the data, {trained[place]!r} in the checkpoint"
        raise ConfigError("data.source", f"the classes have another order: {reason}")
    return None


def _are_numbers(names: Sequence[str], most: int) -> bool:
    """Whether every name is a number below `most`, without leading zeros."""
    return set(names) <= set(map(str, range(most)))
