"""Results: their fields, the table, and a JSON file that is never half written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vil.config import ConfigError
from vil.evaluation import report
from vil.evaluation.benchmark import Memory

CPU = torch.device("cpu")
CONTRACT = {
    "top1", "top5", "loss", "images", "params", "flops", "train_memory_mb", "eval_memory_mb",
    "images_per_second", "device", "precision", "image_size", "checkpoint",
}  # fmt: skip


def result_of(loader: Any, **options: Any) -> report.Result:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    fixed = {"image_size": 2, "in_chans": 3, "device": CPU, "precision": "float32", "batch_size": 4}
    names = {"checkpoint": "runs/x/best.pt", "model_name": "tiny", "weights": "ema", "data": "digits"}
    return report.evaluate_model(model, loader, **{**fixed, **names, **options})


@pytest.fixture
def result() -> report.Result:
    return result_of([(torch.randn(20, 3, 2, 2), torch.arange(20) % 10)])


def test_all_fields_of_the_contract(result: report.Result) -> None:
    assert set(result) >= CONTRACT
    assert [key for key, value in result.items() if value is None] == ["real_top1", "classes"]
    assert (result["images"], result["params"], result["flops"]) == (20, 130, 120)
    assert result["train_memory_mb"] == pytest.approx((12 * 4 + 10 * 4 + 8) / 1e6)  # image, softmax, target
    assert result["eval_memory_mb"] == pytest.approx((12 + 10) * 4 / 1e6)
    assert (result["memory"], result["device"], result["precision"]) == ("counted bytes", "cpu", "float32")
    assert (result["checkpoint"], result["weights"], result["model"]) == ("runs/x/best.pt", "ema", "tiny")


def test_without_images_there_is_no_accuracy() -> None:
    result = result_of(None)
    assert [result[key] for key in ("top1", "top5", "loss", "images")] == [None] * 4
    assert result["flops"] == 120


def test_a_cost_that_no_memory_holds_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "measure_memory", lambda *_, **options: Memory(None, 5e6, "measured peak"))
    monkeypatch.setattr(report, "images_per_second", lambda *_, **options: None)
    result = result_of(None)
    assert (result["train_memory_mb"], result["eval_memory_mb"], result["images_per_second"]) == (
        None,
        5,
        None,
    )
    report.write_json(tmp_path / "out.json", [result])
    assert json.loads((tmp_path / "out.json").read_text()) == [result]
    fitting = {**result, "train_memory_mb": 7.0}
    assert report.table([result, fitting]).splitlines()[1].split()[-2:] == ["-", "5.0"]


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got 0"):
        result_of(None, batch_size=0)


def test_table_is_aligned_and_leaves_out_empty_columns(result: report.Result) -> None:
    result = {**result, "top1": 97.5, "params": 6_720_000, "flops": 1_432_000_000}
    other = {**result, "model": "a_longer_name", "top1": 8.123}
    lines = report.table([result, other]).splitlines()
    assert lines[0].split()[:5] == ["model", "checkpoint", "weights", "data", "size"]
    end = lines[0].index("Top-1 %") + len("Top-1 %")
    assert lines[1][:end].endswith(" 97.50")
    assert lines[2][:end].endswith("  8.12")
    assert "6.72" in lines[1]
    assert "1.432" in lines[1]
    assert len(lines) == 4  # heading, two results, and what holds for both
    assert "counted bytes" in lines[3]
    without = report.table([result_of(None)])
    assert "Top-1" not in without
    assert "FLOPs G" in without


def test_json_is_read_back(result: report.Result, tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    report.check_writable(path)
    report.write_json(path, [result, {**result, "loss": math.nan}])
    first, second = json.loads(path.read_text())
    assert first == result
    assert second["loss"] is None
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_a_failed_write_keeps_the_old_file(
    result: report.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    report.write_json(path, [result])
    before = path.read_text()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"json: .*out.json cannot be written: No space left on device"):
        report.write_json(path, [])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("name", ["file/out.json", "folder"])
def test_what_cannot_be_written_is_found_before(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"json: .*{name} cannot be written"):
        report.check_writable(tmp_path / name)
