"""Every kind of unusable input: one line that names the key (and the file), status 2, nothing written."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as eval_program
import train as train_program
from tools.ablation import main as ablate_program
from tools.programs import average_checkpoints as average_program
from tools.report_page import main as report_program
from vil import command_line
from vil.errors import UserError
from vil.runtime import distributed

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "models" / "vil_tiny.yaml")
DIGITS = str(ROOT / "configs" / "data" / "digits.yaml")
GRID = str(ROOT / "configs" / "ablations" / "pooling_digits.yaml")
LONG = "x" * 300


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Call a program that must fail; return its error line."""
    output = tmp_path / "output"
    monkeypatch.chdir(tmp_path)

    def call(main, *argv):
        given = [*map(str, argv), *(["--output", str(output)] if main is train_program.main else [])]
        monkeypatch.setattr(sys, "argv", ["program", *given])
        with pytest.raises(SystemExit) as exit_:
            command_line.main(main)
        captured = capsys.readouterr()
        assert exit_.value.code == 2, captured
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
        assert not list(output.rglob("*.*")), "something was written"
        return captured.err

    return call


def folder_of_images(root, tree):
    for name, count in tree.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--model.widnow", "3"],
            "command line: --model.widnow: unknown option; did you mean --model.window?",
        ),
        (
            ["--schedule.epochs", "many"],
            "command line: schedule.epochs: expected an integer of at least 1, got 'many'",
        ),
        (["--data.source", "folder"], "data.root"),
        (["--data.source", "folder", "--data.root", "absent"], "data.root: "),
        (["--data.source", "torch/nothing", "--data.root", "."], "data.root: torch/nothing cannot be read"),
        (["--schedule.batch_size", "10", "--schedule.accumulation", "4"], "schedule.batch_size: "),
        (["--schedule.batch_size", "2000"], "schedule.batch_size: "),
        (["--model.image_size", "8"], "model.image_size: 8×8 pixels are too few for stage 3 of 3"),
        (["--model.pool", "cls", "--model.global_tokens", "0"], "model.pool: cls needs a global token"),
        (["--model.pool", "cls"], "model.pool: cls needs a global token"),
        (["--model.num_classes", "5"], "model.num_classes: "),
        (["--model", TINY, "--model.name", "vil_tinny"], "model.name: there is no model 'vil_tinny'"),
        (["--schedule.optimizer", "adamm"], "schedule.optimizer: "),
        (["--schedule.augment.auto_augment", "best"], "schedule.augment.auto_augment: "),
        (["--schedule.lr", "-1"], "schedule.lr: expected a number above 0, got -1"),
        (["--model.attention_backend", "fast"], "model.attention_backend: "),
        (
            ["--model.attention_backend", "fused", "--model.attention_dropout", "0.1"],
            "model.attention_backend: the fused backend has no dropout of attention weights, got 0.1",
        ),
        (["--device", "cuda"], "device: "),
        (["--device", "toaster"], "device: "),
        (["--schedule.augment.mixup", "0.8", "--schedule.batch_size", "63"], "schedule.batch_size: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_used(refused, argv, message):
    if argv == ["--device", "cuda"] and torch.cuda.is_available():
        argv = ["--device", "cuda:99"]
    assert message in refused(train_program.main, *argv)


def test_a_backend_that_the_device_lacks(refused, monkeypatch):
    monkeypatch.setattr("vil.attention.local.fused.INTERPRETED", False)
    message = "model.attention_backend: the fused backend needs a GPU, this is cpu"
    argv = ["--model.attention_backend", "fused"]
    assert message in refused(train_program.main, "--device", "cpu", *argv)
    assert message in refused(
        eval_program.main, "--device", "cpu", "--model.name", "vil_tiny", *argv, "--complexity"
    )
    monkeypatch.setenv("VIL_ATTENTION_BACKEND", "fused")
    assert message in refused(train_program.main, "--device", "cpu", "--schedule.epochs", "1")
    monkeypatch.setenv("VIL_ATTENTION_BACKEND", "fast")
    assert "VIL_ATTENTION_BACKEND: backend must be one of auto, " in refused(
        train_program.main, "--schedule.epochs", "1"
    )


def test_bfloat16_where_the_device_lacks_it(refused, monkeypatch):
    """A GPU before Ampere, as the precision check sees it."""

    @contextlib.contextmanager
    def old_gpu(device, timeout, start_timeout):
        yield distributed.Process(0, 0, 1, torch.device("cuda"))

    monkeypatch.setattr(distributed, "start", old_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    line = refused(train_program.main, "--precision", "bfloat16", "--schedule.epochs", "1")
    assert line.startswith("error: command line: precision: ")
    assert "bfloat16" in line
    assert "an old GPU" in line


def test_unknown_key_in_a_file_is_named_with_the_nearest_one(refused, tmp_path):
    path = write(tmp_path / "model.yaml", "name: vil_tiny\nimage_sise: 64\n")
    line = refused(train_program.main, "--model", path)
    assert line == f"error: {path}: model.image_sise: unknown key; did you mean model.image_size?\n"


def test_an_impossible_value_is_named_with_its_file(refused, tmp_path):
    path = write(tmp_path / "model.yaml", "name: vil\nimage_size: 32\nstages: [{dim: 30, heads: 4}]\n")
    line = refused(train_program.main, "--model", path)
    assert f"{path}: " in line
    assert "model.stages[0].heads: 4 heads do not divide the width 30" in line


def test_unreadable_yaml(refused, tmp_path):
    path = write(tmp_path / "model.yaml", "name: [unclosed\n")
    assert f"{path}: line " in refused(train_program.main, "--model", path)
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path}: not valid YAML" in refused(train_program.main, "--model", path)
    assert "no such file" in refused(train_program.main, "--schedule", tmp_path / "none.yaml")


def test_folders_that_hold_no_data_set(refused, tmp_path):
    argv = ["--data.source", "folder", "--data.root", tmp_path / "data"]
    (tmp_path / "data").mkdir()
    assert "data.root: " in refused(train_program.main, *argv)
    folder_of_images(tmp_path / "data", {"train/a": 2, "train/b": 2, "val/a": 1, "val/c": 1})
    line = refused(train_program.main, *argv, "--schedule.batch_size", "2")
    assert "data.root: " in line
    assert "'c'" in line or " c" in line
    (tmp_path / "data" / "val" / "c" / "0.png").unlink()
    (tmp_path / "data" / "val" / "c").rmdir()
    for image in (tmp_path / "data" / "train" / "b").iterdir():
        image.unlink()
    assert "data.root: " in refused(train_program.main, *argv, "--schedule.batch_size", "2")


@pytest.mark.parametrize("argv", [[], ["--resume", "auto"], ["--device", "cpu", "--seed", "3"]])
def test_a_mistyped_folder_starts_no_demo(refused, tmp_path, argv):
    assert refused(train_program.main, *argv) == (
        f"error: command line: output: {tmp_path / 'output'} contains no run to continue; "
        "to start one there, name what to train, for example with --data configs/data/digits.yaml\n"
    )


def test_output_that_cannot_be_written(refused, tmp_path, monkeypatch, capsys):
    blocked = write(tmp_path / "file", "in the way")
    monkeypatch.setattr(sys, "argv", ["train.py", "--output", str(blocked / "run")])
    with pytest.raises(SystemExit) as exit_:
        command_line.main(train_program.main)
    assert exit_.value.code == 2
    assert "output: " in capsys.readouterr().err
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to evaluate"),
        (["--checkpoint"], "error: command line: --checkpoint: expected a value\n"),
        (
            ["--model", TINY, "--complexity", "--weights", "ema"],
            "error: command line: weights: requires --checkpoint\n",
        ),
        (
            ["--model", TINY, "--complexity", "--run_checkpoint", "last"],
            "error: command line: run_checkpoint: requires --checkpoint\n",
        ),
        (["--checkpoint", "absent"], "absent"),
        (["--checkpoint", "."], "checkpoint"),
        (["--model", TINY, "--complexity", "--json", "/dev/null/out.json"], "json"),
        (["--model.name", "timm/nothing", "--complexity"], "model.name: timm has no model 'nothing'"),
    ],
)
def test_evaluations_that_cannot_be_done(refused, argv, message):
    assert message in refused(eval_program.main, *argv)


def test_checkpoints_of_another_kind(refused, tmp_path):
    write(tmp_path / "text.pt", "hello")
    assert "text.pt" in refused(eval_program.main, "--checkpoint", tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    assert "other.pt" in refused(eval_program.main, "--checkpoint", tmp_path / "other.pt")


def test_a_checkpoint_of_another_architecture(refused, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [
        "train.py", "--output", str(folder), "--schedule.max_steps", "1", "--schedule.epochs", "1",
        "--data.workers", "0", "--progress", "false", "--loggers", "[]",
    ])  # fmt: skip
    with pytest.raises(SystemExit) as exit_:
        command_line.main(train_program.main)
    assert exit_.value.code == 0
    line = refused(eval_program.main, "--checkpoint", folder, "--model", TINY, "--model.image_size", 32)
    assert str(folder) in line
    assert "it is of another architecture; " in line
    assert " missing: stages." in line
    wide = refused(eval_program.main, "--checkpoint", folder, "--model.blocks", "[2, 1, 1]")
    assert "stages.0.blocks.1" in wide
    changed = ["--schedule.epochs", "1", "--model.window", "3", "--output", folder]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, changed)])
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as exit_:
        command_line.main(train_program.main)
    assert exit_.value.code == 2
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train_program.main, ["--data.source", "ffcv", "--data.root", LONG, "--output", "out"]),
        (train_program.main, ["--data.source", "folder", "--data.root", LONG, "--output", "out"]),
        (train_program.main, ["--data", DIGITS, "--output", LONG]),
        (report_program.main, [LONG]),
        (average_program.main, [LONG, "--last", "2", "--output", "c.pt"]),
        (ablate_program.main, [GRID, "--report", "--output", LONG]),
        (ablate_program.main, [GRID, "--data.source", "folder", "--data.root", LONG]),
    ],
)
def test_names_that_are_too_long(tmp_path, monkeypatch, main, argv):
    """`Path.exists` raises an error for them, and for folders that may not be searched."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        main(argv)
