"""Repeated training and evaluation are identical with deterministic algorithms."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.sample_images import write_image_folder

import eval as eval_program
import train as program
from vil.checkpoints.checkpoint_files import step_files
from vil.checkpoints.training_state import read_training_state
from vil.runtime.precision import set_deterministic
from vil.training.metrics_log import TIMING_FIELDS

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


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in TIMING_FIELDS}


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


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
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    records = [[without_times(json.loads(line)) for line in some] for some in lines]
    assert len(records[0]) == 3
    assert records[0] == records[1]
    assert equal(*(read_training_state(step_files(folder)[0][1]) for folder in (one, other)))
    found = [json.loads((tmp_path / name / "out.json").read_text()) for name in ("one", "other")]
    assert without_times(found[0][0]) == without_times(found[1][0])
