"""Sources: the fixed split of the digits, folders and their errors, data sets of timm."""

import hashlib
import pickle
import sys
import tarfile

import numpy as np
import pytest
from helpers.sample_images import write_image
from PIL import Image

from data.sources import SOURCES, dataset_name, open_source
from data.sources.digits import Digits, split_indices
from vil.config import DataConfig
from vil.errors import UserError

# --------------------------------------------------------------------------------------------- digits


def targets(source):
    return np.array([source.load(index)[1] for index in range(len(source))])


def test_digits_have_the_fixed_sizes_and_a_stratified_split():
    train, val = (open_source(DataConfig(), split, 1) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    held_out, kept = np.bincount(targets(val)), np.bincount(targets(train))
    assert len(held_out) == len(kept) == 10
    # a fifth of each class, to the image
    assert np.abs(held_out - (held_out + kept) / 5).max() <= 1
    assert train.class_names == tuple("0123456789")


def test_the_split_of_the_digits_never_changes():
    from sklearn.datasets import load_digits

    split = split_indices(load_digits().target)
    assert np.array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(1797))
    digest = hashlib.sha256(split["val"].astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("61dece40fd9adcea"), "published Top-1 figures belong to one split"


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_digits_are_the_enlarged_originals(in_chans, mode):
    from sklearn.datasets import load_digits

    digits = load_digits()
    index = split_indices(digits.target)["val"][17]
    image, target = open_source(DataConfig(), "val", in_chans).load(17)
    assert (image.size, image.mode, target) == ((32, 32), mode, digits.target[index])
    original = np.rint(digits.images[index] * 255 / 16).astype(np.uint8)
    again = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.abs(again - original).mean() < 16
    assert np.corrcoef(again.ravel(), original.ravel())[0, 1] > 0.98


def test_val_split_train_evaluates_on_the_training_digits():
    assert len(open_source(DataConfig(val_split="train"), "val", 1)) == 1437


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"root": "/datasets/imagenet"}, "data.root"),
        ({"download": True}, "data.download"),
        ({"val_split": "test"}, "data.val_split"),
    ],
)
def test_digits_reject_unsupported_options(options, key):
    with pytest.raises(UserError) as error:
        open_source(DataConfig(**options), "val", 1)
    assert error.value.location == key


# --------------------------------------------------------------------------------------------- folder


def error_of(data, split="train", in_chans=3):
    with pytest.raises(UserError) as error:
        open_source(data, split, in_chans)
    assert "\n" not in str(error.value)
    return error.value


def test_folder_has_sorted_classes_and_paths(folder_data, image_folder):
    source = open_source(folder_data, "train", 3)
    assert source.class_names == ("ant", "bear", "cat")
    assert targets(source).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.describe(5) == str(image_folder / "train/bear/1.png")
    image, target = source.load(9)  # cat/1 is gray on disk
    assert (image.mode, target) == ("RGB", 2)
    assert open_source(folder_data, "train", 1).load(0)[0].mode == "L"


def test_a_validation_folder_may_lack_classes_and_shares_the_indices(folder_data, image_folder, caplog):
    open_source(folder_data, "val", 3)
    assert caplog.messages == []
    (image_folder / "val/ant").rename(image_folder / "elsewhere")
    source = open_source(folder_data, "val", 3)
    assert source.class_names == ("ant", "bear", "cat")
    assert set(targets(source)) == {1, 2}
    assert caplog.messages == [f"{image_folder}, split val: 1 class has no validation images: ant"]


def test_a_validation_folder_alone_names_its_own_classes(folder_data, image_folder):
    (image_folder / "train").rename(image_folder / "elsewhere")
    assert open_source(folder_data, "val", 3).class_names == ("ant", "bear", "cat")
    assert len(open_source(folder_data, "val", 3)) == 6


def test_images_in_subfolders_have_the_class_and_hidden_folders_are_skipped(folder_data, image_folder):
    write_image(image_folder / "train/ant/more/deep.png", 7)
    (image_folder / "train/.thumbnails").mkdir()
    source = open_source(folder_data, "train", 3)
    assert (len(source), len(source.class_names)) == (13, 3)


def test_a_class_only_in_validation_is_an_error(folder_data, image_folder):
    write_image(image_folder / "val/dog/0.png", 1)
    error = error_of(folder_data, "val")
    assert error.location == "data.root"
    assert "dog" in error.reason
    assert str(image_folder / "val") in error.reason


def test_folder_errors_name_the_key_and_the_folder(tmp_path, image_folder):
    def data(root, **options):
        return DataConfig(source="folder", root=None if root is None else str(root), **options)

    assert error_of(data(None)).location == "data.root"
    missing = error_of(data(tmp_path / "nowhere"))
    assert missing.location == "data.root"
    assert str(tmp_path / "nowhere") in missing.reason
    misspelled = error_of(data(image_folder, train_split="training"))
    assert "no such folder" in misspelled.reason
    assert "train, val" in misspelled.reason  # what is there instead
    (tmp_path / "void/train").mkdir(parents=True)
    assert "empty" in error_of(data(tmp_path / "void")).reason
    write_image(tmp_path / "flat/train/0.png", 0)
    assert "no class folders" in error_of(data(tmp_path / "flat")).reason
    (image_folder / "train/zebra").mkdir()
    (image_folder / "train/zebra/notes.txt").write_text("no image")
    assert "zebra" in error_of(data(image_folder)).reason
    assert error_of(data(image_folder, download=True)).location == "data.download"


# ----------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("root", ["file/x", "nul\0", "l" * 300])
def test_a_root_that_cannot_be_a_folder(tmp_path, root, download):
    (tmp_path / "file").touch()
    for split in ("train", "val"):
        assert error_of(DataConfig(source="folder", root=str(tmp_path / root)), split).location == "data.root"
    error = error_of(DataConfig(source="torch/cifar10", root=str(tmp_path / root), download=download))
    assert error.location == "data.root"


def test_an_unknown_home_folder():
    assert error_of(DataConfig(source="folder", root="~nobody-of-this-name/x")).location == "data.root"


def test_unknown_sources_are_named_with_the_known_ones():
    error = error_of(DataConfig(source="cifar10"))
    assert error.location == "data.source"
    assert "'cifar10'" in error.reason
    assert "torch/..." in error.reason
    assert "folder" in error.reason


@pytest.mark.parametrize("source", ["wds/imagenet", "tfds/cifar10", "hfids/imagenet-1k"])
def test_streams_are_rejected(source):
    error = error_of(DataConfig(source=source, root="/"))
    assert error.location == "data.source"
    assert "stream" in error.reason


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("torch/cifar10", "torch/cifar10"),
        ("folder", "/datasets/a/val"),
        ("zip", "zip:/datasets/a/val"),
        ("tar", "tar:/datasets/a/val"),
        ("wds", "wds:/datasets/a/val"),
        ("ffcv", "ffcv:/datasets/a/val"),
    ],
)
def test_names_of_data_sets_in_results(source, name):
    assert dataset_name(DataConfig(source=source, root="/datasets//a/")) == name


@pytest.mark.parametrize("source", ["digits", "folder", "zip", "tar", "wds", "ffcv"])
def test_sources_without_download_reject_it(source):
    error = error_of(DataConfig(source=source, download=True))
    assert str(error) == (
        f"data.download: source {source} cannot be downloaded; supported by torch/..., hfds/..."
    )


def test_channels_other_than_one_and_three_are_rejected():
    assert error_of(DataConfig(), in_chans=4).location == "model.in_chans"


def test_torch_image_folder_reads_the_same_images_as_folder(folder_data, image_folder):
    ours = open_source(folder_data, "train", 3)
    timms = open_source(DataConfig(source="torch/image_folder", root=str(image_folder)), "train", 3)
    assert timms.class_names == ours.class_names
    assert len(timms) == len(ours)
    assert timms.describe(5) == ours.describe(5)
    for index in (0, 5, 11):
        (image, target), (other, other_target) = ours.load(index), timms.load(index)
        assert target == other_target
        assert np.array_equal(image, other)


def test_tar_reads_images_and_classes(image_folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("ant", "bear", "cat"):
                tar.add(image_folder / split / name, arcname=name)
    data = DataConfig(source="tar", root=str(tmp_path), train_split="train.tar", val_split="val.tar")
    source = open_source(data, "val", 1)
    assert source.class_names == ("ant", "bear", "cat")
    assert len(source) == 6
    image, target = source.load(5)
    assert (image.mode, target) == ("L", 2)
    assert source.describe(5).endswith("cat/1.png")


def write_cifar10(root, monkeypatch, per_batch=4):
    """The files of CIFAR-10's Python version with a few random images, and their checksums."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch():
        return {
            "data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, per_batch).tolist(),
        }

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", write(f"data_batch_{i}", batch())] for i in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", batch())]])
    meta = {"filename": "batches.meta", "key": "label_names"}
    monkeypatch.setattr(CIFAR10, "meta", {**meta, "md5": write("batches.meta", {"label_names": names})})
    return names


def test_torch_cifar10(tmp_path, monkeypatch):
    names = write_cifar10(tmp_path, monkeypatch)
    data = DataConfig(source="torch/cifar10", root=str(tmp_path), val_split="test")
    train, val = open_source(data, "train", 3), open_source(data, "val", 3)
    assert (len(train), len(val)) == (20, 4)
    assert train.class_names == val.class_names == tuple(names)
    image, target = train.load(3)
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert target in range(10)
    # with --data.download true, files that are there already are used as they are
    assert len(open_source(DataConfig(**{**vars(data), "download": True}), "train", 3)) == 20


def test_timm_errors_are_one_line_with_the_key(tmp_path, image_folder):
    missing = error_of(DataConfig(source="torch/cifar10", root=str(tmp_path / "nowhere")))
    assert missing.location == "data.root"
    assert "nowhere" in missing.reason
    empty = error_of(DataConfig(source="torch/cifar10", root=str(tmp_path)))
    assert empty.location == "data.root"
    assert "--data.download true" in empty.reason
    assert error_of(DataConfig(source="torch/cifar10")).location == "data.root"
    # timm would take a misspelled split for the test set, or for the root with all splits in it
    misspelled = error_of(DataConfig(source="torch/cifar10", root=str(tmp_path), train_split="trian"))
    assert misspelled.location == "data.train_split"
    unsplit = error_of(DataConfig(source="torch/image_folder", root=str(image_folder), train_split="all"))
    assert str(image_folder / "all") in unsplit.reason
    assert "nosuchset" in error_of(DataConfig(source="torch/nosuchset", root=str(tmp_path))).reason


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    error = error_of(DataConfig(source="hfds/imagenet-1k"))
    assert error.location == "data.source"
    assert "datasets" in error.reason


# ---------------------------------------------------------------------------------------------- classes


def test_training_images_of_one_class_are_rejected(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "ant/0.png", 0)
    data = DataConfig(source="folder", root=str(tmp_path))
    error = error_of(data)
    assert error.location == "data.root"
    assert error.reason.endswith("all 1 images are of one class, ant; training needs two classes or more")
    assert open_source(data, "val", 3).class_names == ("ant",)  # a part of a model's classes may be evaluated


def test_classes_that_are_splits_are_rejected(image_folder):
    (image_folder / "both").mkdir()
    for split in ("train", "val"):
        (image_folder / split).rename(image_folder / "both" / split)
    error = error_of(DataConfig(source="folder", root=str(image_folder), val_split="both"), "val")
    assert "the classes are named like splits (train, val)" in error.reason


@pytest.mark.parametrize(("split", "target"), [("train", -1), ("val", -1), ("val", 10)])
def test_images_without_a_class_are_rejected(split, target, monkeypatch):
    """Test splits of Hugging Face are published with -1 instead of labels."""

    class Unlabeled(Digits):
        @classmethod
        def open(cls, data, split, mode):
            source = Digits.open(DataConfig(), split, mode)
            source.targets[5] = target
            return source

    monkeypatch.setitem(SOURCES, "hfds/", Unlabeled)
    error = error_of(DataConfig(source="hfds/digits"), split, 1)
    assert error.location == "data.source"
    assert f"has the class {target}, expected 0 to 9" in error.reason


def test_classes_that_differ_in_the_form_of_unicode_alone_are_rejected(tmp_path):
    """Evaluation compares names in one form, and could not tell them apart."""
    for number, name in enumerate(("\u00e9", "e\u0301", "ant")):
        write_image(tmp_path / "train" / name / "0.png", number)
    error = error_of(DataConfig(source="folder", root=str(tmp_path)))
    assert error.location == "data.root"
    reason = "two classes are named 'é', in different forms of Unicode; rename one of them"
    assert error.reason.endswith(reason)
