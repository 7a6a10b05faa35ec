"""Repeated training and evaluation are identical with deterministic algorithms."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.run_files import is_equal, records, without_times
from helpers.sample_images import write_image_folder

import eval as eval_program
import train as program
from vil.checkpoints.checkpoint_files import step_files
from vil.checkpoints.training_state import read_training_state
from vil.runtime.precision import set_deterministic

ROOT = Path(__file__).parents[1]
ARGV = [
    "--device", "cpu", "--progress", "false", "--loggers", "[]", "--deterministic", "--log_every", "1",
    "--data.workers", "0", "--data.source", "folder", "--data.root", "../images",
]  # fmt: skip
RECIPE = [
    "--model", str(ROOT / "configs/models/vil_32.yaml"),
    "--model.neighbors", "random", "--model.drop_path", "0.2", "--schedule.ema_decay", "0.9",
    "--schedule.max_steps", "2", "--schedule.batch_size", "16", "--schedule.augment.mixup", "0.8",
    "--schedule.augment.cutmix", "1", "--schedule.augment.random_erasing", "0.5",
    "--schedule.augment.auto_augment", "rand-m9-mstd0.5-inc1", "--precision", "float16",
]  # fmt: skip


@pytest.fixture
def strict():
    """Turn warnings into errors; restore PyTorch's settings afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    set_deterministic(False)


def test_two_identical_runs_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict):
    write_image_folder(tmp_path / "images", train=32)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # the same command line
        torch.rand(len(name))
        program.main([*ARGV, *RECIPE, "--output", "run"])
        assert torch.are_deterministic_algorithms_enabled()
        set_deterministic(False)
        argv = [word for word in ARGV if word not in ("--loggers", "--log_every", "1", "[]")]
        eval_program.main([*argv, "--checkpoint", "run", "--json", "out.json"])
        assert torch.are_deterministic_algorithms_enabled()
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    assert len(records(one)) == 3
    assert records(one) == records(other)
    assert is_equal(*(read_training_state(step_files(folder)[0][1]) for folder in (one, other)))
    found = [json.loads((tmp_path / name / "out.json").read_text()) for name in ("one", "other")]
    assert without_times(found[0][0]) == without_times(found[1][0])
