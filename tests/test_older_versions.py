"""Runs and weights that version 0.1.0 wrote: evaluated to the same digits, and continued identically.

`tests/fixtures/version_0_1_0` holds a run of two epochs on the digits that was stopped after 30 of its 44
steps, the weights after all 44, and the best of them as safetensors.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_program
import train as train_program
from vil import command_line
from vil.checkpoints import checkpoint_files
from vil.checkpoints.training_state import read_training_state

FILES = Path(__file__).parent / "fixtures" / "version_0_1_0"
TOP1, LOSS = 16.38888888888889, 2.2828651578693684
"""Of the best weights, by version 0.1.0."""


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call a program in a working folder with a copy of the run; return its output."""
    shutil.copytree(FILES / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            command_line.main(main)
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return captured.out

    return call


@pytest.mark.parametrize("checkpoint", ["run", FILES / "best.safetensors"], ids=["run", "safetensors"])
def test_evaluation(call, checkpoint):
    digits = [] if checkpoint == "run" else ["--data.source", "digits"]
    argv = [
        "--checkpoint",
        checkpoint,
        *digits,
        "--json",
        "out.json",
        "--device",
        "cpu",
        "--progress",
        "false",
    ]
    call(eval_program.main, *argv)
    (found,) = json.loads(Path("out.json").read_text())
    assert found["top1"] == TOP1
    assert found["loss"] == pytest.approx(LOSS, rel=1e-6)


@pytest.fixture
def two_threads():
    """Use as many threads as the stored run: sums of other parts differ in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_run_is_continued(call):
    screen = call(train_program.main, "--output", "run", "--schedule.max_steps", "null")
    assert "continuing run after step 30" in screen
    steps = checkpoint_files.step_files(Path("run"))
    assert steps[0][0] == 44
    state = read_training_state(steps[0][1])
    assert state["order_version"] == 1  # the order of the images stays that of the run
    weights, expected = state["model"], load_file(FILES / "final.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
