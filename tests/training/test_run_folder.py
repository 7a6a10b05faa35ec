import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_run import make_config, run

from vil.command_line import parse
from vil.config import ConfigError, TrainConfig
from vil.training import checkpoint, run_folder


def start(folder: Path, **options) -> TrainConfig:
    config = make_config(folder, max_steps=5, **options)
    run(config)
    return config


def test_a_new_folder_is_made_ready(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    assert run_folder.open_run(folder, make_config(folder)) is None
    assert (folder / "checkpoints").is_dir()
    assert not run_folder.holds_run(folder)
    assert run_folder.open_run(folder, make_config(folder, resume="never")) is None


def test_a_run_is_continued_or_refused(tmp_path: Path):
    config = start(tmp_path)
    assert run_folder.holds_run(tmp_path)
    state = run_folder.open_run(tmp_path, config)
    assert state is not None
    assert state["step"] == 5
    with pytest.raises(ConfigError, match=r"^output: .* holds a run"):
        run_folder.open_run(tmp_path, replace(config, resume="never"))


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^output: .*/file/run cannot be written: Not a directory"):
        run_folder.open_run(tmp_path / "file" / "run", make_config(tmp_path))

    def fail(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", fail)
    with pytest.raises(ConfigError, match="Read-only file system"):
        run_folder.open_run(tmp_path / "run", make_config(tmp_path))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "name", "vil_small"),
        ("model", "drop_path", 0.3),
        ("data", "source", "folder"),
        ("schedule", "batch_size", 32),
        ("schedule", "optimizer", "sgd"),
        ("", "seed", 5),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, section: str, field: str, value):
    config = start(tmp_path)
    target = getattr(config, section) if section else config
    before = getattr(target, field)
    setattr(target, field, value)
    with pytest.raises(ConfigError) as caught:
        run_folder.open_run(tmp_path, config)
    assert caught.value.key == (f"{section}.{field}" if section else field)
    assert f"has {before}, not {value}" in caught.value.reason


def test_other_differences_are_allowed_and_listed(tmp_path: Path):
    config = start(tmp_path)
    config.schedule.epochs, config.data.workers, config.output = 7, 0, "elsewhere"
    config.model.num_classes = None  # left to the data
    state = run_folder.open_run(tmp_path, config)
    assert state is not None
    assert run_folder.differences(state["config"], config) == [
        ("schedule.epochs", 3, 7),
        ("data.workers", 4, 0),
    ]


def test_the_stored_configuration_reads_back(tmp_path: Path):
    config = make_config(tmp_path, resume="never", betas=(0.8, 0.9))
    run_folder.write_config(tmp_path, config)
    parsed = parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")]).config
    assert parsed == replace(config, resume="auto")  # who names it wants to go on
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["schedule"]["betas"] == [0.8, 0.9]


def test_finished_runs(tmp_path: Path):
    config = start(tmp_path)
    state = checkpoint.load(tmp_path / checkpoint.LAST)
    assert run_folder.finished_top1(tmp_path, state, config) is None  # no summary yet
    (tmp_path / "summary.json").write_text(json.dumps([{"top1": 97.5}]))
    assert run_folder.finished_top1(tmp_path, state, config) == 97.5
    config.schedule.max_steps = 6
    assert run_folder.finished_top1(tmp_path, state, config) is None
    (tmp_path / "summary.json").write_text("[]")
    config.schedule.max_steps = 5
    assert run_folder.finished_top1(tmp_path, state, config) is None


def test_a_run_that_goes_on_is_no_longer_finished(tmp_path: Path):
    """Killed before it reports, it must not claim the old accuracy for ever."""
    start(tmp_path)
    (tmp_path / run_folder.SUMMARY).write_text(json.dumps([{"top1": 97.5}]))
    longer = make_config(tmp_path, max_steps=6)
    run(longer, state=checkpoint.load(tmp_path / checkpoint.LAST))
    state = checkpoint.load(tmp_path / checkpoint.LAST)
    assert state["step"] == 6
    assert run_folder.finished_top1(tmp_path, state, longer) is None


def test_a_configuration_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"^output: .* cannot be written: Is a directory$"):
        run(make_config(tmp_path))


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"^output: the log cannot be written to .*: Is a directory$"):
        run(make_config(tmp_path))


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    config = start(tmp_path)
    (tmp_path / checkpoint.LAST).write_bytes(b"damage")
    with pytest.raises(ConfigError, match=r"last\.pt"):
        run_folder.open_run(tmp_path, config)


def test_a_run_that_cannot_begin_leaves_no_run_behind(tmp_path: Path):
    with pytest.raises(ConfigError):
        run(make_config(tmp_path, optimizer="adamm"))
    assert not run_folder.holds_run(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
