"""Untrusted run folders and output folders: nothing outside of them is changed or deleted."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import forked
from helpers.planted import Outside, snapshot

import train as program
from vil.checkpoints import checkpoint_files, run_folder
from vil.checkpoints.run_folder import FolderLock
from vil.checkpoints.training_state import copy_training_state, write_training_state
from vil.config import DataConfig, TrainConfig
from vil.errors import UserError
from vil.runtime import run_files
from vil.training.run_log import RunLog

ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--schedule.epochs", "1", "--schedule.max_steps", "1", "--data.workers", "0"]


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    return Outside(tmp_path / "outside")


def train(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [forked.python(), "train.py", *TINY, "--output", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "dangling"])
def test_links_of_files_in_a_run_folder(tmp_path: Path, outside: Outside, exists: bool):
    """Under the names of its files, and of temporary files of older versions."""
    (tmp_path / "disk").mkdir()
    folder = tmp_path / "run"
    folder.symlink_to("disk")  # the user's own --output may be a link
    # A configuration that is there is read; a log that is not there is refused: see below.
    names = ["summary.json", "bad_images.txt", "metrics.jsonl" if exists else "config.yaml"]
    for name in (*names, *(f"{name}.tmp" for name in names)):
        outside.plant(folder / name, False, exists)
    done = train(folder)
    assert outside.changes() == []
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "disk" / "summary.json").read_text())) == 1


@pytest.mark.parametrize("name", [".lock", "checkpoints", "tensorboard", "metrics.jsonl"])
@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "dangling"])
def test_links_that_are_refused(tmp_path: Path, outside: Outside, name: str, exists: bool):
    if name == "metrics.jsonl" and exists:
        pytest.skip("is replaced by a file of its own")
    folder = tmp_path / "run"
    folder.mkdir()
    outside.plant(folder / name, name in ("checkpoints", "tensorboard"), exists)
    with pytest.raises(UserError, match=rf"output: .*{name}.* is a symbolic link, which is not followed$"):
        program.main([*TINY, "--output", str(folder)])
    assert outside.changes() == []


def test_a_linked_checkpoints_folder_is_not_cleaned(tmp_path: Path, outside: Outside):
    """Without this `*.tmp` and `*.sha256` in any folder of the user go."""
    (tmp_path / "run").mkdir()
    outside.plant(tmp_path / "run" / "checkpoints", is_folder=True, exists=True)
    for name in ("step_00000001.pt.tmp", "best.pt.sha256", "thesis.tmp", "disk.iso.sha256"):
        (outside.target / name).write_text("mine")
    before = snapshot(outside.folder)
    with pytest.raises(OSError, match="symbolic link"):
        checkpoint_files.remove_partial_files(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints cannot be written: is a symbolic link"):
        run_folder.begin_run(tmp_path / "run", TrainConfig())
    with pytest.raises(UserError, match=r"checkpoints cannot be written: is a symbolic link"):
        run_folder.open_run(tmp_path / "run", TrainConfig())
    assert snapshot(outside.folder) == before


def test_a_configuration_is_not_written_through_a_link(tmp_path: Path, outside: Outside):
    for name in ("config.yaml", "config.yaml.tmp"):
        outside.plant(tmp_path / name, is_folder=False, exists=True)
    run_folder.begin_run(tmp_path, TrainConfig())
    assert outside.changes() == []
    assert not (tmp_path / "config.yaml").is_symlink()


def test_only_files_of_a_save_are_removed(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("thesis.tmp", "disk.iso.sha256", "other.pt.sha256"):
        (tmp_path / "checkpoints" / name).write_text("mine")
    checkpoint_files.remove_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "disk.iso.sha256",
        "other.pt.sha256",
        "thesis.tmp",
    ]


def test_a_lock_is_not_truncated_before_it_is_held(tmp_path: Path, outside: Outside):
    for exists in (True, False):
        outside.plant(tmp_path / ".lock", is_folder=False, exists=exists)
        lock = FolderLock(tmp_path)
        with pytest.raises(UserError, match=r"^output: .*\.lock cannot be written: is a symbolic link"):
            lock.acquire()
        lock.release(remove=True)
        assert outside.changes() == []
        (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("who holds it")
    holder = FolderLock(tmp_path)
    holder.acquire()
    assert "who holds it" not in (tmp_path / ".lock").read_text()
    holder.release(remove=False)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_lock_that_is_not_a_file(tmp_path: Path, kind: str):
    if kind == "fifo":
        os.mkfifo(tmp_path / ".lock")
    else:
        (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be written: (is not a regular file|Is a directory)"):
        FolderLock(tmp_path).acquire()


def test_checkpoints_are_written_past_links(tmp_path: Path, outside: Outside):
    """Under the names of the files, and of temporary files of older versions."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("best.pt.tmp", "best.pt.sha256.tmp", "best.pt", "best.pt.sha256"):
        outside.plant(folder / name, is_folder=False, exists=True)
    write_training_state(folder / "best.pt", {"a": 1})
    copy_training_state(folder / "best.pt", folder / "step_00000001.pt")
    assert outside.changes() == []
    checkpoint_files.check_digest(folder / "best.pt", required=True)
    checkpoint_files.check_digest(folder / "step_00000001.pt", required=True)


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl"])
def test_a_log_is_not_written_through_links(tmp_path: Path, outside: Outside, name: str):
    outside.plant(tmp_path / name, is_folder=name == "tensorboard", exists=name == "tensorboard")
    with pytest.raises(UserError, match="symbolic link"):
        RunLog(tmp_path, TrainConfig(), 0, True)
    assert outside.changes() == []


def test_a_list_of_bad_images_is_not_written_through_links(tmp_path: Path, outside: Outside):
    from data.unreadable_images import UnreadableImages

    outside.plant(tmp_path / run_files.BAD_IMAGES, is_folder=False, exists=True)
    with pytest.raises(UserError, match=r"bad_images.txt cannot be written: is a symbolic link"):
        UnreadableImages(10, 1.0, tmp_path).add("image", "broken")
    assert outside.changes() == []


def test_a_lock_of_a_download_is_not_made_through_links(tmp_path: Path, outside: Outside):
    from data.sources.timm_datasets import TimmDataset

    outside.plant(tmp_path / ".download.lock", is_folder=False, exists=True)
    data = DataConfig(source="torch/no_such_set", root=str(tmp_path), download=True)
    with pytest.raises(UserError):
        TimmDataset.open(data, "val", "RGB")
    assert outside.changes() == []
