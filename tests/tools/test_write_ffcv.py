"""tools/write_ffcv.py: files equal their source; incomplete files never get their name."""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import open_source
from tools.programs import write_ffcv as tool
from vil.config import DataConfig
from vil.errors import UserError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
TOOL = Path(__file__).parents[2] / "tools" / "write_ffcv.py"


@pytest.fixture
def folder(tmp_path):
    """root/train with 2 classes × 6 images, root/val with 2 × 3; the widest has 90 × 50 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bear"):
            for number in range(count):
                path = tmp_path / "images" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                size = (40 + 10 * number, 50)
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize(size).save(path)
    return tmp_path / "images"


def arguments(folder, output, *more):
    options = {"source": "folder", "root": folder, "workers": 2}
    line = [word for key, value in options.items() for word in (f"--data.{key}", str(value))]
    return [*line, "--output", str(output), "--no-progress", *more]


def sources(folder, output, split):
    opened = [
        open_source(DataConfig(source=source, root=str(root)), split, 3)
        for source, root in (("folder", folder), ("ffcv", output))
    ]
    assert np.array_equal(opened[0].targets, opened[1].targets)
    assert opened[0].class_names == opened[1].class_names
    return opened


def test_lossless_files_equal_the_source(folder, tmp_path):
    output = tmp_path / "ffcv"
    tool.main(arguments(folder, output, "--max-resolution", "none", "--jpeg-share", "0"))
    assert sorted(os.listdir(output)) == ["train.beton", "train.json", "val.beton", "val.json"]
    for split in ("train", "val"):
        before, after = sources(folder, output, split)
        for index in range(len(before)):
            assert np.array_equal(before.load(index)[0], after.load(index)[0])
    assert (output / "train.beton").stat().st_size <= 4 * tool.MIN_PAGE_BYTES
    described = json.loads((output / "train.json").read_text())
    assert described["class_names"] == ["ant", "bear"]
    assert (described["source"], described["root"], described["images"]) == ("folder", str(folder), 12)


def test_ffcv_reads_the_same_samples(folder, tmp_path):
    tool.main(arguments(folder, tmp_path / "ffcv"))
    from ffcv.reader import Reader

    for split in ("train", "val"):
        beton = open_source(DataConfig(source="ffcv", root=str(tmp_path / "ffcv")), split, 3).beton
        reader = Reader(str(beton.path))
        assert reader.field_names == ["image", "label"]
        assert np.array_equal(reader.metadata["f1"], beton.targets)
        assert np.array_equal(reader.metadata["f0"]["width"], beton.widths)


def test_resolution_jpeg_share_and_quality(folder, tmp_path):
    def stored(*options):
        output = tmp_path / "-".join(options)
        tool.main(arguments(folder, output, "--splits", "train", *options))
        before, after = sources(folder, output, "train")
        return before, after

    before, after = stored("--max-resolution", "60", "--jpeg-share", "0")
    for index in range(len(before)):
        (width, height), reduced = before.load(index)[0].size, after.load(index)[0].size
        assert max(reduced) <= 60
        assert reduced == ((width, height) if width <= 60 else (60, height * 60 // width))
    assert after.beton.raw.all()
    _, low = stored("--jpeg-share", "1", "--jpeg-quality", "20")
    before, high = stored("--jpeg-share", "1", "--jpeg-quality", "98")
    assert not low.beton.raw.any()
    assert sum(low.beton.stored(i).size for i in range(12)) < sum(
        high.beton.stored(i).size for i in range(12)
    )
    for index in range(len(before)):
        wrong = np.asarray(before.load(index)[0], int) - np.asarray(high.load(index)[0], int)
        assert 0 < np.abs(wrong).mean() < 4
    _, half = stored("--jpeg-share", "0.5")
    assert 0 < half.beton.raw.sum() < 12


def test_repeated_command_continues(folder, tmp_path, capsys):
    output, line = tmp_path / "ffcv", arguments(folder, tmp_path / "ffcv")
    tool.main([*line, "--splits", "val"])
    written = (output / "val.beton").stat().st_mtime_ns
    tool.main(line)
    assert (output / "val.beton").stat().st_mtime_ns == written
    assert "val.beton: 6 images, exists already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.beton exists and was written with other options"):
        tool.main([*line, "--jpeg-quality", "50"])


def test_unreadable_images_fail_or_are_skipped(folder, tmp_path):
    damaged = folder / "train" / "bear" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    output = tmp_path / "ffcv"
    line = arguments(folder, output, "--jpeg-share", "0", "--splits", "train")
    with pytest.raises(UserError, match=rf"data\.root: cannot be read: {damaged}: "):
        tool.main(line)
    assert os.listdir(output) == []
    with pytest.raises(
        UserError, match=r"data\.max_unreadable_fraction: 1 of 12 images cannot be read, more than 0\.00%"
    ):
        tool.main([*line, "--data.unreadable_images", "skip", "--data.max_unreadable_fraction", "0"])
    tool.main([*line, "--data.unreadable_images", "skip", "--data.max_unreadable_fraction", "0.1"])
    after = open_source(DataConfig(source="ffcv", root=str(output)), "train", 3)
    before = open_source(DataConfig(source="folder", root=str(folder)), "train", 3)
    assert json.loads((output / "train.json").read_text())["unreadable"] == [str(damaged)]
    kept = [index for index in range(12) if before.describe(index) != str(damaged)]
    assert after.targets.tolist() == before.targets[kept].tolist()
    for position, index in enumerate(kept):
        assert np.array_equal(before.load(index)[0], after.load(position)[0])
    tool.main([*line, "--data.unreadable_images", "skip", "--data.max_unreadable_fraction", "0.1"])


def test_dead_writer_process_is_detected(folder, tmp_path, monkeypatch):
    def die(samples, index):
        os._exit(9)

    monkeypatch.setattr(tool.Samples, "pixels", die)
    with pytest.raises(UserError, match=r"^--output: a writer process died; memory or disk may be full$"):
        tool.main(arguments(folder, tmp_path / "ffcv"))
    assert os.listdir(tmp_path / "ffcv") == []


def test_differing_file_is_removed(folder, tmp_path, monkeypatch):
    write_images = tool.write_images

    def damage(path, *options):
        write_images(path, *options)
        content = bytearray(path.read_bytes())
        content[8 << 20 : (8 << 20) + 1000] = bytes(1000)
        path.write_bytes(content)

    monkeypatch.setattr(tool, "write_images", damage)
    with pytest.raises(UserError, match="differs from that of the source"):
        tool.main(arguments(folder, tmp_path / "ffcv", "--jpeg-share", "0"))
    assert os.listdir(tmp_path / "ffcv") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jpeg-share", "2"], "argument --jpeg-share: expected a number from 0 to 1, got '2'"),
        (["--jpeg-quality", "0"], "argument --jpeg-quality: expected an integer from 1 to 100, got '0'"),
        (
            ["--max-resolution", "0"],
            "argument --max-resolution: expected an integer from 1 to 65535, got '0'",
        ),
        (["--data.train_fraction", "0.5"], "data.train_fraction: applies to training; a file holds"),
        (["--splits", "test"], "argument --splits: invalid choice: 'test'"),
    ],
)
def test_invalid_options(folder, tmp_path, options, message):
    with pytest.raises(UserError) as caught:
        tool.main(arguments(folder, tmp_path / "ffcv", *options))
    assert str(caught.value).removeprefix("command line: ").startswith(message)


def test_pages_grow_with_the_largest_image(folder, tmp_path, monkeypatch):
    """Pages grow with the largest image, within what FFCV allows, and not without need."""
    options = ["--max-resolution", "none", "--jpeg-share", "0", "--splits", "val"]
    line = arguments(folder, tmp_path / "ffcv", *options)
    large = folder / "val" / "ant" / "0.png"
    Image.new("RGB", (2000, 1500), (9, 8, 7)).save(large)
    monkeypatch.setattr(tool, "MAX_PAGE_BYTES", 1 << 23)
    with pytest.raises(UserError, match=r"0\.png: 2000×1500 pixels are larger than a page"):
        tool.main(line)
    monkeypatch.undo()
    tool.main(line)
    before, after = sources(folder, tmp_path / "ffcv", "val")
    for index in range(len(before)):
        assert np.array_equal(before.load(index)[0], after.load(index)[0])
    assert (tmp_path / "ffcv" / "val.beton").stat().st_size <= 4 * (1 << 24)


def test_errors_of_the_program_have_one_line(folder, tmp_path, monkeypatch, capsys):
    argv = ["--data.source", "folder", "--data.root", str(folder / "none"), "--output", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", ["write_ffcv.py", *argv])
    monkeypatch.syspath_prepend(str(TOOL.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code == 2
    message = f"error: command line: data.root: {folder}/none/train: no such folder\n"
    assert capsys.readouterr().err == message
