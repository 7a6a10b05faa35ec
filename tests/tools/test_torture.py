"""tools/torture.py: its short version, and that it sees what is wrong with folders broken on purpose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import torture
from tools.torturing import evidence, table
from tools.torturing.table import Row, Trial
from vil.checkpoint_files import step_file
from vil.config import ConfigError
from vil.training import checkpoint

ROOT = Path(__file__).parents[2]


def line(step, kind="train", **values):
    return (
        json.dumps({"kind": kind, "step": step, "epoch": 1, "loss": 2.0 / step, "time": 7.0, **values}) + "\n"
    )


def state(step):
    weights = {"weight": torch.full((3, 2), float(step)), "bias": torch.tensor([0.0, 1.0])}
    return {
        "model": weights,
        "ema": {name: value / 2 for name, value in weights.items()},
        "optimizer": {
            "state": {0: {"exp_avg": torch.ones(3, 2)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "scaler": {"scale": 2.0},
        "step": step,
        "finished_step": step,
        "epoch": 1,
        "watched": {"skipped": 0, "skipped_in_a_row": 0, "losses": [2.0]},
        "best": {"top1": 50.0, "weights": "ema", "epoch": 1},
        "config": {"output": "somewhere", "model": {}, "schedule": {}, "data": {}},
        "class_names": ["0", "1"],
        "versions": {},
    }


@pytest.fixture
def finished(tmp_path):
    """Makes folders of finished runs of four steps, all of them twins."""

    def make(name):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        for path in (step_file(folder, 3), step_file(folder, 4), folder / "checkpoints" / "best.pt"):
            checkpoint.save(path, state(3 if path == step_file(folder, 3) else 4))
        lines = [*map(line, (1, 2, 3, 4)), line(4, "validation", seconds=name)]
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "summary.json").write_text('[{"top1": 50.0, "images_per_second": 8}]')
        return folder

    return make


def test_a_twin_has_no_differences(finished):
    assert evidence.compare(finished("own"), finished("other")) == []


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.weight", lambda s: s["model"]["weight"][0, 0].mul_(1 + 1e-6)),
        ("model.bias", lambda s: s["model"]["bias"][0].mul_(-1)),  # −0 is not 0
        ("ema.bias", lambda s: s["ema"]["bias"].add_(1)),
        ("optimizer.state.0.exp_avg", lambda s: s["optimizer"]["state"][0]["exp_avg"].add_(1)),
        ("optimizer.param_groups[0].lr", lambda s: s["optimizer"]["param_groups"][0].update(lr=0.1000001)),
        ("scaler.scale", lambda s: s["scaler"].update(scale=1.0)),
        ("best.epoch", lambda s: s["best"].update(epoch=2)),
        ("watched.losses[0]", lambda s: s["watched"].update(losses=[2.5])),
    ],
)
def test_any_other_bit_of_a_checkpoint_is_seen(finished, key, change):
    own, changed = finished("own"), state(4)
    change(changed)
    checkpoint.save(step_file(own, 4), changed)
    assert evidence.compare(own, finished("other")) == [f"checkpoints/step_00000004.pt: {key}"]


def test_a_last_checkpoint_that_is_missing_or_damaged_is_seen(finished):
    own, other = finished("own"), finished("other")
    step_file(own, 4).write_bytes(step_file(own, 4).read_bytes()[:-1])
    (problem,) = evidence.compare(own, other)
    assert "damaged" in problem
    step_file(own, 4).unlink()
    (problem,) = evidence.compare(own, other)
    assert "no such file" in problem


def test_other_metrics_and_another_summary_are_seen(finished):
    own, other = finished("own"), finished("other")
    text = (own / "metrics.jsonl").read_text()
    (own / "metrics.jsonl").write_text(text.replace('"loss": 1.0', '"loss": 1.0000001'))
    assert evidence.compare(own, other) == ["metrics.jsonl: train of step 2: other loss"]
    (own / "metrics.jsonl").write_text(text + line(5, "spike"))
    assert evidence.compare(own, other) == ["metrics.jsonl has 6 lines, not 5"]
    (own / "metrics.jsonl").write_text(text)
    (own / "summary.json").write_text('[{"top1": 51.0}]')
    assert evidence.compare(own, other) == ["summary.json: other accuracy"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([line(1), line(2), line(4)], "steps that are not logged: 3"),
        ([line(1), line(2), line(3)], "steps that are not logged: 4"),
        ([*map(line, (1, 2, 3, 3, 4))], "step 3 is logged twice"),
        ([*map(line, (1, 3, 2, 4))], "the steps are not in order"),
        ([*map(line, (1, 2, 3, 4, 5))], "step 5 is logged, the last one is 4"),
        ([*map(line, (1, 2, 3, 4)), *[line(4, "validation")] * 2], "evaluation after step 4 is logged twice"),
        ([*map(line, (1, 2, 3, 4)), '{"kind": "tr'], "metrics.jsonl, line 5 is not whole"),
    ],
)
def test_a_step_that_is_lost_or_stands_twice_is_seen(finished, lines, problem):
    folder = finished("own")
    assert evidence.check_steps(folder, 4) == []
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert evidence.check_steps(folder, 4) == [problem]


def test_after_a_kill_only_what_lies_before_the_checkpoint_counts(finished):
    folder = finished("own")
    (folder / "metrics.jsonl").write_text("".join([*map(line, (1, 2, 3, 4)), '{"kind": "tr']))
    assert evidence.check_steps(folder, 3, up_to=3) == []
    (folder / "metrics.jsonl").write_text("".join([*map(line, (1, 3, 4)), '{"kind": "tr']))
    assert evidence.check_steps(folder, 3, up_to=3) == ["steps that are not logged: 2"]


def test_damaged_checkpoints_are_seen_and_never_chosen(finished):
    folder = finished("own")
    assert evidence.check_files(folder) == []
    assert evidence.chosen(folder) == (4, [])
    content = bytearray(step_file(folder, 4).read_bytes())
    content[100] ^= 1
    step_file(folder, 4).write_bytes(content)
    assert evidence.check_files(folder) == ["step_00000004.pt does not fit its digest"]
    step, (problem,) = evidence.chosen(folder)
    assert step == 3
    assert "passed over" in problem
    (folder / "checkpoints" / "step_00000004.pt.sha256").unlink()
    assert evidence.check_files(folder) == ["step_00000004.pt has no digest"]


def test_a_checkpoint_of_another_step_than_its_name_says_is_seen(finished):
    folder = finished("own")
    checkpoint.save(step_file(folder, 9), state(4))
    assert evidence.chosen(folder) == (4, ["chosen: step_00000009.pt holds step 4"])


def test_a_row_sums_up_its_trials(capsys):
    row = Row("kill -9", 1)
    for lost, identical in ((3, None), (1, True)):
        with row.trial() as trial:
            trial.lose(lost)
            trial.expect_status([-9], -9)
            trial.identical = identical
    assert row.survived
    record = row.record()
    assert table.cells(record) == ["kill -9", "1", "2", "2", "3", "yes", "-9"]
    with row.trial() as trial:
        trial.expect_status([1, 0], 0)
        trial.judge(["metrics.jsonl: train of step 2: other loss"])
    assert not row.survived
    assert table.cells(row.record()) == ["kill -9", "1", "3", "2", "3", "NO", "-9, 0, 1"]
    assert row.record()["problems"] == [
        "exit status [1, 0], not 0",
        "metrics.jsonl: train of step 2: other loss",
    ]
    assert "NOT SURVIVED" in capsys.readouterr().out
    assert "| kill -9 | 1 | 3 | 2 | 3 | NO | -9, 0, 1 |" in table.markdown([row.record()], "python x")
    lines = table.text([record, row.record()]).splitlines()
    assert lines[0].index("bit-identical") == lines[1].index("yes") == lines[2].index("NO")


def test_a_later_twin_does_not_make_up_for_one_that_was_none():
    trial = Trial()
    trial.judge(["x"])
    trial.judge([])
    assert trial.identical is False


def test_what_was_not_tried_needs_a_reason():
    assert not Row("full disk", 1).survived
    assert Row("full disk", 1, note="not tried: mounting is not allowed").survived


def test_a_trial_that_goes_wrong_leaves_the_others_their_turn():
    row = Row("kill -9", 1)
    with row.trial():
        raise FileNotFoundError("metrics.jsonl")
    assert row.record()["problems"] == ["FileNotFoundError: metrics.jsonl"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--kills", "0"], "--kills must be at least 1"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--only", "flood"], "invalid choice: 'flood'"),
        (["--short", "--ranks", "3"], "invalid choice: 3"),
        (["--json", "nowhere/table.json"], "no such folder"),
        (["--folder", str(ROOT)], "is not empty"),
    ],
)
def test_bad_lines_are_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        torture.torture(words)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The short version, in a process of its own: it forks."""
    folder = tmp_path_factory.mktemp("torture")
    files = [folder / name for name in ("table.json", "table.md")]
    ended = subprocess.run(
        [sys.executable, "tools/torture.py", "--short", "--json", files[0], "--markdown", files[1]],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    return json.loads(files[0].read_text()), files[1].read_text(), list(folder.iterdir())


def test_everything_of_the_short_version_is_survived(short):
    records, page, left = short
    rows = {record["fault"]: record for record in records}
    expected = {
        "kill -9": [-9], "kill -9 in a save": [-9], "SIGTERM": [143], "SIGINT twice": [130], "SIGUSR1": [0],
        "full disk, then freed": [0], "file-size limit": [1], "newest checkpoint with a flipped bit": [0],
        "every checkpoint damaged": [2], "NaN for ever": [1], "NaN on one rank": [0],
    }  # fmt: skip
    assert rows.keys() - {"kill -9"} == expected.keys() - {"kill -9"}  # both kills may be inside a save
    for name, row in rows.items():
        assert row["survived"] == row["tried"], row
        assert row["tried"] or row["note"].startswith("not tried"), row
        if row["tried"]:
            assert set(expected[name]) <= set(row["statuses"]) <= {*expected[name], 0}, row
            assert row["identical"] is (
                None if name in ("every checkpoint damaged", "NaN on one rank") else True
            )
    assert rows["kill -9 in a save"]["tried"] >= 1
    assert rows["SIGTERM"]["lost_steps"] == 0
    assert page.count("\n| ") == len(records)
    assert sorted(path.name for path in left) == ["table.json", "table.md"]  # the runs are removed
