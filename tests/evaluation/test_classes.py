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
    assert find_rows(["n01443537"], None, 10) is None
    assert find_rows(["cat", "dog"], None, 1000) is None


@pytest.mark.parametrize("trained", [None, WNIDS])
def test_imagenet_v2_names_its_folders_by_number(trained: tuple[str, ...] | None) -> None:
    names = sorted(map(str, range(1000)))
    assert names[2] == "10"
    rows = find_rows(names, trained, 1000)
    assert rows == [int(name) for name in names]


def test_what_cannot_mean_the_same_is_refused() -> None:
    with pytest.raises(ConfigError, match="the data has 2 classes, the checkpoint was trained on 3, without"):
        find_rows(["a", "x"], ["a", "b", "c"], 3)
    with pytest.raises(ConfigError, match="another order: class 0 is 'a' in the data, 'b' in the checkpoint"):
        find_rows(["a", "b"], ["b", "a"], 2)
    with pytest.raises(ConfigError, match="the data has 3 classes, the checkpoint was trained on 2"):
        find_rows(["a", "b", "c"], ["b", "a"], 2)
