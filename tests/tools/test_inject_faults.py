"""tools/dev/inject_faults.py: one scenario from end to end, and checks that fail for corrupt run folders."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import forked

from tools.dev import inject_faults
from tools.dev.faults import checks
from tools.dev.faults.report import Report
from vil.errors import UserError

ROOT = Path(__file__).parents[2]


def metrics_line(step, kind="train", **values):
    return json.dumps({"kind": kind, "step": step, "loss": 2.0 / step, "time": 7.0, **values}) + "\n"


def make_state(step):
    weights = {"weight": torch.full((3, 2), float(step)), "bias": torch.tensor([0.0, 1.0])}
    return {
        "model": weights,
        "ema": {name: value / 2 for name, value in weights.items()},
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3, 2)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "step": step,
        "best": {"top1": 50.0, "weights": "ema"},
        "config": {"output": "somewhere"},
        "versions": {},
    }


def save(path, state):
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")


@pytest.fixture
def make_run(tmp_path):
    """Return a function that makes folders of identical finished runs of four steps."""

    def make(name):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        for file, step in (("step_00000003.pt", 3), ("step_00000004.pt", 4), ("best.pt", 4)):
            save(folder / "checkpoints" / file, make_state(step))
        lines = [*map(metrics_line, (1, 2, 3, 4)), metrics_line(4, "validation", seconds=name)]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "summary.json").write_text('[{"top1": 50.0, "images_per_second": 8}]')
        return folder

    return make


def test_identical_runs_have_no_differences(make_run):
    assert checks.compare_runs(make_run("a"), make_run("b")) == []


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.weight", lambda s: s["model"]["weight"][0, 0].mul_(1 + 1e-6)),
        ("model.bias", lambda s: s["model"]["bias"][0].mul_(-1)),  # −0 and 0 differ in bits
        ("ema.bias", lambda s: s["ema"]["bias"].add_(1)),
        ("optimizer.state.0.exp_avg", lambda s: s["optimizer"]["state"][0]["exp_avg"].add_(1)),
        ("optimizer.param_groups.0.lr", lambda s: s["optimizer"]["param_groups"][0].update(lr=0.1000001)),
        ("best.weights", lambda s: s["best"].update(weights="raw")),
        ("extra", lambda s: s.update(extra=None)),
    ],
)
def test_a_different_bit_in_a_checkpoint_is_reported(make_run, key, change):
    folder, state = make_run("a"), make_state(4)
    change(state)
    save(folder / "checkpoints" / "step_00000004.pt", state)
    assert checks.compare_runs(folder, make_run("b")) == [f"checkpoints/step_00000004.pt: {key}"]


def test_a_missing_checkpoint_and_different_logs_are_reported(make_run):
    folder, reference = make_run("a"), make_run("b")
    (folder / "checkpoints" / "step_00000004.pt").unlink()
    text = (folder / "metrics.jsonl").read_text().replace('"loss": 1.0', '"loss": 1.0000001')
    (folder / "metrics.jsonl").write_text(text + metrics_line(5, "spike"))
    (folder / "summary.json").write_text('[{"top1": 51.0}]')
    assert checks.compare_runs(folder, reference) == [
        "checkpoints/step_00000004.pt is missing",
        "metrics.jsonl: train of step 2 differs in loss",
        "metrics.jsonl has 6 lines, not 5",
        "summary.json differs",
    ]


def test_a_corrupt_checkpoint_and_a_missing_digest_are_reported(make_run):
    folder = make_run("a")
    assert checks.check_digests(folder) == []
    path = folder / "checkpoints" / "step_00000004.pt"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert checks.check_digests(folder) == ["step_00000004.pt does not match its digest"]
    path.with_name(f"{path.name}.sha256").unlink()
    assert checks.check_digests(folder) == ["step_00000004.pt has no digest"]
    assert checks.newest_step(folder) == 4


def test_an_incomplete_line_of_a_killed_run_is_not_read(make_run):
    folder = make_run("a")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert checks.logged_steps(folder) == [1, 2, 3, 4]


def test_the_table_sums_up_the_trials_of_a_fault(capsys):
    report = Report()
    for lost_steps, is_identical in ((3, None), (1, True)):
        with report.trial("kill -9") as trial:
            trial.add_lost_steps(lost_steps)
            trial.check_status(-9, -9)
            trial.is_identical = is_identical
    assert report.has_survived
    with report.trial("kill -9") as trial:
        trial.check_status(1, 0)
        trial.add_comparison(["summary.json differs"])
        trial.add_comparison([])
    with report.trial("full disk", ranks=2):
        raise FileNotFoundError("metrics.jsonl")
    assert not report.has_survived
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.table().splitlines()[2:]]
    assert rows == [
        ["kill -9", "1", "3", "2", "3", "NO", "-9, 1"],
        ["full disk", "2", "1", "0", "–", "–", "–"],
    ]
    assert [trial.problems for trial in report.trials[2:]] == [
        ["exit status 1, not 0", "summary.json differs"],
        ["FileNotFoundError: metrics.jsonl"],
    ]
    assert "full disk: NOT SURVIVED, 0 s\n  FileNotFoundError: metrics.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kills", "0"], "command line: argument --kills: expected an integer of at least 1, got '0'"),
        (["--seed", "-1"], "command line: argument --seed: expected an integer of at least 0, got '-1'"),
        (["--only", "flood"], "invalid choice: 'flood'"),
    ],
)
def test_a_bad_command_line_is_refused(argv, message):
    with pytest.raises(UserError) as error:
        inject_faults.main(argv)
    assert message in str(error.value)


PROGRAM = """
import runpy, sys
sys.executable = sys.argv.pop(1)  # starts the runs
runpy.run_module("tools.dev.inject_faults", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_killed_in_a_save_continues_bit_identically(tmp_path):
    command = [forked.python(), "-c", PROGRAM, forked.python(), "--only", "kill", "--kills", "1"]
    finished = subprocess.run(
        [*command, "--markdown", str(tmp_path / "table.md")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    text = (tmp_path / "table.md").read_text()
    cells = [cell.strip() for cell in text.splitlines()[-3].split("|")]
    assert cells[1:5] == ["kill -9 in a save", "1", cells[3], cells[3]]  # every kill was survived
    assert cells[6:8] == ["yes", "-9, 0"]
    assert not list(tmp_path.glob("inject_faults_*"))  # the runs are removed
