"""Further data sets that every evaluation of a run logs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.run_files import records
from helpers.tiny_run import CPU, TinyModel, find_last, load_last, make_batch, make_config, run
from PIL import Image

import train as program
from data import open_eval_sets
from data.eval_sets import eval_set_data, eval_set_names
from vil.checkpoints.run_folder import differences
from vil.config import DataConfig, ModelConfig, TrainConfig
from vil.errors import UserError
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.training.tensorboard_log import record_tag
from vil.training.trainer import Monitoring
from vil.validation import stored_tree

OTHER = EvaluationDataset("other", [make_batch(77, 20)], ("red", "green", "blue", "none"))
PART = EvaluationDataset("a/part", [(make_batch(78, 9)[0], torch.arange(9) % 2)], ("blue", "red"), [2, 0])


def train(folder: Path, eval_sets: list[EvaluationDataset], **options: Any) -> TinyModel:
    model, monitoring = TinyModel(0.2), Monitoring(eval_sets=eval_sets)
    run(make_config(folder, **options), model, state=find_last(folder), monitoring=monitoring)
    return model


def test_every_evaluation_logs_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = train(tmp_path, [OTHER, PART], ema_decay=0.5, epochs=2)
    found, screen = records(tmp_path), capsys.readouterr().out
    kinds = ["validation/other", "validation/a/part", "validation"]
    assert [record["kind"] for record in found if record["kind"] != "train"] == 2 * kinds
    last = {record["kind"]: record for record in found}
    for dataset in (OTHER, PART):
        expected = evaluate(model, dataset, EvaluationOptions(CPU.device, "float32"))
        record = last[f"validation/{dataset.name}"]
        assert {key: record[key] for key in expected.logged()} == expected.logged()
        assert (record["step"], record["epoch"], record["images"]) == (10, 2, expected.images)
        assert "ema_top1" in record
        assert f"   {dataset.name} {record['top1']:.2f} %, EMA {record['ema_top1']:.2f} %   " in screen


def test_sets_change_neither_the_weights_nor_the_best_checkpoint(tmp_path: Path) -> None:
    for name, sets in (("with", [OTHER, PART]), ("without", [])):
        train(tmp_path / name, sets)
    states = [load_last(tmp_path / name) for name in ("with", "without")]
    assert states[0]["best"] == states[1]["best"]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name])
    kept = [record for record in records(tmp_path / "with") if "/" not in record["kind"]]
    assert kept == records(tmp_path / "without")


def test_a_continued_run_has_the_records_of_an_uninterrupted_one(tmp_path: Path) -> None:
    for name, parts in (("at_once", [15]), ("in_parts", [5, 7, 10, 15])):
        for last_step in parts:
            train(tmp_path / name, [OTHER], max_steps=last_step)
    found = [
        [record for record in records(tmp_path / name) if record["kind"] != "options"]
        for name in ("at_once", "in_parts")
    ]
    assert [record["kind"] for record in found[0]].count("validation/other") == 3
    # A part that ends within an epoch is evaluated there, too.
    steps = {record["step"] for record in found[0]}
    assert [record for record in found[1] if record["step"] in steps and record["step"] != 7] == [
        record for record in found[0] if record["step"] != 7
    ]


def test_tags_of_tensorboard() -> None:
    for kind, key, tag in (
        ("validation/other", "top1", "validation/other/top1"),
        ("validation/other", "ema_top1", "ema/other/top1"),
        ("validation", "ema_top1", "ema/top1"),
    ):
        assert record_tag(kind, key) == tag


# --- Opening the sets ---------------------------------------------------------------------------------------


def save_images(root: Path, *classes: str) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (90 * number, 0, 0)).save(root / name / "1.png")
    return root


def open_sets(paths: list[Any], names: tuple[str, ...] = ("ant", "bee", "cat"), **data: Any) -> list[Any]:
    config = TrainConfig(
        model=ModelConfig(image_size=16, num_classes=len(names)), data=DataConfig(workers=0, **data)
    )
    config.eval_sets = [str(path) for path in paths]
    return open_eval_sets(config, names, CPU)


def test_folders_and_files_are_opened_with_the_transform_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    save_images(tmp_path / "v2", "bee", "cat")
    save_images(tmp_path / "x" / "test", "ant", "bee", "cat")
    file = tmp_path / "other.yaml"
    file.write_text(f"{{source: folder, root: {tmp_path}/x, val_split: test, mean: [0.9, 0.9, 0.9]}}\n")
    mean = (0.1, 0.2, 0.3)
    (folder, indices), (other, all_logits) = open_sets([tmp_path / "v2", file], mean=mean)
    assert (folder.name, folder.class_names, indices) == ("v2", ("bee", "cat"), [1, 2])
    assert (other.name, other.class_names, all_logits) == ("other", ("ant", "bee", "cat"), None)
    for found in (folder, other):
        assert found.loader._loader.dataset.transform.mean == mean
    message = f"data.mean: [0.1, 0.2, 0.3], required by the run, overrides {file}"
    assert [text for text in caplog.messages if "overrides" in text] == [message]


def test_names_tell_the_sets_apart() -> None:
    assert eval_set_names([]) == []
    assert eval_set_names(["/a/v2", "b/x.yaml", "."]) == ["v2", "x", Path.cwd().name]
    assert eval_set_names(["/data/v2/val", "/data/a b/val/"]) == ["v2/val", "a_b/val"]
    with pytest.raises(UserError) as refused:
        eval_set_names(["v2", "./v2"])
    assert str(refused.value) == "eval_sets: v2 occurs twice"


def test_sets_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    save_images(tmp_path / "x", "ant", "dog")
    save_images(tmp_path / "y", "dog")
    texts = {
        "source: tape\n": f"{file}: data.source: unknown source 'tape'; expected one of ",
        "sorce: folder\n": f"{file}: data.sorce: unknown key; did you mean data.source?",
        "download: true\n": f"{file}: data.download: a file cannot set this option; delete it there",
        "index: /tmp/x\n": f"{file}: data.index: a file cannot name a folder; delete it there",
        "- 1\n": f"{file}: expected a mapping of keys to values",
    }
    for text, message in texts.items():
        file.write_text(text)
        with pytest.raises(UserError) as refused:
            open_sets([file])
        assert str(refused.value).startswith(f"eval_sets: {message}")
    reason = "class 'dog' is not among the 3 that the run was trained on, 1 of 2 are"
    for path, message in (
        (tmp_path / "none", f"{tmp_path / 'none'}: no such file or folder"),
        (tmp_path / "x", f"{tmp_path / 'x'}: {reason}"),
        (
            tmp_path / "y",
            f"{tmp_path / 'y'}: the run was trained on none of its classes ('dog', ...) but on 'ant', ...",
        ),
    ):
        with pytest.raises(UserError) as refused:
            open_sets([path])
        assert str(refused.value) == f"eval_sets: {message}"


def test_unreadable_images_are_skipped_and_the_index_is_that_of_the_run(tmp_path: Path) -> None:
    save_images(tmp_path / "x", "ant")
    data = eval_set_data(str(tmp_path / "x"), DataConfig(index="off"))
    assert (data.unreadable_images, data.index) == ("skip", "off")
    (tmp_path / "x.yaml").write_text("source: folder\nunreadable_images: fail\n")
    assert eval_set_data(str(tmp_path / "x.yaml"), DataConfig()).unreadable_images == "fail"


def test_paths_are_stored_absolute_and_runs_of_older_versions_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(eval_sets=["v2", str(tmp_path / "x.yaml")])
    stored = stored_tree(config)
    assert stored["eval_sets"] == [f"{tmp_path}/v2", f"{tmp_path}/x.yaml"]
    assert differences(stored, config) == []
    del stored["eval_sets"]
    assert [key for key, _, _ in differences(stored, config)] == ["eval_sets"]
    assert differences(stored, dataclasses.replace(config, eval_sets=[])) == []


def test_train_evaluates_on_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits.yaml").write_text("source: digits\n")
    argv = ["--data.images_per_class", "4", "--data.workers", "0", "--schedule.batch_size", "16"]
    argv += ["--schedule.epochs", "1", "--model.image_size", "16", "--device", "cpu", "--progress", "false"]
    program.main([*argv, "--loggers", "csv", "--eval_sets", "digits.yaml", "--output", "run"])
    by_kind = {record["kind"]: record for record in records(Path("run"))}
    same = ("top1", "loss", "images", "step")
    assert [by_kind["validation/digits"][key] for key in same] == [by_kind["validation"][key] for key in same]
    assert "validation/digits," in Path("run/metrics.csv").read_text()
