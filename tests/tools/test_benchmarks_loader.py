"""tools/benchmark.py loader: figures of all sources and recipes, and errors."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.benchmarks import loader, program
from tools.benchmarks.output import table
from tools.benchmarks.timing import Measurement, Missing
from vil.errors import UserError


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
    argv = ["loader", "--sources", f"folder={root}", "--repeats", "2", "--workers", "1", "--batch-size", "8"]
    files = ["--csv", str(table), "--markdown", str(markdown)]
    program.benchmark([*argv, "--image-size", "32", "--device", "cpu", *files])
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


def test_a_fraction_of_the_images_of_each_class_is_that_of_timm_too(root: Path, tmp_path: Path) -> None:
    """One image of each class, also where the fraction of all images is less."""
    argv = ["loader", "--sources", f"folder={root}", "--repeats", "1", "--workers", "1", "--batch-size", "2"]
    options = ["--recipes", "crop", "--fraction", "0.01", "--image-size", "32", "--device", "cpu"]
    program.benchmark([*argv, *options, "--csv", str(tmp_path / "out.csv")])
    with (tmp_path / "out.csv").open(newline="") as file:
        assert {record["method"]: record["images"] for record in csv.DictReader(file)} == {
            "folder": "2",
            "timm": "2",
            "folder's JPEGs": "2",
        }


def test_a_source_that_fails_is_noted() -> None:
    values: dict[str, float | Missing] = {"zip": Missing("no such file"), "timm": 0.5}
    records = loader.to_records(
        [
            Measurement({"recipe": "crop", "method": method, "images": 10}, {"epoch": value})
            for method, value in values.items()
        ]
    )
    zipped, timm = records
    assert (zipped["images_per_second"], zipped["times_timm"], zipped["note"]) == (None, None, "no such file")
    assert (timm["images_per_second"], timm["times_timm"], timm["note"]) == (20, 1, "")
    assert table(records, loader.COLUMNS).endswith("\n\n- zip: no such file")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["folder"], "expected SOURCE=ROOT, got 'folder'"),
        (["foldr=/x"], "unknown source 'foldr'"),
        (["folder=/nowhere"], "no such folder"),
        (["folder=/x", "--workers", "0"], "argument --workers: expected an integer of at least 1, got '0'"),
        (["folder=/x", "--fraction", "2"], "--fraction must be at most 1, got 2"),
        (["folder=/x", "--fraction", "0"], "argument --fraction: must be positive, got 0"),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        program.benchmark(["loader", "--device", "cpu", "--sources", *argv])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
