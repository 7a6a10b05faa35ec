"""Classes of a data set matched to the logits of a model by their names."""

from __future__ import annotations

import pytest

from vil.errors import UserError
from vil.runtime.class_names import find_rows, imagenet_classes, match_classes

WNIDS = imagenet_classes()
HINT = "--match_classes position takes class k for row k"
ABC = ["apple", "banana", "pear"]


def test_a_subset_of_the_classes_by_name() -> None:
    assert match_classes(["b", "d"], ["a", "b", "c", "d"], 4) == [1, 3]
    assert match_classes(["a", "b"], ["b", "c", "a"], 3) == [2, 0]
    assert match_classes(["a", "b"], ["a", "b"], 2) is None


def test_imagenet_without_stored_names() -> None:
    assert WNIDS[:2] == ("n01440764", "n01443537")
    assert match_classes(["n01443537", "n15075141"], None, 1000) == [1, 999]
    assert match_classes(WNIDS, None, 1000) is None


@pytest.mark.parametrize("trained", [None, WNIDS])
def test_imagenet_v2_names_its_folders_by_index(trained: tuple[str, ...] | None) -> None:
    names = sorted(map(str, range(1000)))
    assert names[2] == "10"
    assert match_classes(names, trained, 1000) == [int(name) for name in names]


def test_without_stored_names_classes_are_matched_by_number_or_position() -> None:
    numbers = ["0", "1", "10", *"23456789"]
    assert match_classes(numbers, None, 11) == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    assert match_classes(["cat", "dog"], None, 2, by_position=True) is None
    assert match_classes(["cat", "dog"], None, 10, by_position=True) == [0, 1]
    for by_position in (False, True):  # of a model that does not tell how many logits it has
        assert match_classes(["cat", "dog"], None, None, by_position) is None


def test_names_of_weights_count_more_than_their_number() -> None:
    for num_rows in (1000, 21_841):  # as many as ImageNet and ImageNet-22K have
        names = [f"class {index}" for index in range(num_rows)]
        assert find_rows(("class 7", "new"), names, num_rows) == ({0: 7}, "")


def test_position_does_not_override_matching_names() -> None:
    assert match_classes(["x", "y"], ["a", "b"], 2, by_position=True) is None
    assert match_classes(["x", "b"], ["a", "b"], 2, by_position=True) is None
    for trained in (None, WNIDS):
        with pytest.raises(UserError, match="class 'n99999999' is not among the 1000"):
            match_classes([*WNIDS[1:], "n99999999"], trained, 1000, by_position=True)


def test_names_are_compared_in_nfc() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert match_classes([decomposed, "tea"], [composed, "tea"], 2) is None
    assert match_classes([decomposed], ["tea", composed], 2) == [1]
    with pytest.raises(UserError) as caught:
        match_classes([composed, decomposed], ["tea", composed], 2)
    assert str(caught.value) == "data.source: the data has two classes named 'café'"


@pytest.mark.parametrize(
    ("names", "trained", "num_logits", "reason"),
    [
        (["cat", "dog"], None, 2, f"no class names to find the row of the head for 'cat'; {HINT}"),
        (["cat", "dog"], None, 1000, f"no class names to find the row of the head for 'cat'; {HINT}"),
        (["0", "1000"], None, 1000, f"no class names to find the row of the head for '0'; {HINT}"),
        (list(WNIDS[:2]), None, 10, f"no class names to find the row of the head for 'n01440764'; {HINT}"),
        (
            ["x", "y"],
            ["a", "b"],
            2,
            f"the checkpoint was trained on none of its classes ('x', ...) but on 'a', ...; {HINT}",
        ),
        (
            ["Banana", "apple", "pear"],
            ABC,
            3,
            "class 'Banana' is not among the 3 that the checkpoint was trained on, 2 of 3 are; did you mean "
            "'banana'?",
        ),
        (
            ["n00000000", *WNIDS[1:]],
            None,
            1000,
            "class 'n00000000' is not among the 1000 that the checkpoint was trained on, 999 of 1000 are; "
            "did you mean 'n04200800'?",
        ),
        (
            ["a", "b", "c"],
            ["b", "a"],
            2,
            "class 'c' is not among the 2 that the checkpoint was trained on, 2 of 3 are",
        ),
        (
            ["a", "b"],
            ["b", "a"],
            2,
            "the classes are in another order: class 0 is 'a' in the data, 'b' in the checkpoint",
        ),
    ],
)
def test_mismatches(names: list[str], trained: list[str] | None, num_logits: int, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        match_classes(names, trained, num_logits)
    assert str(caught.value) == f"data.source: {reason}"


def test_more_classes_than_logits() -> None:
    with pytest.raises(UserError) as caught:
        match_classes(["cat", "dog"], None, 1, by_position=True)
    assert str(caught.value) == "data.source: the data has 2 classes, the checkpoint was trained on 1"
