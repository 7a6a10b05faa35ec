"""The logs that copy metrics.jsonl, continued runs, and records of changed options."""

import csv
import gc
import importlib.util
import json
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.planted import Outside
from helpers.run_files import all_records as records
from helpers.tiny_run import STEPS, load_last, make_config, run

import train as train_program
from vil.command_line.resolution import parse
from vil.config import Logger, TrainConfig
from vil.errors import UserError
from vil.training import csv_log, experiment_trackers, metrics_log, run_log
from vil.training.csv_log import CsvLog
from vil.training.experiment_trackers import _options, check_loggers
from vil.training.run_log import RunLog
from vil.training.tensorboard_log import TensorBoardLog

DIGITS = ("--device", "cpu", "--data.source", "digits")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed"
)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_numbers_of_the_records(tmp_path: Path):
    """Also of a run that is continued: the records after the checkpoint are written once."""
    options = {"loggers": ["csv"], "ema_decay": 0.9}
    run(make_config(tmp_path, max_steps=7, **options))
    state = load_last(tmp_path)
    log = CsvLog(tmp_path / "metrics.csv", records(tmp_path))
    log.add_record({"kind": "train", "step": 8, "epoch": 2, "loss": 1e9})  # lost by a crash
    log.close()
    run(make_config(tmp_path, **options), state=state)
    found, expected = rows(tmp_path), [r for r in records(tmp_path) if r["kind"] != "options"]
    assert len(found) == len(expected) == 3 * STEPS + 4
    for row, record in zip(found, expected):
        values = {key: value for key, value in row.items() if value}
        assert values.keys() == {key for key, value in record.items() if value is not None}
        assert values.pop("kind") == record["kind"]
        assert all(float(value) == record[key] for key, value in values.items())
    assert (tmp_path / "metrics.csv").read_text().startswith("kind,step,epoch,loss,lr,")


def test_texts_are_left_out_of_the_table(tmp_path: Path):
    log = CsvLog(tmp_path / "metrics.csv", [])
    log.add_record({"kind": "spike", "step": 3, "epoch": 1, "samples": ["=1+1"], "loss": 2.5, "mean": None})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "kind,step,epoch,loss\nspike,3,1,2.5\n"


def test_a_table_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch, caplog):
    log = CsvLog(tmp_path / "metrics.csv", [{"kind": "train", "step": 1, "epoch": 1, "loss": 2.5}])

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv_log.os, "write", refuse)
    for step in (2, 3):
        log.add_record({"kind": "train", "step": step, "epoch": 1, "loss": 2.0})
    path = tmp_path / "metrics.csv"
    reason = "No space left on device; no more is written"
    assert caplog.messages == [f"warning: {path} cannot be written: {reason}"]
    log.close()
    assert len(rows(tmp_path)) == 1


def test_negative_numbers_stay_numbers_in_a_table_with_new_columns(tmp_path: Path):
    log = CsvLog(tmp_path / "metrics.csv", [])
    log.add_record({"kind": "train", "step": 1, "epoch": 1, "gain": -0.1, "count": -3})
    log.add_record({"kind": "validation", "step": 2, "epoch": 1, "top1": 50.0})
    log.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "kind,step,epoch,gain,count,top1",
        "train,1,1,-0.1,-3,",
        "validation,2,1,,,50.0",
    ]


@pytest.mark.parametrize("damage", [b"\xff,1,1,2.5\n", b"train,1,1,2.5,7,8\n"])
def test_a_damaged_row_stays_in_the_table(tmp_path: Path, damage: bytes):
    log = CsvLog(tmp_path / "metrics.csv", [{"kind": "train", "step": 1, "epoch": 1, "loss": 2.5}])
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(damage)
    log.add_record({"kind": "validation", "step": 2, "epoch": 1, "top1": 50.0})
    log.close()
    assert [row["top1"] for row in rows(tmp_path)] == ["", "", "50.0"]
    assert all(row.keys() == {"kind", "step", "epoch", "loss", "top1"} for row in rows(tmp_path))


def test_a_table_that_is_no_csv_does_not_end_the_run(tmp_path: Path, caplog):
    path = tmp_path / "metrics.csv"
    log = CsvLog(path, [])
    with path.open("ab") as file:
        file.write(b"train,1\r2,3\n")
    for step in (2, 3):
        log.add_record({"kind": "validation", "step": step, "epoch": 1, "top1": 50.0})
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"warning: {path} cannot be written: new-line character seen")
    assert caplog.messages[0].endswith("; no more is written")


def test_the_table_is_not_written_through_links(tmp_path: Path):
    outside = Outside(tmp_path / "outside")
    (tmp_path / "run").mkdir()
    outside.plant(tmp_path / "run" / "metrics.csv", is_folder=False, exists=True)
    with pytest.raises(UserError) as refused:
        RunLog(tmp_path / "run", make_config(tmp_path, loggers=["csv"]), 0, True)
    path = tmp_path / "run" / "metrics.csv"
    reason = f"the log cannot be written to {path}: is a symbolic link, which is not followed"
    assert str(refused.value) == f"output: {reason}"
    assert outside.changes() == []


def test_changed_options_of_a_continued_run_are_recorded(tmp_path: Path):
    run(make_config(tmp_path, max_steps=7))
    state = load_last(tmp_path)
    for _ in range(2):  # the second one continues from the same checkpoint, after a crash
        run(make_config(tmp_path, lr=0.01, loggers=["tensorboard", "csv"], max_steps=12), state=state)
    changes = [record for record in records(tmp_path) if record["kind"] == "options"]
    expected = {
        "schedule.lr": (0.02, 0.01),
        "schedule.max_steps": (7, 12),
        "loggers": ([], ["tensorboard", "csv"]),
    }
    assert {record["option"]: (record["old"], record["new"]) for record in changes} == expected
    assert len(changes) == 3
    assert {(record["step"], record["epoch"]) for record in changes} == {(7, 2)}
    run(make_config(tmp_path, lr=0.01, max_steps=14, loggers=["csv"]), state=load_last(tmp_path))
    assert [record["option"] for record in records(tmp_path) if record["kind"] == "options"][3:] == [
        "schedule.max_steps",
        "loggers",
    ]


def test_every_logger_opens_a_log(tmp_path: Path, monkeypatch):
    """A name in vil/config.py alone would be accepted and ignored."""
    for name in ("WandbLog", "MlflowLog"):
        monkeypatch.setattr(run_log, name, lambda folder, config: TensorBoardLog(None))
    for name in get_args(Logger):
        log = RunLog(tmp_path, make_config(tmp_path, loggers=[name]), 0, False)
        assert len(log._copies) == 1, name
        log.close()


def test_an_unknown_logger_is_refused():
    with pytest.raises(UserError) as refused:
        parse(TrainConfig, ["--loggers", "csv", "neptune"])
    reason = "expected a list of one of tensorboard, csv, wandb, mlflow, got ['csv', 'neptune']"
    assert str(refused.value) == f"command line: loggers: {reason}"


def test_loggers_on_the_command_line():
    for words, expected in ((["csv"], ["csv"]), (["csv", "wandb"], ["csv", "wandb"]), (["[]"], [])):
        assert parse(TrainConfig, ["--loggers", *words]).config.loggers == expected
    assert parse(TrainConfig, []).config.loggers == ["tensorboard"]


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow or mlflow-skinny")])
def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch, name: str, package: str):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else original(n))
    with pytest.raises(UserError) as refused:
        train_program.main(["--loggers", name, "--output", str(tmp_path / "run"), *DIGITS])
    reason = f"{name} needs the package {package}, which is not installed"
    assert str(refused.value) == f"command line: loggers: {reason}"
    assert not (tmp_path / "run").exists()
    check_loggers(["csv", "tensorboard"])


@needs_wandb
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "cats"
    run(make_config(folder, loggers=["wandb"], max_steps=7))
    run(make_config(folder, loggers=["wandb"]), state=load_last(folder))
    run_id = json.loads((folder / "trackers.json").read_text())["wandb"]
    written = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in written] == [f"run-{run_id}.wandb"] * len(written)
    content = b"".join(path.read_bytes() for path in written)
    for text in (b"train/loss", b"validation/top1", b"schedule.lr", b"cats"):
        assert text in content
    for path in [*written, *folder.glob("wandb/offline-run-*/files/wandb-metadata.json")]:
        assert b"--output" not in path.read_bytes()


@needs_mlflow
def test_links_in_the_mlflow_store_are_refused(tmp_path: Path):
    RunLog(tmp_path, make_config(tmp_path, loggers=["mlflow"]), 0, True).close()
    (metrics,) = (tmp_path / "mlruns").rglob("metrics")
    metrics.rmdir()
    (tmp_path / "outside").mkdir()
    metrics.symlink_to(tmp_path / "outside")
    with pytest.raises((OSError, UserError), match="is a symbolic link, which is not followed"):
        RunLog(tmp_path, make_config(tmp_path, loggers=["mlflow"]), 0, True)
    assert not list((tmp_path / "outside").iterdir())


@needs_mlflow
def test_mlflow_file_store(tmp_path: Path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "cats"
    run(make_config(folder, loggers=["mlflow"], max_steps=7))
    state = load_last(folder)
    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    log = RunLog(folder, make_config(folder, loggers=["mlflow"]), 7, True)
    lost = {"loss": 0.5, "lr": 0.25}
    log.write("train", 8, 2, **lost)  # written before a crash, and again by the continued run
    log.close()
    run_id = json.loads((folder / "trackers.json").read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "KILLED"
    run(make_config(folder, loggers=["mlflow"], lr=0.01), state=state)
    found = client.get_run(run_id)
    assert (found.info.run_name, found.info.status) == ("cats", "FINISHED")
    assert found.data.params["schedule.lr"] == "0.02"
    history = client.get_metric_history(run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 3 * STEPS + 1))
    last = records(folder)[-1]
    assert found.data.metrics["validation/top1"] == last["top1"]
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run_id}


@needs_mlflow
def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level(logging.WARNING, "vil")
    log = RunLog(tmp_path, make_config(tmp_path, loggers=["mlflow"]), 0, True)
    (tracker,) = log._copies

    def fail(**_: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(tracker._client, "log_batch", lambda *_, **__: fail())
    for step in (1, 2):
        log.write("train", step, 1, loss=0.5)
    log.close()
    assert caplog.messages == ["warning: mlflow: the server is gone; no more is logged there"]
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


@needs_mlflow
def test_a_server_that_does_not_answer_delays_the_end_of_the_run_alone(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(experiment_trackers, "FINISH_TIMEOUT_S", 0.1)
    caplog.set_level(logging.WARNING, "vil")
    log = RunLog(tmp_path, make_config(tmp_path, loggers=["mlflow"]), 0, True)
    (tracker,) = log._copies
    answer = threading.Event()
    monkeypatch.setattr(tracker._client, "log_batch", lambda *_, **__: answer.wait(60))
    for step in (1, 2):
        log.write("train", step, 1, loss=0.5)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    log.close()
    assert not answer.is_set()
    answer.set()
    assert caplog.messages == ["warning: mlflow: no answer within 0.1 s; no more is logged there"]


@needs_mlflow
def test_numbers_that_wait_for_a_slow_server_are_sent_together(tmp_path: Path, monkeypatch):
    """Else the server would fall behind, and the end of the run would not wait for all of them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log = RunLog(tmp_path, make_config(tmp_path, loggers=["mlflow"]), 0, True)
    (tracker,) = log._copies
    has_begun, may_answer = threading.Event(), threading.Event()
    original, sizes = tracker._client.log_batch, []

    def log_batch(run_id: str, metrics: list) -> None:
        has_begun.set()
        may_answer.wait(60)
        sizes.append(len(metrics))
        original(run_id, metrics=metrics)

    monkeypatch.setattr(tracker._client, "log_batch", log_batch)
    log.write("train", 1, 1, loss=0.5)
    assert has_begun.wait(60)
    for step in range(2, 1203):
        log.write("train", step, 1, loss=0.5)
    may_answer.set()
    log.close(is_finished=True)
    assert sizes == [1, 1000, 201]
    run = tracker._client.get_run(tracker._id)
    assert run.info.status == "FINISHED"
    history = tracker._client.get_metric_history(tracker._id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 1203))


@needs_mlflow
def test_an_id_that_is_a_path_is_replaced(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "trackers.json").write_text('{"mlflow": "../../elsewhere"}')
    RunLog(tmp_path, make_config(tmp_path, loggers=["mlflow"]), 0, True).close()
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"].isalnum()


def test_the_packages_are_needed_on_rank_0_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "wandb" else original(n))
    called = []

    def call_on_main(function: Callable[[], object]) -> object:
        """Run as on another rank, which gets the first result, the configuration, from rank 0."""
        called.append(function)
        return function() if len(called) == 1 else None

    monkeypatch.setattr(train_program, "call_on_main", call_on_main)
    trained = []
    monkeypatch.setattr(train_program, "run", lambda *_: trained.append(True))
    train_program.main(["--loggers", "wandb", "--output", str(tmp_path / "run"), *DIGITS])
    assert trained == [True]


def test_records_of_a_continued_run_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Records(list[Any]):
        """A list that can be referenced weakly."""

    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "epoch": 1, "loss": 2.5}\n')
    original, references = metrics_log.cut_metrics, []

    def cut_metrics(*arguments: Any) -> Records:
        records = Records(original(*arguments))
        references.append(weakref.ref(records))
        return records

    for module in (metrics_log, run_log):
        monkeypatch.setattr(module, "cut_metrics", cut_metrics)
    log = RunLog(tmp_path, make_config(tmp_path, loggers=["csv", "tensorboard"]), 1, True)
    gc.collect()
    assert [reference() for reference in references] == [None]
    assert len(rows(tmp_path)) == 1
    log.close()


def test_trackers_get_base_names(tmp_path: Path):
    config = make_config(tmp_path / "cats", loggers=["mlflow"])
    config.data.root, config.data.val_list = str(tmp_path / "someone" / "photos") + "/", "../lists/val.txt"
    config.model.init_from, config.model.timm_options = "../private/x.pt", {"file": str(tmp_path / "y.pt")}
    found = _options(config)
    assert (found["output"], found["data.root"], found["data.val_list"]) == ("cats", "photos", "val.txt")
    assert (found["model.init_from"], found["model.timm_options"]) == ("x.pt", {"file": "y.pt"})
    assert (found["data.source"], found["data.list_file"]) == (config.data.source, None)
    assert found["model.name"] == config.model.name
