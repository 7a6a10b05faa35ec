"""tools/write_ffcv.py: what is written is what was read; nothing half done has a name."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources import open_source
from vil.config import ConfigError, DataConfig

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
TOOL = Path(__file__).parents[2] / "tools" / "write_ffcv.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("write_ffcv", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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


def words(folder, output, *more):
    options = {"source": "folder", "root": folder, "workers": 2}
    line = [word for key, value in options.items() for word in (f"--data.{key}", str(value))]
    return [*line, "--output", str(output), "--progress", "false", *more]


def sources(folder, output, split):
    opened = [
        open_source(DataConfig(source=source, root=str(root)), split, 3)
        for source, root in (("folder", folder), ("ffcv", output))
    ]
    assert np.array_equal(opened[0].targets, opened[1].targets)
    assert opened[0].class_names == opened[1].class_names
    return opened


def test_without_loss(tool, folder, tmp_path):
    output = tmp_path / "ffcv"
    tool.write(words(folder, output, "--max_resolution", "null", "--jpeg_share", "0"))
    assert sorted(os.listdir(output)) == ["train.beton", "train.json", "val.beton", "val.json"]
    for split in ("train", "val"):
        before, after = sources(folder, output, split)
        for index in range(len(before)):
            assert np.array_equal(before.load(index)[0], after.load(index)[0])
    assert (output / "train.beton").stat().st_size <= 4 * tool.PAGE
    described = json.loads((output / "train.json").read_text())
    assert described["class_names"] == ["ant", "bear"]
    assert (described["source"], described["root"], described["images"]) == ("folder", str(folder), 12)


def test_ffcv_reads_the_same(tool, folder, tmp_path):
    tool.write(words(folder, tmp_path / "ffcv"))
    from ffcv.reader import Reader

    for split in ("train", "val"):
        beton = open_source(DataConfig(source="ffcv", root=str(tmp_path / "ffcv")), split, 3).beton
        reader = Reader(str(beton.path))
        assert reader.field_names == ["image", "label"]
        assert np.array_equal(reader.metadata["f1"], beton.targets)
        assert np.array_equal(reader.metadata["f0"]["width"], beton.widths)


def test_limit_share_and_quality(tool, folder, tmp_path):
    def stored(*options):
        output = tmp_path / "-".join(options)
        tool.write(words(folder, output, *options))
        before, after = sources(folder, output, "train")
        return before, after

    before, after = stored("--max_resolution", "60", "--jpeg_share", "0")
    for index in range(len(before)):
        (width, height), reduced = before.load(index)[0].size, after.load(index)[0].size
        assert max(reduced) <= 60
        assert reduced == ((width, height) if width <= 60 else (60, height * 60 // width))
    assert after.beton.raw.all()
    _, low = stored("--jpeg_share", "1", "--jpeg_quality", "20")
    before, high = stored("--jpeg_share", "1", "--jpeg_quality", "98")
    assert not low.beton.raw.any()
    assert sum(low.beton.stored(i).size for i in range(12)) < sum(
        high.beton.stored(i).size for i in range(12)
    )
    for index in range(len(before)):
        wrong = np.asarray(before.load(index)[0], int) - np.asarray(high.load(index)[0], int)
        assert 0 < np.abs(wrong).mean() < 4
    _, half = stored("--jpeg_share", "0.5")
    assert 0 < half.beton.raw.sum() < 12


def test_a_line_that_is_said_again_goes_on(tool, folder, tmp_path, capsys):
    output, line = tmp_path / "ffcv", words(folder, tmp_path / "ffcv")
    tool.write([*line, "--splits", "[val]"])
    written = (output / "val.beton").stat().st_mtime_ns
    tool.write(line)
    assert (output / "val.beton").stat().st_mtime_ns == written
    assert "val.beton: 6 images, there already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"train\.beton exists and was written otherwise"):
        tool.write([*line, "--jpeg_quality", "50"])


def test_unreadable_images(tool, folder, tmp_path):
    damaged = folder / "train" / "bear" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    output = tmp_path / "ffcv"
    line = words(folder, output, "--jpeg_share", "0")
    with pytest.raises(ConfigError, match=rf"data\.root: cannot be read: {damaged}: "):
        tool.write(line)
    assert os.listdir(output) == []
    with pytest.raises(ConfigError, match=r"data\.max_bad: 1 of 12 images cannot be read, more than 0\.00%"):
        tool.write([*line, "--data.on_error", "skip", "--data.max_bad", "0"])
    tool.write([*line, "--data.on_error", "skip", "--data.max_bad", "0.1"])
    after = open_source(DataConfig(source="ffcv", root=str(output)), "train", 3)
    before = open_source(DataConfig(source="folder", root=str(folder)), "train", 3)
    assert json.loads((output / "train.json").read_text())["unreadable"] == [str(damaged)]
    kept = [index for index in range(12) if before.describe(index) != str(damaged)]
    assert after.targets.tolist() == before.targets[kept].tolist()
    for place, index in enumerate(kept):
        assert np.array_equal(before.load(index)[0], after.load(place)[0])
    tool.write([*line, "--data.on_error", "skip", "--data.max_bad", "0.1"])


def test_a_process_that_dies_is_not_waited_for(tool, folder, tmp_path, monkeypatch):
    def die(samples, index):
        os._exit(9)

    monkeypatch.setattr(tool.Samples, "pixels", die)
    with pytest.raises(ConfigError, match=r"^command line: output: a process that wrote images died"):
        tool.write(words(folder, tmp_path / "ffcv"))
    assert os.listdir(tmp_path / "ffcv") == []


def test_a_file_that_differs_is_not_kept(tool, folder, tmp_path, monkeypatch):
    write_images = tool.write_images

    def damage(path, *options):
        write_images(path, *options)
        content = bytearray(path.read_bytes())
        content[8 << 20 : (8 << 20) + 1000] = bytes(1000)
        path.write_bytes(content)

    monkeypatch.setattr(tool, "write_images", damage)
    with pytest.raises(ConfigError, match="differs from that of the source"):
        tool.write(words(folder, tmp_path / "ffcv", "--jpeg_share", "0"))
    assert os.listdir(tmp_path / "ffcv") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jpeg_share", "2"], "command line: jpeg_share: expected a share in [0, 1]"),
        (["--jpeg_quality", "0"], "command line: jpeg_quality: expected 1 to 100"),
        (["--max_resolution", "0"], "command line: max_resolution: expected 1 to 65535 pixels, or null"),
        (["--data.train_fraction", "0.5"], "command line: data.train_fraction: is for training"),
        (["--splits", "[test]"], "command line: splits: expected a list of one of train, val, got"),
    ],
)
def test_values_that_cannot_be(tool, folder, tmp_path, options, message):
    with pytest.raises(ConfigError) as caught:
        tool.write(words(folder, tmp_path / "ffcv", *options))
    assert str(caught.value).startswith(message)


def test_images_larger_than_a_page(tool, folder, tmp_path, monkeypatch):
    """Pages grow with the largest image, within what FFCV allows, and not without need."""
    line = [
        *words(folder, tmp_path / "ffcv"),
        "--max_resolution",
        "null",
        "--jpeg_share",
        "0",
        "--splits",
        "[val]",
    ]
    large = folder / "val" / "ant" / "0.png"
    Image.new("RGB", (2000, 1500), (9, 8, 7)).save(large)
    monkeypatch.setattr(tool, "LARGEST_PAGE", 1 << 23)
    with pytest.raises(ConfigError, match=r"0\.png: 2000×1500 pixels are larger than a page"):
        tool.write(line)
    monkeypatch.undo()
    tool.write(line)
    before, after = sources(folder, tmp_path / "ffcv", "val")
    for index in range(len(before)):
        assert np.array_equal(before.load(index)[0], after.load(index)[0])
    assert (tmp_path / "ffcv" / "val.beton").stat().st_size <= 4 * (1 << 24)


def test_as_a_program(folder, tmp_path):
    line = [sys.executable, str(TOOL), "--data.source", "folder", "--data.root", str(folder / "none")]
    ended = subprocess.run(
        [*line, "--output", "x"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: command line: data.root: ")
