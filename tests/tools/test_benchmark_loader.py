"""tools/benchmark.py loader: what it measures is what it says, and how it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import benchmark as program
from tools.benchmarking import loader
from tools.benchmarking.measure import Missing
from vil.config import ConfigError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 1)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60))
                image.save(tmp_path / split / name / f"{number}.jpg")
    return tmp_path


def test_every_source_and_recipe_is_measured(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, markdown = tmp_path / "out.csv", tmp_path / "out.md"
    words = ["loader", "--sources", f"folder={root}", "--repeats", "2", "--workers", "1", "--batch", "8"]
    files = ["--csv", str(table), "--markdown", str(markdown)]
    program.benchmark([*words, "--image-size", "32", "--device", "cpu", *files])
    with table.open(newline="") as file:
        found = {(r["recipe"], r["method"]): r for r in csv.DictReader(file)}
    assert set(found) == {
        *((recipe, method) for recipe in ("crop", "full") for method in ("folder", "timm")),
        ("decoding", "folder's JPEGs"),
    }
    assert {record["images"] for record in found.values()} == {"16"}
    for record in found.values():
        assert float(record["images_per_second"]) > 0
        assert record["note"] == ""
    folder, timm, decoder = (
        found[key] for key in (("full", "folder"), ("full", "timm"), ("decoding", "folder's JPEGs"))
    )
    speed = float(folder["images_per_second"])
    assert float(folder["times_timm"]) == pytest.approx(speed / float(timm["images_per_second"]))
    assert float(folder["share_of_decoder"]) == pytest.approx(speed / float(decoder["images_per_second"]))
    assert folder["share_of_originals"] == folder["share_of_decoder"]
    text = markdown.read_text()
    assert "16 images of 0.00 megapixels" in text
    assert text.strip() == capsys.readouterr().out.strip()


def test_a_source_that_breaks_down_is_noted() -> None:
    rows = [loader.Row("crop", "zip", 0, Missing("no such file")), loader.Row("crop", "timm", 10, 0.5)]
    zipped, timm = loader.records(rows)
    assert (zipped["images_per_second"], zipped["times_timm"], zipped["note"]) == (None, None, "no such file")
    assert (timm["images_per_second"], timm["times_timm"]) == (20, 1)
    assert "zip: no such file" in loader.tables([zipped, timm])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder"], "expected SOURCE=ROOT, got 'folder'"),
        (["foldr=/x"], "unknown source 'foldr'"),
        (["folder=/nowhere"], "no such folder"),
        (["folder=/x", "--workers", "0"], "--workers must be at least 1"),
        (["folder=/x", "--fraction", "0"], "--fraction must be above 0, up to 1"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        program.benchmark(["loader", "--device", "cpu", "--sources", *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
