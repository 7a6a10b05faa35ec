import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.run_files import is_equal, records
from helpers.tiny_run import load_last, make_config, run

from vil.checkpoints import run_folder
from vil.checkpoints.checkpoint_files import BEST, check_digest, digest_file, keep_damaged, step_files
from vil.checkpoints.training_state import read_training_state
from vil.command_line import parse
from vil.config import TrainConfig
from vil.errors import UserError


def start(folder: Path, **options) -> TrainConfig:
    config = make_config(folder, max_steps=5, **options)
    run(config)
    return config


def test_a_new_folder_is_created_and_removed_with_a_run_that_never_started(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    with run_folder.lock_run_folder(folder):
        assert run_folder.open_run(folder, make_config(folder)) is None
        assert not run_folder.contains_run(folder)
        assert run_folder.open_run(folder, make_config(folder, resume="never")) is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with run_folder.lock_run_folder(tmp_path / "mine"):
        (tmp_path / "mine" / "notes").touch()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_a_run_is_continued_or_refused(tmp_path: Path):
    config = start(tmp_path)
    assert run_folder.contains_run(tmp_path)
    state = run_folder.open_run(tmp_path, config)
    assert state is not None
    assert state["step"] == 5
    with pytest.raises(UserError, match=r"^output: .* holds a run"):
        run_folder.open_run(tmp_path, replace(config, resume="never"))


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"^output: .*/file/run cannot be written: Not a directory"),
        run_folder.lock_run_folder(tmp_path / "file" / "run"),
    ):
        pass

    def fail(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", fail)
    with pytest.raises(UserError, match="Read-only file system"):
        run_folder.open_run(tmp_path / "run", make_config(tmp_path))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "name", "vil_small"),
        ("model", "drop_path", 0.3),
        ("data", "source", "folder"),
        ("schedule", "batch_size", 32),
        ("schedule", "optimizer", "sgd"),
        ("schedule", "optimizer_options", {"amsgrad": True}),
        ("", "seed", 5),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, section: str, field: str, value):
    config = start(tmp_path)
    target = getattr(config, section) if section else config
    before = getattr(target, field)
    setattr(target, field, value)
    with pytest.raises(UserError) as caught:
        run_folder.open_run(tmp_path, config)
    assert caught.value.location == (f"{section}.{field}" if section else field)
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
    parsed = parse(TrainConfig, ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path)]).config
    assert parsed == replace(config, resume="auto")  # naming it means to continue
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["schedule"]["betas"] == [0.8, 0.9]


def test_finished_runs(tmp_path: Path):
    config = start(tmp_path)
    state = load_last(tmp_path)
    assert run_folder.finished_top1(tmp_path, state, config) is None  # no summary yet
    (tmp_path / "summary.json").write_text(json.dumps([{"top1": 97.5}]))
    assert run_folder.finished_top1(tmp_path, state, config) == 97.5
    for invalid in (-1, 1e3, float("nan"), None):
        (tmp_path / "summary.json").write_text(json.dumps([{"top1": invalid}]))
        assert run_folder.finished_top1(tmp_path, state, config) is None
    (tmp_path / "summary.json").write_text(json.dumps([{"top1": 97.5}]))
    config.schedule.max_steps = 6
    assert run_folder.finished_top1(tmp_path, state, config) is None
    (tmp_path / "summary.json").write_text("[]")
    config.schedule.max_steps = 5
    assert run_folder.finished_top1(tmp_path, state, config) is None


def test_a_continued_run_is_not_finished(tmp_path: Path):
    """Killed before it reports, it must not keep the old accuracy."""
    start(tmp_path)
    (tmp_path / run_folder.SUMMARY).write_text(json.dumps([{"top1": 97.5}]))
    longer = make_config(tmp_path, max_steps=6)
    run(longer, state=load_last(tmp_path))
    state = load_last(tmp_path)
    assert state["step"] == 6
    assert run_folder.finished_top1(tmp_path, state, longer) is None


def test_only_leftovers_of_a_killed_save_are_removed(tmp_path: Path):
    """A partial file, a digest without a file, and one whose old file was removed."""
    config = start(tmp_path)
    folder = step_files(tmp_path)[0][1].parent
    before = {path.name for path in folder.iterdir()}
    for name in ("step_00000009.pt.tmp", "step_00000009.pt.sha256", "step_00000001.pt.sha256.tmp"):
        (folder / name).touch()
    (folder / "step_00000002.pt").touch()  # without its digest: damaged, and kept
    (folder / "notes.txt").touch()
    run_folder.begin_run(tmp_path, config)
    assert {path.name for path in folder.iterdir()} == before | {"step_00000002.pt", "notes.txt"}


def test_a_configuration_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(UserError, match=r"^output: .* cannot be written: Is a directory$"):
        run(make_config(tmp_path))


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"^output: the log cannot be written to .*: Is a directory$"):
        run(make_config(tmp_path))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_skipped_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = make_config(tmp_path, epochs=3)
    run(config)
    (_, newest), (_, older) = step_files(tmp_path)
    damage(newest)
    state = run_folder.open_run(tmp_path, config)
    assert state is not None
    assert state["step"] == 10
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: skipping {newest}: damaged: does not match its digest in {newest.name}.sha256"
    ]
    digest_file(older).unlink()
    damage(tmp_path / BEST)
    with pytest.raises(UserError, match=r"^output: none of the 3 checkpoints in .* can be read; name "):
        run_folder.open_run(tmp_path, config)
    assert f"{older}: its digest {older.name}.sha256 is missing" in caplog.text
    assert [path for _, path in step_files(tmp_path)] == [newest, older]


def test_a_run_continues_from_the_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """If the others are damaged or missing: starting over would give another best one."""
    config = make_config(tmp_path, epochs=3, keep_checkpoints=1)
    run(config)
    best = read_training_state(tmp_path / BEST)
    (_, newest) = step_files(tmp_path)[0]
    damage(newest)
    state = run_folder.open_run(tmp_path, config)
    assert state["step"] == best["step"]
    assert f"skipping {newest}" in caplog.text
    newest.unlink()
    assert run_folder.contains_run(tmp_path)
    assert run_folder.open_run(tmp_path, config)["step"] == best["step"]
    damage(tmp_path / BEST)
    with pytest.raises(UserError, match="none of the 1 checkpoints"):
        run_folder.open_run(tmp_path, config)


@pytest.mark.parametrize("what", ["os.listdir", "vil.checkpoints.checkpoint_files.open_regular"])
def test_a_temporarily_unreadable_checkpoint_is_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    """A file server that is briefly unavailable must not make a run start over or lose steps."""
    config = make_config(tmp_path, epochs=3)
    run(config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(what, lambda *a, **b: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        with pytest.raises(UserError, match=r"^output: .*checkpoints.* cannot be read: Stale file handle$"):
            run_folder.open_run(tmp_path, config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run_folder.open_run(tmp_path, config)["step"] == 15


def test_damaged_files_are_kept_under_unused_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "best.pt"
    for number in range(3):
        path.unlink(missing_ok=True)
        path.write_text(f"{number}")
        keep_damaged(path)
    (tmp_path / "best.pt.damaged").unlink()
    keep_damaged(path)
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError(95, "Not supported")))
    keep_damaged(path)
    path.write_text("3")
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        keep_damaged(path)
    assert path.read_text() == "3"  # on a full disk nothing would take its place
    path.unlink()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "best.pt.damaged": "2", "best.pt.damaged1": "1", "best.pt.damaged2": "2", "best.pt.damaged3": "2",
    }  # fmt: skip


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path: Path):
    run(make_config(tmp_path, max_steps=10, keep_checkpoints=2))
    damage(step_files(tmp_path)[0][1])
    run(
        make_config(tmp_path, max_steps=13, keep_checkpoints=2),
        state=read_training_state(step_files(tmp_path)[1][1]),
    )
    whole = []
    for step, path in step_files(tmp_path):
        with suppress(UserError):
            check_digest(path, required=True)
            whole.append(step)
    assert len(whole) == 2


def test_a_run_replaces_a_damaged_checkpoint(tmp_path: Path):
    """With the same result; the damaged file is kept under another name."""
    config = make_config(tmp_path / "a", epochs=3, keep_checkpoints=2)
    run(config)
    whole = load_last(tmp_path / "a")["model"]
    newest = step_files(tmp_path / "a")[0][1]
    damage(newest)
    damaged = newest.read_bytes()
    run(config, state=run_folder.open_run(tmp_path / "a", config))
    assert is_equal(whole, load_last(tmp_path / "a")["model"])
    assert newest.with_name(newest.name + ".damaged").read_bytes() == damaged


def test_the_best_checkpoint_is_restored_or_chosen_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = start(tmp_path)
    best = tmp_path / BEST
    content = best.read_bytes()
    damage(best)
    state = run_folder.open_run(tmp_path, config)
    assert state["best"] is not None
    assert best.read_bytes() == content
    assert caplog.records[-1].getMessage().endswith(f"; restored from {step_files(tmp_path)[0][1]}")
    damage(best)
    run(make_config(tmp_path, epochs=4, lr=1e-9, max_steps=15), state=state)  # which keeps no file of then
    state = run_folder.open_run(tmp_path, config)
    assert state["best"] is None
    assert "the best of the remaining evaluations replaces it" in caplog.records[-1].getMessage()
    run(make_config(tmp_path, epochs=4, lr=1e-9), state=state)
    assert [record["step"] for record in records(tmp_path, "validation")] == [5, 10, 15, 20]
    assert read_training_state(best)["best"]["epoch"] == 4


def test_a_disk_without_room_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"^output: .*: the checkpoints need about .* MB, 0 MB are free$"):
        run(make_config(tmp_path))
    assert not run_folder.contains_run(tmp_path)


def test_a_run_that_cannot_begin_leaves_no_run_behind(tmp_path: Path):
    with pytest.raises(UserError):
        run(make_config(tmp_path, optimizer="adamm"))
    assert not run_folder.contains_run(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
