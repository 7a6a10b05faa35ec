"""Tar archives and WebDataset shards: the folder's images in any order, disjoint shares, one-line errors."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
import torch
from helpers.loading import load, load_validation

from data.sources import open_source
from vil.config import DataConfig
from vil.errors import UserError

CLASSES = ("ant", "bear", "cat")


def write_shards(root, images, split, per_shard=5, label=str):
    """`split`-0000.tar, ...: samples 000000.png and 000000.cls, classes mixed."""
    root.mkdir(exist_ok=True)
    paths = sorted((images / split).rglob("*.png"), key=lambda path: (path.name, path))
    for first in range(0, len(paths), per_shard):
        with tarfile.open(root / f"{split}-{first // per_shard:04}.tar", "w") as tar:
            for number, path in enumerate(paths[first : first + per_shard], start=first):
                tar.add(path, f"{number:06}.png")
                content = label(CLASSES.index(path.parent.name)).encode()
                info = tarfile.TarInfo(f"{number:06}.cls")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def class_tars(image_folder, tmp_path):
    """root/train/<class>.tar with flat names, as ImageNet's own; root/val.tar with folders."""
    root = tmp_path / "tars"
    (root / "train").mkdir(parents=True)
    for name in CLASSES:
        with tarfile.open(root / f"train/{name}.tar", "w") as tar:
            for path in sorted((image_folder / "train" / name).iterdir()):
                tar.add(path, path.name)
    with tarfile.open(root / "val.tar", "w") as tar:
        tar.add(image_folder / "val", "val")
    return DataConfig(source="tar", root=str(root), workers=0)


@pytest.fixture
def shards(image_folder, tmp_path):
    for split in ("train", "val"):
        write_shards(tmp_path / "wds", image_folder, split)
    return DataConfig(source="wds", root=str(tmp_path / "wds"), workers=0)


def refusal(data, split="train"):
    with pytest.raises(UserError) as error:
        open_source(data, split, 3)
    assert "\n" not in str(error.value)
    return error.value.reason


def contents(source):
    return sorted((np.asarray(source.load(i)[0]).tobytes(), source.load(i)[1]) for i in range(len(source)))


@pytest.mark.parametrize("kind", ["class_tars", "shards"])
def test_archives_have_the_images_of_the_folder(kind, folder_data, request):
    data = request.getfixturevalue(kind)
    for split in ("train", "val"):
        source, folder = open_source(data, split, 3), open_source(folder_data, split, 3)
        assert contents(source) == contents(folder)
        assert source.class_names == (CLASSES if kind == "class_tars" else ("0", "1", "2"))


def test_a_folder_of_class_archives_has_the_order_of_the_folder(class_tars, folder_data):
    source, folder = open_source(class_tars, "train", 3), open_source(folder_data, "train", 3)
    assert source.targets.tolist() == folder.targets.tolist()
    assert source.describe(5).endswith("train/bear.tar/1.png")


@pytest.mark.parametrize("kind", ["class_tars", "shards"])
def test_batches_are_the_same_for_any_workers_and_after_a_resume(kind, request):
    data = request.getfixturevalue(kind)
    options = {"image_size": 16, "batch_size": 4}

    def batches(workers, start=0):
        loaders = load(dataclasses.replace(data, workers=workers), **options)
        return list(loaders.train.epoch(1, start))

    first = batches(0)
    for others, whole in ((batches(2), first), (batches(0, 1), first[1:])):
        for (images, targets), (expected, labels) in zip(others, whole, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(targets, labels)


def test_ranks_share_the_shards_without_overlap_and_have_a_length(shards):
    shards.val_split = "train"
    parts = [
        load_validation(shards, image_size=16, batch_size=3, rank=rank, world_size=3).loader
        for rank in range(3)
    ]
    assert [part.num_images for part in parts] == [12] * 3
    images = torch.cat([images for part in parts for images, _ in part])
    assert len(torch.unique(images, dim=0)) == 12


def test_shards_by_their_patterns(shards):
    for pattern in ("train-{0000..0002}.tar", "train-*.tar", "train"):
        assert len(open_source(dataclasses.replace(shards, train_split=pattern), "train", 3)) == 12
    assert (
        len(open_source(dataclasses.replace(shards, train_split="train-{0001..0001}.tar"), "train", 3)) == 5
    )
    assert "train-0003.tar" in refusal(dataclasses.replace(shards, train_split="train-{0000..0003}.tar"))
    assert "rising" in refusal(dataclasses.replace(shards, train_split="train-{3..1}.tar"))
    assert "contains no shards test" in refusal(dataclasses.replace(shards, val_split="test"), "val")


def test_invalid_labels_are_rejected(shards, image_folder, tmp_path):
    write_shards(tmp_path / "wds", image_folder, "train", label=lambda target: f"class {target}")
    assert "000000.cls is not a class index" in refusal(shards)
    with tarfile.open(tmp_path / "wds/train-0000.tar", "w") as tar:
        tar.add(image_folder / "train/ant/0.png", "000000.png")
    assert "images without a .cls" in refusal(shards)


def test_other_files_are_rejected(class_tars, tmp_path):
    root = tmp_path / "tars"
    assert "contains neither test.tar" in refusal(dataclasses.replace(class_tars, val_split="test"), "val")
    with tarfile.open(root / "val.tar", "w") as tar:
        tar.add(root / "train/ant.tar", "dog/0.png")
    assert "classes that the training split lacks: dog" in refusal(class_tars, "val")
    for content in (b"", b"no tar" * 400):
        (root / "val.tar").write_bytes(content)
        assert "cannot be read as an uncompressed tar" in refusal(class_tars, "val")


def test_members_that_lead_outside_or_are_links_are_skipped(class_tars, image_folder, tmp_path):
    image_path = image_folder / "val/ant/0.png"
    with tarfile.open(tmp_path / "tars/val.tar", "w") as tar:
        tar.add(image_path, "ant/0.png")
        tar.add(image_path, "../ant/1.png")
        link = tarfile.TarInfo("ant/2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(class_tars, "val", 3)
    assert [source.name(index) for index in range(len(source))] == ["ant/0.png"]


def test_an_archive_that_ends_early_has_unreadable_images(class_tars, tmp_path):
    source = open_source(class_tars, "train", 3)
    path = tmp_path / "tars/train/cat.tar"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(OSError, match="archive ends before"):
        source.load(8)


# --------------------------------------------------------------------------------- damaged archives, links

BLOCK = 512


def image_bytes(image_folder):
    return (image_folder / "train/ant/0.png").read_bytes()


def write_tar(path, names, content, mode="w"):
    """Images of one content under these names, in the ustar format: one block of header each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


NAMES = [f"{name}/{number}.png" for name in CLASSES for number in range(4)]


def damage(path, how, stride):
    content = bytearray(path.read_bytes())
    offset = 5 * stride  # the header of the sixth member
    if how == "bad header":
        content[offset + 100] ^= 1
    elif how == "cut at a member":
        del content[offset:]
    elif how == "cut in a member":
        del content[offset + BLOCK + 1 :]
    elif how == "cut in a header":
        del content[offset + 100 :]
    elif how == "zeroed block":
        content[offset : offset + BLOCK] = bytes(BLOCK)
    elif how == "concatenated":
        content += bytes(content)
    path.write_bytes(content)
    return offset


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("bad header", "damaged: no file header at byte {offset}"),
        ("cut at a member", "truncated: it ends at byte {offset} without an end mark"),
        ("cut in a member", "unexpected end of data"),
        ("cut in a header", "damaged: no file header at byte {offset}"),
        ("zeroed block", "its end mark at byte {offset} is followed by further content"),
        ("concatenated", "is followed by further content, as of archives joined by cat"),
    ],
)
@pytest.mark.parametrize("kind", ["tar", "wds"])
def test_damaged_archives_are_rejected(kind, how, reason, image_folder, tmp_path):
    content = image_bytes(image_folder)
    path = tmp_path / "tars/train.tar"
    write_tar(path, NAMES, content)
    offset = damage(path, how, BLOCK + -(-len(content) // BLOCK) * BLOCK)
    message = refusal(DataConfig(source=kind, root=str(path.parent)))
    assert message.startswith(f"{path}: cannot be read as an uncompressed tar: ")
    assert reason.format(offset=f"{offset:,}") in message


def test_zeros_after_the_end_are_accepted(image_folder, tmp_path):
    path = tmp_path / "tars/train.tar"
    write_tar(path, NAMES, image_bytes(image_folder))
    with open(path, "ab") as file:
        file.write(bytes(3 << 20))
    assert len(open_source(DataConfig(source="tar", root=str(path.parent)), "train", 3)) == 12


def test_hard_and_symbolic_links_are_images_as_after_unpacking(image_folder, tmp_path):
    content = image_bytes(image_folder)
    path = tmp_path / "tars/train.tar"
    write_tar(path, ["ant/0.png", "bear/0.png"], content)
    other = (image_folder / "train/bear/0.png").read_bytes()
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (
            ("ant/1.png", tarfile.LNKTYPE, "ant/0.png"),
            ("bear/1.png", tarfile.SYMTYPE, "../ant/0.png"),
            ("bear/2.png", tarfile.SYMTYPE, "1.png"),  # a link to a link
            ("bear/3.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("bear/4.png", tarfile.SYMTYPE, "4.png"),
            ("bear/5.png", tarfile.LNKTYPE, "bear/9.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    write_tar(path, ["ant/0.png"], other, "a")  # once more: the last one counts, but not for the hard link
    source = open_source(DataConfig(source="tar", root=str(path.parent)), "train", 3)
    found = {source.name(index): source.read(index)._content for index in range(len(source))}
    assert found == {
        "ant/0.png": other,
        "ant/1.png": content,
        "bear/0.png": content,
        "bear/1.png": other,
        "bear/2.png": other,
    }


# ------------------------------------------------------------------------------------ classes of archives


def archive_classes(tmp_path, split="train", **archives):
    """Classes and counts of a split of these archives: names of images, under the archive's name."""
    image_path = tmp_path / "0.png"
    image_path.parent.mkdir(exist_ok=True)
    image_path.write_bytes(b"an image")
    for name, names in archives.items():
        write_tar(tmp_path / "tars" / split / f"{name}.tar", names, b"an image")
    source = open_source(DataConfig(source="tar", root=str(tmp_path / "tars")), split, 3)
    return source.class_names, np.bincount(source.targets).tolist()


@pytest.mark.parametrize("prefix", ["", "train/", "./", "data/tiny/train/"])
@pytest.mark.parametrize("inner", ["", "images/", "more/images/"])
def test_the_classes_are_those_of_the_folder_source(prefix, inner, tmp_path):
    names = [f"{prefix}{name}/{inner}{number}.png" for name in CLASSES for number in range(2)]
    write_tar(tmp_path / "tars/train.tar", names, b"an image")
    source = open_source(DataConfig(source="tar", root=str(tmp_path / "tars")), "train", 3)
    assert source.class_names == CLASSES
    assert source.targets.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("archives", "classes"),
    [
        ({"cat": ["images/0.png"], "dog": ["images/0.png", "images/1.png"]}, ("cat", "dog")),
        ({"n01": ["images/0.png"], "n02": ["images/0.png"]}, ("n01", "n02")),
        ({"cat": ["0.png"], "dog": ["pictures/0.png"]}, ("cat", "dog")),
        ({"cat": ["cat/0.png"], "dog": ["dog/more/0.png"]}, ("cat", "dog")),
        ({"cat-0": ["cat/0.png"], "cat-1": ["cat/1.png"], "dog-0": ["dog/0.png"]}, ("cat", "dog")),
        ({"part0": ["cat/0.png", "dog/0.png"], "part1": ["cat/1.png", "eel/1.png"]}, ("cat", "dog", "eel")),
        (
            {"part0": ["train/cat/0.png"], "part1": ["train/cat/1.png"], "part2": ["train/dog/1.png"]},
            ("cat", "dog"),
        ),
        ({"cat": ["0.png"], "others": ["dog/0.png", "eel/0.png"]}, ("cat", "dog", "eel")),
    ],
)
def test_archives_of_one_class_and_of_many(archives, classes, tmp_path):
    assert archive_classes(tmp_path, **archives)[0] == classes


@pytest.mark.parametrize(
    "archives",
    [
        {"cat": ["indoor/0.png", "outdoor/0.png"], "dog": ["indoor/0.png", "outdoor/0.png"]},
        {"cat": ["images/0.png"], "dog": ["images/0.png"], "eel": ["photos/0.png"]},
    ],
)
def test_classes_that_may_be_archives_or_folders_are_rejected(archives, tmp_path):
    with pytest.raises(UserError, match=r"the classes may be the archives \(cat, …\) or the folders"):
        archive_classes(tmp_path, **archives)


def test_validation_archives_have_the_classes_of_training(tmp_path):
    archive_classes(tmp_path, ant=["images/0.png"], bear=["images/0.png"], cat=["images/0.png"])
    found = archive_classes(tmp_path, "val", bear=["a/0.png", "b/1.png"], cat=["a/0.png"])
    assert found == (CLASSES, [0, 2, 1])
    (tmp_path / "tars/val/bear.tar").unlink()
    (tmp_path / "tars/val/cat.tar").unlink()
    assert archive_classes(tmp_path, "val", all=["val/bear/0.png", "val/bear/more/1.png"]) == (
        CLASSES,
        [0, 2],
    )


def test_images_of_one_folder_are_the_outermost_class(tmp_path):
    assert archive_classes(tmp_path / "alone", "val", all=["val/ant/more/0.png"]) == (("ant",), [1])
    archive_classes(tmp_path, ant=["images/0.png"], images=["images/0.png"])
    assert archive_classes(tmp_path, "val", all=["val/ant/more/0.png"]) == (("ant", "images"), [1])
    # The outermost folder that is a class of training, although folders differ further in.
    names = ["ant/images/0.png", "ant/more/0.png"]
    (tmp_path / "tars/val/all.tar").unlink()
    assert archive_classes(tmp_path, "val", all=names) == (("ant", "images"), [2])


def test_images_outside_of_class_folders_are_skipped_and_logged(tmp_path, caplog):
    names = ["train/0.png", "train/ant/0.png", "train/bear/0.png"]
    assert archive_classes(tmp_path, all=names) == (("ant", "bear"), [1, 1])
    assert "1 file was skipped" in caplog.text
    assert "train/0.png" in caplog.text


def test_an_archive_of_all_splits_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"the classes are named like splits \(train, val\)"):
        archive_classes(tmp_path, all=["tiny/train/a/0.png", "tiny/train/b/0.png", "tiny/val/a/0.png"])


# ----------------------------------------------------------------------------------- samples of WebDataset


def shard_targets(tmp_path, *files):
    """Names and targets of a shard of these files; a content that is no bytes becomes text."""
    path = tmp_path / "wds/train-0.tar"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in (*files, ("z0.jpg", b""), ("z0.cls", 0), ("z1.jpg", b""), ("z1.cls", 1)):
            encoded = content if isinstance(content, bytes) else str(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(encoded)
            tar.addfile(info, io.BytesIO(encoded))
    source = open_source(DataConfig(source="wds", root=str(path.parent)), "train", 3)
    return {source.name(i): int(source.targets[i]) for i in range(len(source)) if source.name(i)[0] != "z"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("a.input.jpg", b""), ("a.cls", 1)], {"a.input.jpg": 1}),
        ([("a.AVIF", b""), ("a.CLS", 1)], {"a.AVIF": 1}),
        ([("a.JPG", b""), ("a.json", '{"label": 1, "width": 3}')], {"a.JPG": 1}),
        ([("a.jpg", b""), ("a.json", "1")], {"a.jpg": 1}),
        ([("a.jpg", b""), ("a.json", '{"cls": 1}')], {"a.jpg": 1}),
        ([("a.jpg", b""), ("a.json", '{"label": 0}'), ("a.cls", "\ufeff1\n")], {"a.jpg": 1}),
        ([("a.1.jpg", b""), ("a.1.cls", 1), ("a.2.jpg", b""), ("a.2.cls", 0)], {"a.1.jpg": 1, "a.2.jpg": 0}),
        ([("d/a.jpg", b""), ("d/a.cls", 1), ("d/a.txt", "a caption")], {"d/a.jpg": 1}),
    ],
)
def test_samples_of_one_image_and_one_class(files, expected, tmp_path):
    assert shard_targets(tmp_path, *files) == expected


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.jpg", b""), ("a.png", b""), ("a.cls", 1)], "sample a: 2 images under one key: a.jpg, a.png"),
        ([("a.jpg", b""), ("a.seg.png", b""), ("a.cls", 1)], "sample a: 2 images under one key"),
        ([("d/a.jpg", b""), ("d/a.cls", 1)] * 2, "sample d/a: 2 images under one key: d/a.jpg, d/a.jpg"),
        ([("a.jpg", b""), ("a.cls", 1), ("a.cls", 1)], "sample a: 2 classes under one key"),
        ([("a.1.jpg", b""), ("a.2.jpg", b""), ("a.cls", 1)], "sample a: 2 images under one key"),
        ([("a.heic", b""), ("a.cls", 1)], "sample a: a class without an image (a.cls, a.heic)"),
        ([("a.jpg", b"")], "sample a: images without a .cls or .json file: a.jpg"),
        ([("a.jpg", b""), ("a.json", '{"caption": "ant"}')], "a.json has no class: expected an integer"),
        ([("a.jpg", b""), ("a.json", '{"label": 1, "cls": 1}')], "a.json has no class"),
        ([("a.jpg", b""), ("a.json", "true")], "a.json has no class"),
        ([("a.jpg", b""), ("a.json", "{")], "a.json is not JSON"),
        ([("a.jpg", b""), ("a.json", "-1")], "a.json is not a class index: '-1'"),
        ([("a.jpg", b""), ("a.cls", "0" * 65)], "a.cls is not a class index"),
    ],
)
def test_samples_that_are_not_one_image_and_one_class_are_rejected(files, reason, tmp_path):
    with pytest.raises(UserError) as error:
        shard_targets(tmp_path, *files)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "wds/train-0.tar") in error.value.reason
    assert reason in error.value.reason


def test_other_files_of_a_shard_are_counted(tmp_path, caplog):
    assert shard_targets(tmp_path, ("README.txt", "text"), ("._a.jpg", b"metadata")) == {}
    assert "2 files were skipped" in caplog.text
