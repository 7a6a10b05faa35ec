"""Classes of a data set and rows of a head, found by their names."""

from __future__ import annotations

import pytest

from vil.config import ConfigError
from vil.evaluation.classes import find_rows, imagenet_classes

WNIDS = imagenet_classes()


def test_a_part_of_the_classes_by_name() -> None:
    assert find_rows(["b", "d"], ["a", "b", "c", "d"], 4) == [1, 3]
    assert find_rows(["a", "b"], ["b", "c", "a"], 3) == [2, 0]
    assert find_rows(["a", "b"], ["a", "b"], 2) is None


def test_imagenet_without_stored_names() -> None:
    assert WNIDS[:2] == ("n01440764", "n01443537")
    assert find_rows(["n01443537", "n15075141"], None, 1000) == [1, 999]
    assert find_rows(WNIDS, None, 1000) is None


def test_rows_without_names_are_matched_by_number_or_on_request() -> None:
    """A published checkpoint does not tell its classes."""
    assert find_rows(["0", "1", "10", *"23456789"], None, 11) == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    for num_classes in (2, 10, 1000):
        with pytest.raises(ConfigError, match="nothing says which row of the head is 'cat'; --match_classes"):
            find_rows(["cat", "dog"], None, num_classes)
    assert find_rows(["cat", "dog"], None, 2, by_position=True) is None
    assert find_rows(["cat", "dog"], None, 10, by_position=True) == [0, 1]
    with pytest.raises(ConfigError, match="the data has 2 classes, the checkpoint was trained on 1"):
        find_rows(["cat", "dog"], None, 1, by_position=True)


def test_as_many_classes_of_other_names_are_refused() -> None:
    """Equal counts do not make equal meanings."""
    with pytest.raises(
        ConfigError, match="none of its classes, as 'x', is one that the checkpoint was trained"
    ):
        find_rows(["x", "y"], ["a", "b"], 2)
    assert find_rows(["x", "y"], ["a", "b"], 2, by_position=True) is None
    with pytest.raises(ConfigError, match=r"class 'Banana' is none of the 3 .*; did you mean 'banana'\\?"):
        find_rows(["Banana", "apple", "pear"], ["apple", "banana", "pear"], 3)
    renamed = ["n00000000", *WNIDS[1:]]
    for trained in (None, WNIDS):
        with pytest.raises(ConfigError, match="class 'n00000000' is none of the 1000"):
            find_rows(renamed, trained, 1000)
        with pytest.raises(
            ConfigError, match="class 'n99999999' is none of"
        ):  # every other one stands in a wrong row
            find_rows([*WNIDS[1:], "n99999999"], trained, 1000, by_position=True)
    assert find_rows(["x", "b"], ["a", "b"], 2, by_position=True) is None


def test_unicode_forms_of_one_name() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert find_rows([decomposed, "tea"], [composed, "tea"], 2) is None
    assert find_rows([decomposed], ["tea", composed], 2) == [1]
    with pytest.raises(ConfigError, match="two classes that are both called"):
        find_rows([composed, decomposed], ["tea", composed], 2)


@pytest.mark.parametrize("trained", [None, WNIDS])
def test_imagenet_v2_names_its_folders_by_number(trained: tuple[str, ...] | None) -> None:
    names = sorted(map(str, range(1000)))
    assert names[2] == "10"
    rows = find_rows(names, trained, 1000)
    assert rows == [int(name) for name in names]


def test_what_cannot_mean_the_same_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="class 'x' is none of the 3 that the checkpoint was trained on, 1 others are"
    ):
        find_rows(["a", "x"], ["a", "b", "c"], 3)
    with pytest.raises(ConfigError, match="another order: class 0 is 'a' in the data, 'b' in the checkpoint"):
        find_rows(["a", "b"], ["b", "a"], 2)
    with pytest.raises(
        ConfigError, match="class 'c' is none of the 2 that the checkpoint was trained on, 2 others are"
    ):
        find_rows(["a", "b", "c"], ["b", "a"], 2)
