import numpy as np

from data.fingerprint import fingerprint_sources
from data.sources import Source


class Listed(Source):
    def __init__(
        self, names: list[str], targets: list[int], class_names: tuple[str, ...] = ("a", "b")
    ) -> None:
        self.names, self.targets, self.class_names = names, np.array(targets), class_names

    def read(self, index: int):
        raise NotImplementedError

    def describe(self, index: int) -> str:
        return self.names[index]


def describe(names=("x", "y"), targets=(0, 1), root=None, classes=("a", "b"), has_digests=True):
    source = Listed(list(names), list(targets), classes)
    return fingerprint_sources({"training images": source}, root, has_digests)


def test_numbers_names_classes_and_class_names_are_compared():
    own = describe()
    assert own["training images"] == "2"
    assert describe(has_digests=False) == {"training images": "2"}
    noun = "training images (names or classes)"
    assert {key for key in own if own[key] != describe(targets=(1, 0))[key]} == {noun}
    assert {key for key in own if own[key] != describe(names=("x", "z"))[key]} == {noun}
    assert {key for key in own if own[key] != describe(names=("y", "x"))[key]} == {noun}
    assert {key for key in own if own[key] != describe(classes=("a", "c"))[key]} == {"class names"}
    assert describe() == own


def test_the_folder_of_the_data_may_differ():
    one = describe(names=("image 0 of /data/a/train.beton", "image 1 of /data/a/train.beton"), root="/data/a")
    two = describe(names=("image 0 of /b/train.beton", "image 1 of /b/train.beton"), root="/b/")
    assert one == two


def test_many_names_are_digested_in_parts(monkeypatch):
    names, targets = [str(n) for n in range(10)], [n % 2 for n in range(10)]
    monkeypatch.setattr("data.fingerprint._CHUNK", 4)
    own = describe(names, targets)
    names[9] = "x"
    assert describe(names, targets) != own
