"""tools/check_gpu.py on a machine without a GPU: small shapes, and what becomes of sections that fail."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tools import check_gpu
from tools.gpu_check import kernels, training
from tools.gpu_check.report import MAX_LINES, NotApplicableError, Outcome, Report, Row, read_rows, table
from tools.gpu_check.runner import Options, RunningSection, Section
from vil.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def check(*words, **about):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "tools/check_gpu.py", *words], cwd=ROOT, capture_output=True, text=True, check=False,
        env=environment, **about,
    )  # fmt: skip


def test_small_shapes_on_the_cpu(tmp_path):
    sections = ["machine", "kernels", "speed", "models", "loading", "tuning", "cifar10"]
    path = tmp_path / "check.jsonl"
    found = check("--device", "cpu", "--json", str(path), "--sections", *sections)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["section"] for line in lines] == sections
    skipped = {"tuning", "cifar10"}
    assert {line["section"] for line in lines if line["status"] == "skipped"} == skipped
    assert all(line["status"] == "passed" for line in lines if line["section"] not in skipped)
    checks = [row for line in lines for row in line["rows"] if row["passed"] is not None]
    assert len(checks) > 15
    assert all(row["passed"] for row in checks)
    shown = found.stdout[found.stdout.index("\n\n") :].strip().splitlines()
    assert len(shown) <= MAX_LINES
    assert not any("target" in line for line in shown)  # they are of a GPU


def test_training_section_on_the_cpu(tmp_path):
    path = tmp_path / "check.jsonl"
    found = check("--device", "cpu", "--json", str(path), "--sections", "training")
    (line,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert found.returncode == 0, line
    assert {row["name"] for row in line["rows"] if row["passed"]} == {
        "4 steps", "resumed run equal to the bit", "float16 with a planted infinity",
        "DDP with gloo, a group of one",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line(tmp_path):
    found = check("--json", str(tmp_path / "check.jsonl"))
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.splitlines() == [
        "error: command line: PyTorch finds no GPU; --device cpu tries this program on small shapes"
    ]
    assert not (tmp_path / "check.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "0"], "--budget must be positive, got 0"),
        (["--images", "missing"], "--images: missing is no folder"),
        (["--json", "missing/check.jsonl"], "--json: missing/check.jsonl: No such file or directory"),
        (["--sections", "kernel"], "argument --sections: invalid choice: 'kernel'"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        check_gpu.check(["--device", "cpu", *words])
    assert "\n" not in str(raised.value)


def test_sections_beyond_the_budget_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_gpu, "_prepare_environment", lambda _: None)
    path = tmp_path / "check.jsonl"
    words = ["--sections", "kernels", "models", "--budget", "10"]
    check_gpu.check(["--device", "cpu", "--json", str(path), *words])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["skipped", "skipped"]
    assert lines[0]["reason"].startswith("needs 30 s, ")
    assert "models: skipped" in capsys.readouterr().out


# --- Sections that end badly --------------------------------------------------------------------------------


def pass_and_print(options, report):
    report.check("small enough", 1.0, 2.0)
    report.add("speed", 5.0, "ms", target="3")


def fail_a_check(options, report):
    report.check("small enough", float("nan"), 2.0)


def raise_after_a_row(options, report):
    report.add("measured", 1.0)
    raise ValueError("a line\nand more")


def kill_itself(options, report):
    report.add("measured", 1.0)
    os.abort()


def sleep(options, report):
    report.add("measured", 1.0)
    time.sleep(60)


def leave_out(options, report):
    raise NotApplicableError("nothing to do")


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        (pass_and_print, "passed", ""),
        (fail_a_check, "failed", ""),
        (raise_after_a_row, "failed", "ValueError: a line and more"),
        (kill_itself, "failed", "SIGABRT"),
        (sleep, "timed out", "stopped after"),
        (leave_out, "skipped", "nothing to do"),
    ],
)
def test_outcomes(run, status, reason, tmp_path):
    """What was measured before a section ended is kept, however it ended."""
    section = Section(run.__name__, run, "", 120, 0)
    process = RunningSection(section, Options("cpu", tmp_path, deadline=time.time() + 120))
    while run is sleep and not read_rows(process.rows):
        time.sleep(0.1)
    if run is sleep:
        process.options = replace(process.options, deadline=time.time() + 0.5)
    outcome = process.finish()
    assert outcome.status == status
    assert reason in outcome.reason
    if run in (raise_after_a_row, kill_itself, sleep):
        assert [row.name for row in outcome.rows] == ["measured"]
    assert json.loads(outcome.as_json())["section"] == run.__name__


def test_the_table_keeps_failures_and_statuses_when_there_is_no_room():
    rows = [Row(f"measurement {number}", 1.0, "ms") for number in range(100)]
    rows.append(Row("wrong", 3.0, limit="≤ 2", passed=False, shown=False))
    outcomes = [Outcome("first", "failed", 1, rows=rows), Outcome("second", "skipped", reason="needs 30 s")]
    lines = table(outcomes).splitlines()
    assert len(lines) <= MAX_LINES - 3
    assert any("wrong" in line and "FAILED" in line for line in lines)
    assert any("second" in line and "needs 30 s" in line for line in lines)
    assert lines[-1].endswith("more in the JSON lines")


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    report = Report(tmp_path / "rows")
    report.add("whole", float("inf"))
    with report.path.open("a", encoding="utf-8") as file:
        file.write('{"name": "cut o')
    assert [row.name for row in read_rows(report.path)] == ["whole"]


# --- What only a GPU computes -------------------------------------------------------------------------------


def test_cases_cover_precisions_masks_windows_and_globals():
    """The cases of a GPU can be listed without one."""
    problems = [case.problem for case in kernels.cases(torch.device("cuda"), small=False)]
    assert {problem.dtype for problem in problems} == {torch.bfloat16, torch.float16, torch.float32}
    for dtype in kernels.TOLERANCES:
        of_dtype = [problem for problem in problems if problem.dtype == dtype]
        assert {(p.mask, p.window) for p in of_dtype} >= {
            (m, w) for m in ("chunk", "exact", "cyclic") for w in (7, 12, 15)
        }
        assert {p.global_tokens for p in of_dtype} >= {0, 1, 16, 256}
        assert {p.head_width for p in of_dtype} >= {32, 48, 64, 128}
        assert {p.neighbors for p in of_dtype} >= {"all", "self", 0, 6}
        assert any(p.size == (56, 56) for p in of_dtype)
    assert sum(case.large_biases for case in kernels.cases(torch.device("cuda"), small=False)) == 3


def test_every_case_is_compiled_with_its_own_constants(monkeypatch):
    import tools.compile_kernels

    seen = []
    monkeypatch.setattr(tools.compile_kernels, "compile_kernels", lambda *words: seen.append(words) or [])
    problem = kernels.cases(torch.device("cuda"), small=False)[0].problem
    problem = replace(problem, dtype=torch.float16, neighbors=3, window=5, global_tokens=2)
    assert kernels.compile_case(*kernels._kernel_arguments(problem, 90)) == 0
    assert seen == [(90, "float16", problem.head_width, problem.geometry, 2, True)]


def test_large_biases_survive_rounding():
    """What the kernels make of them, multiplied by log₂e and rounded, is what they were drawn as."""
    case = kernels.cases(torch.device("cpu"), small=True)[-1]
    assert case.large_biases
    table = case.inputs(0).bias_table.detach()
    scaled = table * 1.4426950408889634
    rounded = scaled.to(case.problem.dtype).float()
    torch.testing.assert_close(scaled, rounded, atol=0, rtol=1e-6)
    assert table.abs().max() > 8


def test_differences_between_checkpoints_are_named(tmp_path):
    state = {"model": {"a": torch.ones(2)}, "ema": None, "optimizer": {"state": {0: {"step": 1}}},
             "scaler": {}, "step": 4}  # fmt: skip
    for name, change in (("first", {}), ("second", {"model": {"a": torch.zeros(2)}, "step": 5})):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        torch.save({**state, **change}, tmp_path / name / "checkpoints" / "step_00000004.pt")
    found = training._differences(tmp_path / "first", tmp_path / "second")
    assert found == ["model.a", "step"]
    assert training._differences(tmp_path / "first", tmp_path / "first") == []
