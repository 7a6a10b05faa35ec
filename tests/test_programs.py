"""The programs as a user calls them: real command lines in separate processes."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import forked
from helpers.run_files import losses, records
from helpers.sample_images import write_image_folder

import eval as eval_program
import train as train_program
from vil.checkpoints.checkpoint_files import step_files
from vil.errors import UserError

ROOT = Path(__file__).parents[1]
SHORT = [
    "--schedule.epochs", "2", "--data.train_fraction", "0.3", "--log_every", "1", "--progress", "false",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.xdist_group("programs")  # they share the run below


def start(*argv, ranks=0):
    launcher = [forked.python()]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**ENVIRONMENT, "PYTHON_EXEC": forked.python()}  # of the ranks that torchrun starts
    return subprocess.Popen(
        [*launcher, *map(str, argv)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def call(*argv, ranks=0, status=0):
    process = start(*argv, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def call_here(program, *argv):
    """Run a program in this process, for tests that do not need its exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        program([*map(str, argv)])
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train two epochs on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    out, _ = call("train.py", "--output", folder, *SHORT)
    assert "Top-1" in out.splitlines()[-1]
    return folder


def test_files_of_a_run(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json"} <= names
    steps = [record["step"] for record in records(run, "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(records(run, "validation")) == 2
    assert losses(run)[-1] < losses(run)[0]
    assert all("ema_top1" in record and record["images"] == 360 for record in records(run, "validation"))


@pytest.mark.parametrize("ranks", [0, 3])
def test_evaluation_counts_every_image_once_on_any_number_of_ranks(run, tmp_path, ranks):
    path = tmp_path / "out.json"
    argv = ["--checkpoint", run, "--json", path]
    out = call("eval.py", *argv, ranks=ranks)[0] if ranks else call_here(eval_program.main, *argv)
    (result,) = json.loads(path.read_text())
    (summary,) = json.loads((run / "summary.json").read_text())
    assert result["images"] == 360
    assert result["top1"] == summary["top1"]
    best = max(max(r["top1"], r["ema_top1"]) for r in records(run, "validation"))
    assert result["top1"] == best
    assert f"{best:.2f}" in out
    assert out.count("Top-1 %") == 1
    needed = {"top1", "top5", "loss", "images", "params", "flops", "train_memory_mb", "eval_memory_mb",
              "images_per_second", "device", "precision", "image_size", "checkpoint"}  # fmt: skip
    assert needed <= result.keys()


def test_number_of_workers_changes_nothing(run, tmp_path):
    argv = ["--data.workers", 0, "--schedule.max_steps", 8]  # two steps into the second epoch
    call_here(train_program.main, "--output", tmp_path, *argv, *SHORT)
    assert losses(tmp_path) == losses(run)[:8]
    assert records(tmp_path, "validation")[0] == records(run, "validation")[0]


def test_accumulation_changes_nothing_but_rounding(run, tmp_path):
    argv = ["--schedule.accumulation", 4, "--schedule.max_steps", 4]
    call_here(train_program.main, "--output", tmp_path, *argv, *SHORT)
    assert losses(tmp_path) == pytest.approx(losses(run)[:4], abs=1e-4)


def test_two_ranks_train_as_one_process(run, tmp_path):
    call("train.py", "--output", tmp_path, "--schedule.max_steps", 8, *SHORT, ranks=2)
    assert losses(tmp_path) == pytest.approx(losses(run)[:8], abs=1e-4)
    assert records(tmp_path, "validation")[0]["images"] == 360


@pytest.mark.parametrize(
    "options",
    [
        ["--schedule.progressive_resizing", "[[0, 16, 64], [0.5, 32, 32]]",
         "--schedule.scale_lr_with_batch_size", "true"],
        ["--schedule.augment.aug_splits", "3", "--schedule.augment.auto_augment", "augmix-m3"],
    ],
    ids=["batch size", "views"],
)  # fmt: skip
def test_two_ranks_train_as_one_with_other_batches(tmp_path, options):
    argv = [*SHORT, "--schedule.max_steps", 8, "--eval_every", 2, *options]
    one, two = tmp_path / "one", tmp_path / "two"
    call_here(train_program.main, "--output", one, *argv)
    call("train.py", "--output", two, *argv, ranks=2)
    assert len(losses(one)) == 8
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    rates, epochs = ([[r[key] for r in records(p, "train")] for p in (one, two)] for key in ("lr", "epoch"))
    assert rates[0] == rates[1]
    assert epochs[0] == epochs[1]


def test_a_killed_run_continues_bit_identically(run, tmp_path):
    process = start("train.py", "--output", tmp_path, *SHORT)
    deadline = time.monotonic() + 200
    while not step_files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    out, _ = call("train.py", "--output", tmp_path)  # the folder says the rest
    assert "continuing" in out
    assert records(tmp_path) == records(run)
    (ours,), (reference,) = (json.loads((p / "summary.json").read_text()) for p in (tmp_path, run))
    assert ours["top1"] == reference["top1"]


def test_a_run_survives_closed_and_full_output_streams(tmp_path):
    """Output streams may be on a full disk or a closed pipe."""
    argv = ["train.py", "--output", tmp_path / "full", *SHORT, "--schedule.max_steps", "1"]
    with open("/dev/full", "w") as full:
        called = [sys.executable, *map(str, argv)]
        environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": ""}  # what is not written stays in the buffer
        ended = subprocess.run(called, cwd=ROOT, env=environment, stdout=full, stderr=full, timeout=300)
    assert ended.returncode == 0
    assert (tmp_path / "full" / "summary.json").exists()


def test_a_finished_run_is_reported_and_unchanged(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("[!.]*") if path.is_file()}
    assert "is finished: Top-1" in call_here(train_program.main, "--output", run, *SHORT)
    with pytest.raises(UserError, match="output: "):
        call_here(train_program.main, "--output", run, "--resume", "never", *SHORT)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("[!.]*") if path.is_file()} == before


def test_complexity_needs_neither_data_nor_checkpoint(tmp_path):
    path = tmp_path / "out.json"
    argv = ["--model", ROOT / "configs/models/vil_tiny.yaml", "--complexity", "--model.image_size", 64]
    call_here(eval_program.main, *argv, "--json", path)
    (result,) = json.loads(path.read_text())
    assert result["params"] == pytest.approx(6.7e6, rel=0.01)
    assert result["top1"] is None
    assert result["train_memory_mb"] > result["eval_memory_mb"] > 0


def test_every_precision_and_option_of_a_run(tmp_path):
    """Train one step with each precision, with the options that the other tests leave out."""
    write_image_folder(tmp_path / "images", train=60)
    small = ["--model", ROOT / "configs/models/vil_32.yaml"]
    for number, argv in enumerate(
        (
            [*small, "--precision", "bfloat16", "--gradient_checkpointing", "--channels_last"],
            [*small, "--precision", "float16", "--model.neighbors", "random", "--schedule.clip_grad", "1"],
            [*small, "--config", ROOT / "configs/ablations/attention_performer.yaml",
             "--schedule.augment.mixup", "0.8", "--schedule.augment.cutmix", "1.0",
             "--schedule.loss", "bce", "--schedule.layer_decay", "0.7"],
            ["--model", ROOT / "configs/models/deit_tiny_patch16.yaml", "--model.image_size", "32",
             "--schedule.optimizer", "sgd"],
        )
    ):  # fmt: skip
        folder = tmp_path / str(number)
        argv += ["--schedule.max_steps", 1, "--loggers", "[]", "--schedule.batch_size", "16"]
        argv += ["--data.source", "folder", "--data.root", tmp_path / "images"]
        call_here(train_program.main, "--output", folder, *argv, *SHORT)
        assert len(losses(folder)) == 1
        assert not (folder / "tensorboard").exists()


def test_a_diverging_run_fails_with_one_line_and_saves_nothing(tmp_path):
    argv = ["--schedule.lr", "1e30", "--schedule.max_steps", 1, "--data.workers", 0]
    _, err = call("train.py", "--output", tmp_path, *argv, *SHORT, status=1)
    assert err.startswith("error: step 1: the weights are not finite, at learning rate ")
    assert err.count("\n") == 1
    assert not (tmp_path / "summary.json").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []
