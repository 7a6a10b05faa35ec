"""Validation images that are held out of the training split: `data.val_fraction` and `data.val_list`."""

import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.loading import load
from helpers.sample_images import write_image

from data.sources import dataset_name, open_source
from tools.programs.write_ffcv import WriteOptions, describe
from vil.checkpoints.weights import Weights
from vil.config import DataConfig
from vil.errors import UserError

CLASSES = {"große Katze": 10, "猫 two": 5, "plain": 2}
HELD_OUT = [
    "große Katze/bild 2 é.png",
    "große Katze/bild 6 é.png",
    "plain/bild 0 é.png",
    "猫 two/bild 2 é.png",
]
"""Names of the validation images with seed 7 and a fraction of 0.2."""


@pytest.fixture
def root(tmp_path):
    """Make root/<class>/<image> without splits; names have spaces and characters beyond ASCII."""
    for class_name, count in CLASSES.items():
        for number in range(count):
            write_image(tmp_path / "images" / class_name / f"bild {number} é.png", number)
    return tmp_path / "images"


def names(data, split):
    source = open_source(data, split, 3)
    return {source.name(index) for index in range(len(source))}


def config(root, source="folder", **options):
    return DataConfig(source=source, root=str(root), **{"val_fraction": 0.2, **options})


def pack(root, kind, folder):
    """Pack the class folders into the files that a source reads."""
    files = sorted(path for path in root.rglob("*.png"))
    folder.mkdir()
    labels = {name: index for index, name in enumerate(sorted(CLASSES))}
    if kind == "zip":
        with zipfile.ZipFile(folder / "train.zip", "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(root))
        lines = [f"train.zip@/{path.relative_to(root)}\t{labels[path.parent.name]}\n" for path in files]
        (folder / "train_map.txt").write_text("".join(lines))
    elif kind == "tar":  # one archive per class: the paths in the archives are the same
        for name in CLASSES:
            with tarfile.open(folder / f"{name}.tar", "w") as archive:
                for path in (root / name).iterdir():
                    archive.add(path, path.name)
    else:
        with tarfile.open(folder / "shard-0.tar", "w") as archive:
            for number, path in enumerate(files):
                archive.add(path, f"{number}.png")
                (folder / "label").write_text(str(labels[path.parent.name]))
                archive.add(folder / "label", f"{number}.cls")
        (folder / "label").unlink()
    return folder


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "wds"])
def test_each_class_is_divided_and_no_image_is_in_both_splits(kind, root, tmp_path):
    folder = root if kind == "folder" else pack(root, kind, tmp_path / kind)
    data = config(folder, kind)
    train, val = open_source(data, "train", 3), open_source(data, "val", 3)
    assert train.class_names == val.class_names
    counts = dict(zip(train.class_names, np.bincount(val.targets, minlength=3).tolist()))
    if kind != "wds":  # whose classes are numbers
        assert counts == {"große Katze": 2, "猫 two": 1, "plain": 1}
    train_pixels, val_pixels = (
        [source.load(index)[0].tobytes() + bytes([target]) for index, target in enumerate(source.targets)]
        for source in (train, val)
    )
    assert len(train_pixels) == 13
    assert len(val_pixels) == 4
    assert not set(train_pixels) & set(val_pixels)


def test_the_same_seed_holds_out_the_same_images(root, tmp_path):
    val = names(config(root), "val")
    assert names(config(root, val_seed=1), "val") != val
    assert val < names(config(root, val_fraction=0.5), "val")
    other = tmp_path / "moved"
    (root.parent / "images").rename(other)
    assert names(config(other), "val") == val
    (other / "train").mkdir()
    for name in CLASSES:
        (other / name).rename(other / "train" / name)
    assert names(config(other), "val") == val  # root/train/<class> without a validation split


def test_the_images_of_a_seed_are_those_of_earlier_versions(root):
    """Two runs with the same options can be compared, whatever version trained them."""
    source = open_source(config(root, val_seed=7), "val", 3)
    assert [source.name(index) for index in range(len(source))] == HELD_OUT


def test_every_class_keeps_an_image_in_both_splits(root):
    for fraction, counts in ((0.01, [1, 1, 1]), (0.9, [9, 1, 4])):
        val = open_source(config(root, val_fraction=fraction), "val", 3)
        assert np.bincount(val.targets).tolist() == counts  # of 10, 2 and 5


def test_names_that_are_not_utf_8_are_held_out_and_recorded(root, tmp_path):
    os.rename(root / "plain" / "bild 0 é.png", os.fsencode(root / "plain") + b"/\xff.png")
    data = config(root, val_fraction=0.9, workers=0)
    start(data, tmp_path)
    recorded = (tmp_path / "split.txt").read_bytes().splitlines()
    assert recorded == [os.fsencode(name) for name in sorted(names(data, "val"))]
    as_list = config(root, val_fraction=None, val_list=str(tmp_path / "split.txt"))
    assert names(as_list, "val") == names(data, "val")


def test_a_split_that_cannot_be_recorded_ends_the_run(root, tmp_path):
    with pytest.raises(UserError) as error:
        load(config(root, workers=0), batch_size=2, is_new=True).write_split(tmp_path / "missing")
    path = tmp_path / "missing" / "split.txt"
    assert str(error.value) == f"output: {path} cannot be written: No such file or directory"


def test_images_are_held_out_of_the_training_folder(root):
    (root / "train").mkdir()
    for name in CLASSES:
        (root / name).rename(root / "train" / name)
    (root / "test" / "plain").mkdir(parents=True)  # is no class
    assert open_source(config(root), "train", 3).class_names == tuple(sorted(CLASSES))
    assert dataset_name(config(root)) == f"{root}, held out: 20 %"


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_validation_split_is_not_ignored(name, root):
    for split in ("train", name):
        for class_name in ("a", "b"):
            write_image(root / split / class_name / "0.png", 0)
            write_image(root / split / class_name / "1.png", 0)
    with pytest.raises(UserError) as error:
        open_source(config(root), "train", 3)
    assert str(error.value) == (
        f"data.val_fraction: {root / name} is a validation split; set data.val_fraction to null to use it"
    )


@pytest.mark.parametrize("kind", ["zip", "tar", "wds"])
def test_a_validation_archive_is_not_ignored(kind, root, tmp_path):
    folder = pack(root, kind, tmp_path / kind)
    existing = folder / {"zip": "val_map.txt", "tar": "val.tar", "wds": "val-0.tar"}[kind]
    existing.write_bytes(b"")
    with pytest.raises(UserError) as error:
        open_source(config(folder, kind), "train", 3)
    assert f"{existing} is a validation split" in str(error.value)


def test_what_cannot_be_divided_is_rejected(root):
    write_image(root / "single" / "0.png", 0)
    with pytest.raises(UserError) as error:
        open_source(config(root), "train", 3)
    assert str(error.value) == (
        "data.val_fraction: a class needs two images or more, one for each split; one image: single"
    )
    with pytest.raises(UserError) as error:
        open_source(DataConfig(val_fraction=0.5), "train", 3)
    assert str(error.value) == "data.val_fraction: is not supported for source digits"
    with pytest.raises(UserError, match=r"^data.val_list: cannot be combined with data.val_fraction$"):
        open_source(config(root, val_list="list.txt"), "train", 3)


def test_a_list_names_the_validation_images(root, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("plain/bild 0 é.png\n")
    data = config(root, val_fraction=None, val_list=str(path))
    assert names(data, "val") == {"plain/bild 0 é.png"}
    assert len(names(data, "train")) == sum(CLASSES.values()) - 1
    path.write_text("plain/9.png\n")
    with pytest.raises(UserError) as error:
        open_source(data, "val", 3)
    assert str(error.value) == (
        f"data.val_list: {path}, line 1: plain/9.png is not an image of the training split"
    )
    path.write_text("".join(f"{name}\n" for name in names(config(root, val_fraction=0.2), "train")))
    path.write_text(path.read_text() + "".join(f"{name}\n" for name in names(config(root), "val")))
    with pytest.raises(UserError) as error:
        open_source(data, "train", 3)
    assert str(error.value) == f"data.val_list: {path}: names all images; none are left for training"


def start(data, run, is_new=True):
    """Open the data of a run as train.py does; return the pixels of the validation images."""
    loaders = load(data, batch_size=2, output=run, is_new=is_new)
    if is_new:
        loaders.write_split(run)
    return {image.tobytes() for images, _ in loaders.validation for image in images.numpy()}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_run_records_its_split_and_keeps_it(kind, root, tmp_path):
    folder = root if kind == "folder" else pack(root, kind, tmp_path / kind)
    run = tmp_path / "run"
    run.mkdir()
    data = config(folder, kind, workers=0)
    first = start(data, run)
    split = (run / "split.txt").read_text()
    assert len(split.splitlines()) == 4
    if kind == "folder":
        assert set(split.splitlines()) == names(config(root), "val")
        for number in range(100, 130):  # of which some would be drawn before the old ones
            write_image(root / "plain" / f"{number}.png", number)
        assert len(names(config(root), "val")) > 4
    assert start(data, run, is_new=False) == first
    assert (run / "split.txt").read_text() == split
    as_list = config(folder, kind, val_fraction=None, val_list=str(run / "split.txt"))
    assert len(open_source(as_list, "val", 3)) == 4


def test_a_new_run_ignores_the_split_of_a_failed_start(root, tmp_path):
    start(config(root, workers=0), tmp_path)
    assert len((tmp_path / "split.txt").read_text().splitlines()) == 4
    start(config(root, val_fraction=0.5, workers=0), tmp_path)
    assert set((tmp_path / "split.txt").read_text().splitlines()) == names(
        config(root, val_fraction=0.5), "val"
    )


def test_names_in_another_normal_form_are_the_same(root, tmp_path):
    """macOS may unpack an archive with names in form NFD."""
    val = names(config(root), "val")
    (tmp_path / "list.txt").write_text("".join(f"{unicodedata.normalize('NFD', name)}\n" for name in val))
    for path in [*root.glob("*/*"), *root.glob("*")]:
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    moved = names(config(root), "val")
    assert {unicodedata.normalize("NFC", name) for name in moved} == val
    as_list = config(root, val_fraction=None, val_list=str(tmp_path / "list.txt"))
    assert names(as_list, "val") == moved


def test_a_test_folder_beside_the_classes_is_not_a_class(root):
    write_image(root / "Test" / "plain" / "0.png", 0)
    write_image(root / "Test" / "plain" / "1.png", 0)
    with pytest.raises(UserError) as error:
        open_source(config(root), "train", 3)
    assert str(error.value) == (
        f"data.root: {root}: folders named like splits beside the classes: Test; "
        "expected train/<class>/<images>"
    )


def test_a_name_with_a_line_break_is_rejected(root, tmp_path):
    for number in range(8):
        write_image(root / "plain" / f"x\n{number}.png", number)
    with pytest.raises(UserError, match="cannot be written to a list of images"):
        start(config(root, val_fraction=0.9, workers=0), tmp_path)
    assert not Path(tmp_path, "split.txt").exists()


def test_evaluation_and_report_use_the_images_of_the_run(tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoints" / "best.pt"
    path.parent.mkdir(parents=True)
    monkeypatch.chdir(path.parent)
    for stored in ({"val_fraction": 0.2, "val_list": None}, {"val_fraction": None, "val_list": "mine.txt"}):
        for name in ("best.pt", str(path)):
            weights = Weights(name, "run", "raw", {}, data={"source": "folder", **stored})
            (tmp_path / "run" / "split.txt").unlink(missing_ok=True)
            assert weights.data_with_split() == weights.data
            (tmp_path / "run" / "split.txt").write_text("a/0.png\n")
            assert weights.data_with_split() == {
                "source": "folder",
                "val_fraction": None,
                "val_list": str(tmp_path / "run" / "split.txt"),
            }


def test_files_of_ffcv_of_another_division_are_not_taken_for_this_one(root):
    options = WriteOptions(Path("out"), None, 0.0, 90, False)
    descriptions = [
        describe(data, options, "train", open_source(data, "train", 3))
        for data in (config(root), config(root, val_seed=1), config(root))
    ]
    assert descriptions[0] == descriptions[2] != descriptions[1]
