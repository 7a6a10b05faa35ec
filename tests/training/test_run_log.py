import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_run import STEPS, load_last, make_config, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from vil.runtime import console
from vil.runtime.run_files import METRICS
from vil.training.metrics_log import cut_metrics
from vil.training.run_log import RunLog
from vil.training.tensorboard_log import TensorBoardLog
from vil.training.trainer import Monitoring


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch: pytest.MonkeyPatch):
    """TensorBoard sorts files that a process writes in one second by number, as text: 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_are_cut_after_the_checkpoint(tmp_path: Path):
    path = tmp_path / METRICS
    lines = [
        json.dumps({"kind": kind, "step": step}) for step in (1, 2, 3) for kind in ("train", "validation")
    ]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    cut_metrics(path, 2, is_evaluated=True)
    assert path.read_text().splitlines() == lines[:4]
    cut_metrics(path, 2, is_evaluated=False)
    assert path.read_text().splitlines() == lines[:3]
    cut_metrics(path, 0, is_evaluated=True)
    assert path.read_text() == ""
    cut_metrics(tmp_path / "missing.jsonl", 2, is_evaluated=True)
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_last_line_without_line_feed_is_removed(tmp_path: Path):
    path = tmp_path / METRICS
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}')
    cut_metrics(path, 2, is_evaluated=True)  # the next record would be appended to this line
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_every_line_is_on_disk_at_once_and_valid(tmp_path: Path):
    log = RunLog(tmp_path, make_config(tmp_path), 0, True)
    log.write("train", 1, 1, loss=0.5, grad_norm=float("inf"))
    assert read(tmp_path)[0].items() >= {"kind": "train", "step": 1, "loss": 0.5, "grad_norm": None}.items()
    log.close()


def test_records_that_fsync_refuses_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As with a quota of NFS: write succeeds, fsync fails."""
    log = RunLog(tmp_path, make_config(tmp_path), 0, True)
    log.write("train", 1, 1, loss=0.5)
    log.flush()
    log.write("train", 2, 1, loss=0.25)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(122, "Disk quota exceeded")))
        with pytest.raises(OSError, match="quota"):
            log.flush()
        assert [record["step"] for record in read(tmp_path)] == [1]
    log.write("train", 3, 1, loss=0.125)
    assert log.finish() is None
    log.close()
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path, capsys):
    log = RunLog(None, make_config(tmp_path, loggers=["tensorboard"]), 0, True)
    log.write("train", 1, 1, loss=0.5)
    log.tensorboard.add_batch(torch.zeros(2, 3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    with log.progress_bar(1, 3, 0, 5) as bar:
        bar.update()
    log.print_line("nothing")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_line_per_epoch(tmp_path: Path, capsys):
    run(make_config(tmp_path, ema_decay=0.9))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch   1/3   loss ")
    assert all("Top-1 " in line and "EMA " in line for line in lines)


def test_tensorboard_holds_no_step_twice(tmp_path: Path):
    def options(**more):
        return make_config(tmp_path, loggers=["tensorboard"], ema_decay=0.9, **more)

    run(options(max_steps=STEPS))
    state = load_last(tmp_path)
    run(options(max_steps=STEPS + 3), state=state)  # these steps are lost: the checkpoint is the older one
    run(options(), state=state)
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"train/loss", "train/learning_rate", "train/grad_norm", "system/step_time"}
    assert tags >= {"validation/top1", "ema/top1", "system/data_wait", "system/evaluation_seconds"}
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 3 * STEPS + 1))
    records = [r for r in read(tmp_path) if r["kind"] == "validation"]
    top1 = [(event.step, round(event.value, 3)) for event in events.Scalars("validation/top1")]
    assert top1 == [(r["step"], round(r["top1"], 3)) for r in records]
    assert "label_smoothing" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert events.Tags()["images"] == ["train/augmented_batch"]


def test_options_and_metrics_are_in_tensorboards_table_of_hyperparameters(tmp_path: Path):
    run(make_config(tmp_path, loggers=["tensorboard"], ema_decay=0.9, betas=(0.8, 0.9)))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (started,) = (
        HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info
        for tag, metadata in events.summary_metadata.items()
        if tag == "_hparams_/session_start_info"
    )
    assert started.hparams["schedule.batch_size"].number_value == 16
    assert started.hparams["schedule.betas"].string_value == "[0.8, 0.9]"
    assert started.hparams["schedule.ema_warmup"].bool_value is False
    assert started.hparams["model.name"].string_value == "vil_tiny"
    experiment = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    compared = {info.name.tag for info in experiment.metric_infos}
    assert compared == {"validation/top1", "validation/loss", "ema/top1", "best/top1"}
    assert compared <= set(events.Tags()["scalars"])
    best = [event.value for event in events.Scalars("best/top1")]
    assert best == sorted(best)


def test_learning_rates_of_groups_are_logged_if_they_differ(tmp_path: Path):
    for name, decay in (("same", None), ("differ", 0.5)):
        run(make_config(tmp_path / name, loggers=["tensorboard"], layer_decay=decay, max_steps=2))
        events = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        rates = [tag for tag in events.Tags()["scalars"] if tag.startswith("learning_rate/")]
        assert bool(rates) == (decay is not None)
        if decay is not None:
            first = [events.Scalars(tag)[0].value for tag in rates]
            assert max(first) == events.Scalars("train/learning_rate")[0].value
            assert len(set(first)) > 1


def test_attention_maps_are_added_every_few_epochs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    options: dict[str, Any] = {"loggers": ["tensorboard"], "attention_every": 2}
    run(make_config(tmp_path / "a", **options), monitoring=Monitoring(lambda: image))
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"), {"images": 0}).Reload()
    assert [image.step for image in events.Images("attention")] == [2 * STEPS, 3 * STEPS]

    def fail() -> torch.Tensor:
        raise RuntimeError("out of\nmemory")

    run(make_config(tmp_path / "b", **options), monitoring=Monitoring(fail))
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["warning: no image of attention: out of memory"] * 2


def test_a_repeated_evaluation_is_shown_once(tmp_path: Path):
    """The run was killed after the evaluation was logged and before it was saved."""
    config = make_config(tmp_path, loggers=["tensorboard"], max_steps=STEPS)
    run(config)
    state = load_last(tmp_path) | {"finished_step": 0, "best": None}
    run(config, state=state)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/top1")] == [STEPS]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4, 5, 5]


def test_events_that_cannot_be_written_are_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    """TensorBoard opens its file for every write: remove the folder in the middle of a run."""
    log = RunLog(tmp_path, make_config(tmp_path, loggers=["tensorboard"]), 0, True)
    log.write("train", 1, 1, loss=0.5)
    log.flush()
    (tmp_path / "tensorboard").rename(tmp_path / "gone")
    for step in (2, 3, 4):
        log.write("train", step, 1, loss=0.5)
        log.flush()
    log.close()
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "warning: TensorBoard's events cannot be written: No such file or directory; no more are written"
    ]
    assert "Traceback" not in capsys.readouterr().err


def test_batches_are_shown_in_color(tmp_path: Path):
    log = TensorBoardLog(tmp_path)
    grids: list[torch.Tensor] = []
    log._writer.add_image = lambda tag, grid, step: grids.append(grid)
    config = make_config(tmp_path).data
    color = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, 1, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    log.add_batch(((color - mean) / std).expand(2, 3, 6, 6), config.mean, config.std)
    log.add_batch(torch.full((2, 1, 6, 6), -100.0), config.mean, config.std)  # gray images
    log.close()
    assert torch.allclose(grids[0][:, 4, 4], color.flatten(), atol=1e-6)
    assert grids[1].shape[0] == 3
    assert grids[1].min() == 0


def test_without_a_terminal_lines_show_the_progress_within_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(console, "PROGRESS_INTERVAL_S", 0.0)
    run(make_config(tmp_path / "lines", progress=True, log_every=1, epochs=1))
    output = capsys.readouterr()
    *lines, last = (line for line in output.out.splitlines() if line.startswith("epoch"))
    number = r"\d[\d.,e+-]*"
    for step, line in enumerate(lines, 1):
        rest = rf"loss {number}   lr {number}   {number} images/s"
        assert re.fullmatch(rf"epoch   1/1   step {step}/{STEPS}   {rest}", line)
    assert len(lines) == STEPS - 1
    assert "Top-1" in last
    assert "evaluate: 100 %, " in output.err
    run(make_config(tmp_path / "none", progress=False, log_every=1, epochs=1))
    output = capsys.readouterr()
    assert output.out.count("epoch") == 1
    assert "evaluate" not in output.err


def test_lines_of_progress_keep_their_distance_from_other_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    seconds = 0.0
    monkeypatch.setattr("time.monotonic", lambda: seconds)
    log = RunLog(tmp_path, make_config(tmp_path, progress=True), 0, True)
    for seconds in range(30, 240, 30):
        log.print_progress(f"{seconds} s")
        if seconds == 90:
            log.print_line("end of an epoch")
    log.close()
    assert capsys.readouterr().out.splitlines() == ["60 s", "end of an epoch", "150 s", "210 s"]


def test_a_log_whose_file_system_is_gone_is_closed(tmp_path: Path):
    log = RunLog(tmp_path, make_config(tmp_path, loggers=["csv"]), 0, True)
    os.close(log.metrics._file.fileno())  # as the network file system, whose next close fails
    log.close()
