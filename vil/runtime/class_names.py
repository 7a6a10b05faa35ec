"""Match the classes of a data set to the logits of a model."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo

from vil.errors import UserError

_HINT = "; --match_classes position takes class k for row k"


def check_has_classes(num_classes: object) -> None:
    """Raise UserError for a model without classes: its output is features, which must not count as logits."""
    if num_classes == 0:
        reason = "the model has no classifier (0 classes): its output is features, not classes"
        raise UserError("model.num_classes", reason)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes, in the order of their indices."""
    return tuple(ImageNetInfo().label_names())


@cache
def imagenet_22k_classes() -> tuple[str, ...]:
    """Return the WordNet ids of the 21,841 classes of ImageNet-22K (2011), sorted.

    They include ImageNet's 1,000 classes but n04399382, teddy bear.
    """
    return tuple(ImageNetInfo("imagenet22k").label_names())


def find_rows(
    names: Sequence[str], trained_names: Sequence[str] | None, num_rows: int
) -> tuple[dict[int, int], str]:
    """Find the rows of a head for classes to train on, by name.

    Numbers are no names: class 3 of one data set has nothing in common with class 3 of another. Except for
    ImageNet: a head of 1,000 rows without names is ImageNet's, in the order of the challenge, one of 21,841
    rows is ImageNet-22K's, and the numbers 0 to 999 are the indices of ImageNet's classes.

    Args:
        names: classes of the data, in the order of its targets.
        trained_names: classes of the weights, in the order of the rows; None if unknown.
        num_rows: number of rows.

    Returns:
        Index in `names` → row, for classes that have one, and the reason if no class has.
    """
    imagenet = imagenet_classes()
    if trained_names is None and num_rows == len(imagenet):
        trained_names = imagenet
    elif trained_names is None and num_rows == len(imagenet_22k_classes()):
        trained_names = imagenet_22k_classes()
    trained = _imagenet_names(list(map(normal_form, (trained_names or ())[:num_rows])))
    if _are_all_digits(trained):  # also if there are none
        return {}, f"the weights do not name their {num_rows:,} classes"
    names = list(map(normal_form, names))
    if set(trained) == set(imagenet):
        names = _imagenet_names(names)
    if _are_all_digits(names):
        return {}, f"the data does not name its {len(names):,} classes"
    rows = {name: row for row, name in reversed(list(enumerate(trained)))}
    found = {index: rows[name] for index, name in enumerate(names) if name in rows}
    return found, "" if found else "the weights have none of them"


def match_classes(
    names: Sequence[str],
    trained_names: Sequence[str] | None,
    num_logits: int | None,
    by_position: bool = False,
    hint: str = _HINT,
) -> list[int] | None:
    """Return the index of each class's logit, found by the names of the classes.

    A data set with a subset of the model's classes, such as ImageNet-A or -R, is evaluated with the logits of
    this subset alone, as in the papers of these data sets. ImageNet-V2 names its folders by class index.
    Names are compared in Unicode's normal form NFC, since file systems store different forms.

    Args:
        names: classes of the data, in the order of its targets.
        trained_names: classes of the model, in the order of its logits; None if unknown. A model with 1,000
            classes is then assumed to be one of ImageNet if any of `names` is a class of ImageNet.
        num_logits: number of logits.
        by_position: match class k with logit k if names cannot be used.
        hint: end of an error that `by_position` may avoid.

    Returns:
        One index per name; None if the targets are the indices.

    Raises:
        UserError: names and logits do not match, there are no names to match by, or the model has no logits.
    """
    check_has_classes(num_logits)
    names = _normalize(names, "the data has")
    imagenet = imagenet_classes()
    is_numbered = _are_numbers(names, 1000)
    if trained_names is None and num_logits == len(imagenet) and (is_numbered or set(names) & set(imagenet)):
        trained_names = imagenet
    if trained_names is None:
        if by_position or num_logits is None:
            return _match_by_position(names, num_logits)
        if _are_numbers(names, num_logits):
            numbers = [int(name) for name in names]
            return None if numbers == list(range(num_logits)) else numbers
        reason = f"no class names to find the row of the head for {names[0]!r}{hint}"
        raise UserError("data.source", reason)
    trained_names = _normalize(trained_names, "the checkpoint was trained on")
    if names == trained_names:
        return None
    indices = {name: index for index, name in enumerate(trained_names)}
    if trained_names == imagenet and is_numbered:
        return [int(name) for name in names]
    unknown = [name for name in names if name not in indices]
    moved = [index for index, name in enumerate(names) if indices.get(name, index) != index]
    if not unknown and len(names) < len(trained_names):
        return [indices[name] for name in names]
    if unknown and by_position and not moved:
        return _match_by_position(names, len(trained_names))
    if unknown:
        raise UserError("data.source", _unknown_classes(names, unknown, trained_names, hint))
    data, trained = names[moved[0]], trained_names[moved[0]]
    reason = f"class {moved[0]} is {data!r} in the data, {trained!r} in the checkpoint"
    raise UserError("data.source", f"the classes are in another order: {reason}")


def _unknown_classes(
    names: Sequence[str], unknown: Sequence[str], trained_names: Sequence[str], hint: str
) -> str:
    """Return the reason why a data set with unknown classes is refused."""
    if len(unknown) == len(names):
        reason = f"the checkpoint was trained on none of its classes ({names[0]!r}, ...)"
        return f"{reason} but on {trained_names[0]!r}, ...{hint}"
    close = difflib.get_close_matches(unknown[0], trained_names, n=1)
    suggestion = f"; did you mean {close[0]!r}?" if close else ""
    known = len(names) - len(unknown)
    reason = f"class {unknown[0]!r} is not among the {len(trained_names)} that the checkpoint was trained on"
    return f"{reason}, {known} of {len(names)} are{suggestion}"


def normal_form(name: str) -> str:
    """Return a name in Unicode's normal form NFC: file systems store different forms."""
    return unicodedata.normalize("NFC", name)


def _normalize(names: Sequence[str], owner: str) -> tuple[str, ...]:
    """Return names in NFC. Raise UserError if two of them become equal."""
    normalized = tuple(map(normal_form, names))
    if len(set(normalized)) < len(normalized):
        duplicate = next(name for index, name in enumerate(normalized) if name in normalized[:index])
        raise UserError("data.source", f"{owner} two classes named {duplicate!r}")
    return normalized


def _match_by_position(names: Sequence[str], num_logits: int | None) -> list[int] | None:
    if num_logits is None or len(names) == num_logits:
        return None
    if len(names) > num_logits:
        reason = f"the data has {len(names)} classes, the checkpoint was trained on {num_logits}"
        raise UserError("data.source", reason)
    return list(range(len(names)))


def _are_numbers(names: Sequence[str], count: int) -> bool:
    """Return True if every name is a number below `count`, without leading zeros."""
    return set(names) <= set(map(str, range(count)))


def _are_all_digits(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _imagenet_names(names: list[str]) -> list[str]:
    """Return the WordNet ids of names that are the numbers 0 to 999, in any order; others as they are."""
    imagenet = imagenet_classes()
    is_numbered = len(names) == len(imagenet) == len(set(names)) and _are_numbers(names, len(imagenet))
    return [imagenet[int(name)] for name in names] if is_numbered else names
