"""tools/inspect_data.py: counts, duplicates, unreadable images, the sheet."""

import io
import itertools
import json

import numpy as np
import pytest
from helpers.sample_images import write_image
from PIL import Image

from tools.data_inspection.contact_sheet import contact_sheet
from tools.data_inspection.duplicates import near_pairs
from tools.data_inspection.images import open_splits
from tools.data_inspection.main import main
from vil.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Make root/train and root/val with two classes, of which one is absent in val."""
    for number in range(4):
        write_image(tmp_path / f"images/train/große Katze/{number}.png", number, (50, 40))
    write_image(tmp_path / "images/train/dog/5.jpg", 5, (20, 30))
    write_image(tmp_path / "images/train/dog/6.png", 6, (40, 40), "L")
    write_image(tmp_path / "images/val/dog/7.png", 7, (40, 40))
    return tmp_path / "images"


def inspect(root, tmp_path, *argv):
    path = tmp_path / "report.json"
    status = 0
    try:
        main([str(root), "--json", str(path), "--workers", "0", *argv])
    except SystemExit as ended:
        status = ended.code
    return status, json.loads(path.read_text())


def test_counts_sizes_formats_and_classes(root, tmp_path, capsys):
    status, report = inspect(root, tmp_path, "--image-size", "32")
    assert status == 0
    assert report["images"] == {"train": 6, "val": 1}
    assert report["images_per_class"] == {
        "train": {"dog": 2, "große Katze": 4},
        "val": {"dog": 1, "große Katze": 0},
    }
    assert report["imbalance"] == {"train": 2.0, "val": 1.0}
    assert report["formats"] == {"PNG": 6, "JPEG": 1}
    assert report["modes"] == {"RGB": 6, "L": 1}
    assert report["widths"] == [20, 40, 50, 50, 50]
    assert report["smaller_images"] == [{"split": "train", "name": "dog/5.jpg", "width": 20, "height": 30}]
    assert report["unreadable"] == report["duplicates"] == []
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "7 images of 2 classes"
    assert "val lacks 1 of 2 classes: große Katze" in shown
    assert "modes       RGB 6, L (gray) 1" in shown
    assert "small       1 images are smaller than 32; the smallest is train: dog/5.jpg, 20×30" in shown


def test_equal_and_similar_images_across_splits_and_classes(root, tmp_path, capsys):
    image = Image.open(root / "train/große Katze/0.png")
    image.save(root / "val/dog/copy.webp", lossless=True)
    image.resize((100, 80), Image.Resampling.BICUBIC).save(root / "train/große Katze/large.jpg", quality=95)
    status, report = inspect(root, tmp_path)
    assert status == 0
    equal, similar = report["duplicates"]
    assert equal == {
        "images": [
            {"split": "train", "class": "große Katze", "name": "große Katze/0.png"},
            {"split": "val", "class": "dog", "name": "dog/copy.webp"},
        ],
        "distance": 0,
        "exact": True,
    }
    assert [image["name"] for image in similar["images"]] == ["große Katze/0.png", "große Katze/large.jpg"]
    assert not similar["exact"]
    assert similar["distance"] <= 4
    lines = capsys.readouterr().out.splitlines()
    assert "equal       1 pair, 1 across splits, 1 across classes" in lines
    names = "train: große Katze/0.png ≈ train: große Katze/large.jpg"
    assert f"  {names} ({similar['distance']} of 64 bits differ)" in lines


def test_an_unreadable_image_is_named_and_sets_the_exit_status(root, tmp_path, capsys):
    (root / "train/dog/broken.jpg").write_bytes(b"\xff\xd8\xff")
    status, report = inspect(root, tmp_path)
    assert status == 1
    (entry,) = report["unreadable"]
    assert (entry["split"], entry["name"]) == ("train", "dog/broken.jpg")
    assert "unreadable  1" in capsys.readouterr().out.splitlines()
    (root / "train/dog/other.jpg").write_bytes(b"\xff\xd8\xff")
    status, report = inspect(root, tmp_path)
    assert (len(report["unreadable"]), report["duplicates"]) == (2, [])  # their pixels are not equal


def test_a_root_of_class_folders_is_one_split(root, tmp_path):
    _, report = inspect(root / "train", tmp_path)
    assert report["images"] == {"all": 6}


def test_pairs_are_those_of_a_comparison_of_all():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    near = [value ^ np.uint64(1 << int(bit)) for value, bit in zip(hashes, rng.integers(0, 63, 60))]
    hashes = np.concatenate([hashes, np.array(near, dtype=np.uint64), hashes[:20] ^ np.uint64(0b1011 << 30)])
    for distance in (0, 1, 3, 5):
        expected = [
            (i, j)
            for i, j in itertools.combinations(range(len(hashes)), 2)
            if int(hashes[i] ^ hashes[j]).bit_count() <= distance
        ]
        assert near_pairs(hashes, distance) == expected
    assert len(near_pairs(hashes, 1)) == 60


def test_the_sheet_has_a_row_per_class(root):
    sources = open_splits(str(root), "folder", None)
    with Image.open(io.BytesIO(contact_sheet(sources, 3))) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = np.flatnonzero((pixels < 250).any(axis=(1, 2)))
    assert (np.diff(rows) > 5).sum() >= 1  # white between the rows
    assert pixels.std() > 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "data.root: nowhere: no such folder"),
        (["photos", "--source", "cloud"], "data.source: unknown source 'cloud'"),
        (["photos", "--near-distance", "13"], "argument --near-distance: expected an integer from 0 to 12"),
        (["photos", "--json", "photos"], "--json: photos"),
    ],
)
def test_bad_input_is_one_line(argv, message, root, tmp_path, monkeypatch):
    root.rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(argv)
    assert message in str(error.value)
