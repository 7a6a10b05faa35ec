"""Tar archives and WebDataset shards: the folder's images in any order, disjoint shares, one-line errors."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
import torch

from data import build_loaders, build_validation
from data.sources import open_source
from vil.config import AugmentConfig, ConfigError, DataConfig

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
    with pytest.raises(ConfigError) as error:
        open_source(data, split, 3)
    assert "\n" not in str(error.value)
    return error.value.reason


def contents(source):
    return sorted((np.asarray(source.load(i)[0]).tobytes(), source.load(i)[1]) for i in range(len(source)))


@pytest.mark.parametrize("kind", ["class_tars", "shards"])
def test_archives_hold_the_images_of_the_folder(kind, folder_data, request):
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
    options = {"image_size": 16, "in_chans": 3, "batch_size": 4, "accumulation": 1, "seed": 0}

    def batches(workers, start=0):
        loaders = build_loaders(dataclasses.replace(data, workers=workers), AugmentConfig(), **options)
        return list(loaders.train.epoch(1, start))

    first = batches(0)
    for others, whole in ((batches(2), first), (batches(0, 1), first[1:])):
        for (images, targets), (expected, labels) in zip(others, whole, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(targets, labels)


def test_ranks_share_the_shards_without_overlap_and_know_their_length(shards):
    shards.val_split = "train"
    parts = [
        build_validation(shards, image_size=16, in_chans=3, batch_size=3, rank=rank, world_size=3).loader
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
    assert "holds no shards test" in refusal(dataclasses.replace(shards, val_split="test"), "val")


def test_labels_that_are_none_are_refused(shards, image_folder, tmp_path):
    write_shards(tmp_path / "wds", image_folder, "train", label=lambda target: f"class {target}")
    assert "000000.cls is no class" in refusal(shards)
    with tarfile.open(tmp_path / "wds/train-0000.tar", "w") as tar:
        tar.add(image_folder / "train/ant/0.png", "000000.png")
    assert "images without a .cls" in refusal(shards)


def test_what_is_no_tar_is_refused(class_tars, tmp_path):
    root = tmp_path / "tars"
    assert "holds neither test.tar" in refusal(dataclasses.replace(class_tars, val_split="test"), "val")
    with tarfile.open(root / "val.tar", "w") as tar:
        tar.add(root / "train/ant.tar", "dog/0.png")
    assert "classes that the training split lacks: dog" in refusal(class_tars, "val")
    for content in (b"", b"no tar" * 400):
        (root / "val.tar").write_bytes(content)
        assert "cannot be read as an uncompressed tar" in refusal(class_tars, "val")


def test_members_that_lead_outside_or_are_links_are_no_images(class_tars, image_folder, tmp_path):
    picture = image_folder / "val/ant/0.png"
    with tarfile.open(tmp_path / "tars/val.tar", "w") as tar:
        tar.add(picture, "ant/0.png")
        tar.add(picture, "../ant/1.png")
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
