"""Results: their fields, the table, and a JSON file that is never half written."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vil.config import EvalConfig, ModelConfig
from vil.errors import UserError
from vil.evaluation import cost
from vil.evaluation.accuracy import EvaluationDataset
from vil.evaluation.cost import Memory
from vil.evaluation.report import (
    Result,
    evaluate_model,
    table,
    write_confusion_csv,
    write_csv,
    write_json,
    write_per_class_csv,
)
from vil.runtime.distributed import Process
from vil.runtime.files import check_writable

PROCESS = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
CONFIG = EvalConfig(model=ModelConfig(name="tiny", image_size=2), batch_size=4, progress=False)
NAMES = [*"01234567", "plain, quoted", "ärm"]
CONTRACT = {
    *("top1", "top5", "loss", "images", "params", "flops", "train_memory_mb", "eval_memory_mb"),
    *("images_per_second", "device", "precision", "image_size", "checkpoint"),
}


def evaluate_linear(*loaders: Any, config: EvalConfig = CONFIG) -> list[Result]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    datasets = [EvaluationDataset("digits", loader, NAMES) for loader in loaders]
    return evaluate_model(model, datasets, config, PROCESS, checkpoint="runs/x/best.pt", weights="ema")


@pytest.fixture(scope="module")
def result() -> Result:
    (result,) = evaluate_linear([(torch.randn(20, 3, 2, 2), torch.arange(20) % 10)])
    return result


@pytest.fixture(scope="module")
def cost_alone() -> Result:
    (result,) = evaluate_linear()
    return result


def test_fields_of_a_result(result: Result) -> None:
    assert set(result) >= CONTRACT
    assert [key for key, value in result.items() if value is None] == [
        *("real_top1", "classes", "tta", "views")
    ]
    assert (result["images"], result["unreadable"], result["params"], result["flops"]) == (20, 0, 130, 120)
    assert result["train_memory_mb"] == pytest.approx((12 * 4 + 10 * 4 + 8) / 1e6)  # image, softmax, target
    assert result["eval_memory_mb"] == pytest.approx((12 + 10) * 4 / 1e6)
    assert (result["memory"], result["device"], result["precision"]) == ("counted bytes", "cpu", "float32")
    assert (result["checkpoint"], result["weights"], result["model"]) == ("runs/x/best.pt", "ema", "tiny")
    assert (result["data"], result["image_size"]) == ("digits", 2)
    assert [row["class"] for row in result["per_class"]] == NAMES
    assert [row["images"] for row in result["per_class"]] == [2] * 10
    recalls = [row["recall"] for row in result["per_class"]]
    assert result["balanced_accuracy"] == pytest.approx(sum(recalls) / 10) == pytest.approx(result["top1"])


def test_without_data_there_are_no_metrics(cost_alone: Result) -> None:
    assert [cost_alone[key] for key in ("top1", "top5", "loss", "images", "data")] == [None] * 5
    assert cost_alone["flops"] == 120


def test_the_cost_of_a_model_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([5.0])
    monkeypatch.setattr(cost, "images_per_second", lambda *_, **options: next(speeds))
    batch = (torch.randn(4, 3, 2, 2), torch.arange(4))
    results = evaluate_linear([batch], [batch, batch])
    assert [(result["images"], result["images_per_second"]) for result in results] == [(4, 5.0), (8, 5.0)]


def test_a_cost_that_cannot_be_measured_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measure_memory", lambda *_, **options: Memory(None, 5e6, "measured peak"))
    monkeypatch.setattr(cost, "images_per_second", lambda *_, **options: None)
    (result,) = evaluate_linear()
    keys = ("train_memory_mb", "eval_memory_mb", "images_per_second")
    assert [result[key] for key in keys] == [None, 5, None]
    write_json(tmp_path / "out.json", [result])
    assert json.loads((tmp_path / "out.json").read_text()) == [result]
    fitting = {**result, "train_memory_mb": 7.0}
    assert table([result, fitting]).splitlines()[1].split()[-2:] == ["-", "5.0"]


def test_a_failed_measurement_is_a_warning_and_keeps_the_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    class NeedsTwoImages(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 1:
                raise RuntimeError("needs two images")
            return super().forward(x.mean((2, 3)))

    dataset = EvaluationDataset("odd", [(torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))])
    (result,) = evaluate_model(NeedsTwoImages(3, 2), [dataset], CONFIG, PROCESS)
    assert (result["images"], result["flops"], result["params"]) == (4, None, 8)
    assert caplog.messages == ["warning: FLOPs cannot be measured: needs two images"]


def test_table_is_aligned_without_empty_columns(result: Result, cost_alone: Result) -> None:
    result = {**result, "top1": 97.5, "params": 6_720_000, "flops": 1_432_000_000}
    other = {**result, "model": "a_longer_name", "top1": 8.123}
    lines = table([result, other]).splitlines()
    assert lines[0].split()[:5] == ["model", "checkpoint", "weights", "data", "size"]
    end = lines[0].index("Top-1 %") + len("Top-1 %")
    assert lines[1][:end].endswith(" 97.50")
    assert lines[2][:end].endswith("  8.12")
    assert "6.72" in lines[1]
    assert "1.432" in lines[1]
    assert lines[3:] == [
        "cpu, float32. FLOPs: multiply-adds of one image. MB: 10^6 bytes per image, counted bytes, "
        "training in float32."
    ]
    headings = table([cost_alone]).splitlines()[0]
    assert "Top-1" not in headings
    assert "FLOPs G" in headings
    assert "unreadable" not in lines[0]
    assert "unreadable" in table([{**result, "unreadable": 2}])


def test_a_single_result_on_a_narrow_terminal_is_a_list(result: Result, cost_alone: Result) -> None:
    result = {**result, "top1": 97.5, "macro_f1": 96.25}
    wide = table([result]).splitlines()
    assert table([result], len(wide[0])).splitlines() == wide
    lines = table([result], len(wide[0]) - 1).splitlines()
    names, values = zip(*(line.rsplit("  ", 1) for line in lines[:-1]))
    shown = dict(zip(map(str.strip, names), values))
    assert (shown["data"], shown["Top-1 %"], shown["macro F1 %"]) == ("digits", "97.50", "96.25")
    assert len({len(line) - len(value) for line, value in zip(lines, values)}) == 1  # aligned
    assert not {"ReaL %", "classes", "unreadable"} & set(shown)
    assert lines[-1] == wide[-1]
    assert "macro" not in wide[0]
    assert table([result, result], 40) == table([result, result])
    assert "Top-1" not in table([cost_alone], 40)


def test_csv_has_the_values_of_the_json_file(result: Result, cost_alone: Result, tmp_path: Path) -> None:
    write_csv(tmp_path / "out.csv", [result, {**cost_alone, "loss": math.nan}, {**result, "mce": 71.5}])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        first, second, third = csv.DictReader(file)
    assert list(first)[:4] == ["model", "checkpoint", "weights", "data"]
    assert set(first) == {*result, "mce"} - {"per_class"}
    assert {key: first[key] for key in first if key != "mce"} == {
        key: "" if value is None else str(value) for key, value in result.items() if key != "per_class"
    }
    assert (second["loss"], second["top1"], second["flops"]) == ("", "", "120")
    assert (first["mce"], third["mce"]) == ("", "71.5")


def test_csv_of_single_classes(result: Result, cost_alone: Result, tmp_path: Path) -> None:
    write_per_class_csv(tmp_path / "out.csv", [result, cost_alone, {**result, "data": "other"}])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["class"]) for row in rows] == [
        (data, name) for data in ("digits", "other") for name in NAMES
    ]
    first = result["per_class"][0]
    assert rows[0] == {
        **{"model": "tiny", "checkpoint": "runs/x/best.pt", "weights": "ema", "data": "digits"},
        **{key: str(value) for key, value in first.items()},
    }


def test_csv_of_the_confusion_matrix(tmp_path: Path) -> None:
    batch = (torch.randn(20, 3, 2, 2), torch.arange(20) % 10)
    config = dataclasses.replace(CONFIG, confusion_csv="x.csv")
    (result,) = evaluate_linear([batch], config=config)
    path = tmp_path / "out.csv"
    write_confusion_csv(path, [result])
    with path.open(newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["class", *NAMES]
    assert [row[0] for row in rows] == NAMES
    counts = [list(map(int, row[1:])) for row in rows]
    assert [sum(row) for row in counts] == [2] * 10
    assert sum(counts[k][k] for k in range(10)) == round(20 * result["top1"] / 100)
    write_confusion_csv(path, [{"class_names": ["a", "b"], "confusion": [[1, 0, 2], [0, 3, 0]]}])
    assert path.read_text() == "class,a,b,(no class)\na,1,0,2\nb,0,3,0\n"
    write_json(tmp_path / "out.json", [result])
    assert not {"confusion", "class_names"} & set(json.loads((tmp_path / "out.json").read_text())[0])


def test_json_is_read_back(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    check_writable(path, "json")
    assert not path.parent.exists()  # a command that fails leaves no empty folder
    write_json(path, [result, {**result, "loss": math.nan}])
    first, second = json.loads(path.read_text())
    assert first == result
    assert list(first)[-1] == "per_class"
    assert second["loss"] is None
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_json(path, [{"top1": 1.0}])
    before = path.read_text()

    def fill_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(UserError) as caught:
        write_json(path, [])
    assert str(caught.value) == f"json: {path} cannot be written: No space left on device"
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("file/out.json", "Not a directory"), ("file/new/out.json", "Not a directory")),
        *(("folder", "Is a directory"), (f"new/{'x' * 300}", "File name too long")),
    ],
)
def test_an_unwritable_path_is_refused_before_the_evaluation(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        check_writable(tmp_path / name, "json")
    assert str(caught.value) == f"json: {tmp_path / name} cannot be written: {reason}"


def test_the_table_shows_paths_in_the_working_folder_relative_to_it(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The data of a run is stored with absolute paths, which would fill a line of a terminal."""
    folder = tmp_path / "a (b)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    names = {
        f"{folder}/photos, held out: {folder}/runs/split.txt": "photos, held out: runs/split.txt",
        f"zip:{folder}/photos/val": "zip:photos/val",
        f"/x{folder}/photos": f"/x{folder}/photos",
        "digits": "digits",
    }
    lines = table([{**result, "data": name} for name in names]).splitlines()
    assert [shown in line for shown, line in zip(names.values(), lines[1:])] == [True] * len(names)
    assert sum(str(folder) in line for line in lines) == 1
    folder.rmdir()
    for change in (lambda: None, lambda: monkeypatch.chdir("/")):  # removed, or the root
        change()
        assert "/data/photos " in table([{**result, "data": "/data/photos"}])
