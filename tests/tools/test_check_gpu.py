"""tools/check_gpu.py without a GPU: all sections with small shapes, and outcomes of sections that fail."""

import itertools
import json
import os
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import forked

from data.sources import open_source
from tools.benchmarks.timing import Measurement
from tools.gpu_check import kernels, loading, models, program, speed, training
from tools.gpu_check.report import (
    MAX_LINES,
    NotApplicableError,
    Outcome,
    Report,
    Row,
    read_rows,
    summary_table,
)
from tools.gpu_check.runner import Options, RunningSection, Section
from vil.config import DataConfig
from vil.errors import UserError
from vil.runtime import distributed

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.xdist_group("check_gpu")  # one worker, so that the small run is shared


def run_program(*argv):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [forked.python(), "tools/check_gpu.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Run all sections that a CPU can, once; return the process and the outcomes by section."""
    path = tmp_path_factory.mktemp("check_gpu") / "check.jsonl"
    sections = ["machine", "kernels", "speed", "models", "loading", "tuning", "cifar10", "training"]
    process = run_program("--device", "cpu", "--budget", "3000", "--json", str(path), "--sections", *sections)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return process, {line["section"]: line for line in lines}


@pytest.mark.slow
def test_small_sections_pass(small_run):
    process, outcomes = small_run
    assert process.returncode == 0, process.stdout + process.stderr
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        **dict.fromkeys(("machine", "kernels", "speed", "training", "models", "loading"), "passed"),
        **dict.fromkeys(("tuning", "cifar10"), "skipped"),
    }
    checks = [row for outcome in outcomes.values() for row in outcome["rows"] if row["passed"] is not None]
    assert len(checks) > 15
    assert all(row["passed"] for row in checks)


@pytest.mark.slow
def test_training_section_checks_resume_infinite_gradients_and_ddp(small_run):
    assert {row["name"] for row in small_run[1]["training"]["rows"] if row["passed"]} == {
        "4 steps",
        "resumed run is bit-identical",
        "infinite float16 gradient is skipped",
        "gradients of DDP with gloo, one rank",
    }


@pytest.mark.slow
def test_the_table_is_short_and_has_no_targets_on_a_cpu(small_run):
    shown = small_run[0].stdout
    lines = shown[shown.index("\n\n") :].strip().splitlines()
    assert len(lines) <= MAX_LINES
    assert not any("target" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_exits_with_one_line(tmp_path):
    process = run_program("--json", str(tmp_path / "check.jsonl"))
    assert (process.returncode, process.stdout) == (2, "")
    reason = "PyTorch finds no GPU; --device cpu tests this program with small shapes"
    assert process.stderr == f"error: command line: {reason}\n"
    assert not (tmp_path / "check.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "0"], "argument --budget: must be positive, got 0"),
        (["--images", "missing"], "--images: missing is not a folder"),
        (["--json", "missing/check.jsonl"], "--json: missing/check.jsonl: No such file or directory"),
        (["--sections", "kernel"], "argument --sections: invalid choice: 'kernel'"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        program.check_gpu(["--device", "cpu", *argv])
    assert "\n" not in str(raised.value)


def test_sections_beyond_the_budget_are_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "_set_environment", lambda _: None)
    path = tmp_path / "check.jsonl"
    argv = ["--sections", "kernels", "models", "--budget", "10"]
    program.check_gpu(["--device", "cpu", "--json", str(path), *argv])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["status"] for line in lines] == ["skipped", "skipped"]
    assert lines[0]["reason"].startswith("needs 30 s, ")
    assert "models: skipped" in capsys.readouterr().out


# --- Sections that fail -------------------------------------------------------------------------------------


def pass_and_print(options, report):
    report.check("small enough", 1.0, 2.0)
    report.add("speed", 5.0, "ms", target="3")


def fail_a_check(options, report):
    report.check("small enough", float("nan"), 2.0)


def raise_after_a_row(options, report):
    report.add("measured", 1.0)
    raise ValueError("a line\nand more")


def abort(options, report):
    report.add("measured", 1.0)
    os.abort()


def sleep(options, report):
    report.add("measured", 1.0)
    time.sleep(60)


def not_applicable(options, report):
    raise NotApplicableError("nothing to do")


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        (pass_and_print, "passed", ""),
        (fail_a_check, "failed", ""),
        (raise_after_a_row, "failed", "ValueError: a line and more"),
        (abort, "failed", "SIGABRT"),
        (sleep, "timed out", "stopped after"),
        (not_applicable, "skipped", "nothing to do"),
    ],
)
def test_outcomes_keep_the_rows_of_a_section(run, status, reason, tmp_path):
    section = Section(run.__name__, run, "", 120, 0)
    process = RunningSection(section, Options("cpu", tmp_path, deadline=time.time() + 120))
    while run is sleep and not read_rows(process.rows):
        time.sleep(0.1)
    if run is sleep:
        process.options = replace(process.options, deadline=time.time() + 0.5)
    outcome = process.finish()
    assert outcome.status == status
    assert reason in outcome.reason
    if run in (raise_after_a_row, abort, sleep):
        assert [row.name for row in outcome.rows] == ["measured"]
    assert json.loads(outcome.as_json())["section"] == run.__name__


def test_the_table_prefers_failures_and_statuses():
    rows = [Row(f"measurement {number}", 1.0, "ms") for number in range(100)]
    rows.append(Row("wrong", 3.0, limit="≤ 2", passed=False, shown=False))
    outcomes = [Outcome("first", "failed", 1, rows=rows), Outcome("second", "skipped", reason="needs 30 s")]
    lines = summary_table(outcomes).splitlines()
    assert len(lines) <= MAX_LINES - 3
    assert any("wrong" in line and "FAILED" in line for line in lines)
    assert any("second" in line and "needs 30 s" in line for line in lines)
    assert lines[-1].endswith("more in the JSON lines")


def test_rows_before_a_truncated_line_are_read(tmp_path):
    report = Report(tmp_path / "rows")
    report.add("whole", float("inf"))
    with report.path.open("a", encoding="utf-8") as file:
        file.write('{"name": "trunc')
    assert [row.name for row in read_rows(report.path)] == ["whole"]


# --- Parts for a GPU ----------------------------------------------------------------------------------------


def test_cases_cover_precisions_masks_windows_and_global_tokens():
    cases = kernels.list_cases("cuda", is_small=False)
    assert {case.shape.precision for case in cases} == set(kernels.TOLERANCES)
    for precision in ("bfloat16", "float16", "float32"):
        shapes = [case.shape for case in cases if case.shape.precision == precision]
        masks = {(mask, window) for mask in ("chunk", "exact", "cyclic") for window in (7, 12, 15)}
        assert {(shape.mask, shape.window) for shape in shapes} >= masks
        assert {shape.global_tokens for shape in shapes} >= {0, 1, 16, 256}
        assert {shape.head_width for shape in shapes} >= {32, 48, 64, 128}
        assert {shape.neighbors for shape in shapes} >= {"all", "self", 0, 6}
        assert any(shape.size == (56, 56) for shape in shapes)
    assert sum(case.large_biases for case in cases) == 3


def test_every_case_is_compiled_with_its_constants(monkeypatch):
    import tools.dev.kernel_statistics

    calls = []
    monkeypatch.setattr(
        tools.dev.kernel_statistics, "compile_kernels", lambda *arguments: calls.append(arguments) or []
    )
    shape = kernels.list_cases("cuda", is_small=False)[0].shape
    shape = replace(shape, precision="float16", neighbors=3, window=5, global_tokens=2)
    assert kernels.compile_shape(90, shape) == 0
    assert calls == [(90, "float16", shape.head_width, shape.spec, 2, True, shape.heads)]


def test_large_biases_are_not_rounded_by_the_kernels():
    case = kernels.list_cases("cpu", is_small=True)[-1]
    assert case.large_biases
    table = case.inputs(0).bias_table.detach()
    scaled = table * 1.4426950408889634
    rounded = scaled.to(case.shape.dtype).float()
    torch.testing.assert_close(scaled, rounded, atol=0, rtol=1e-6)
    assert table.abs().max() > 8


def test_runs_that_must_be_bit_identical_are_deterministic(tmp_path, monkeypatch):
    """Without --deterministic, no two runs on a GPU are bit-identical."""
    runs = []

    class Recorder:
        def __init__(self, options, name, steps, *arguments, patch=None):
            runs.append((name, arguments))
            self.folder = tmp_path / name

        def finish(self):
            raise RuntimeError("not run")

    monkeypatch.setattr(training, "TrainRun", Recorder)
    for name in ("_logits_error", "_ddp_error"):
        monkeypatch.setattr(training, name, lambda *_: 0.0)
    training.run(Options("cuda", tmp_path), Report(tmp_path / "rows"))
    compared = [arguments for name, arguments in runs if name in ("full", "resumed")]
    assert len(compared) == 2
    assert all("--deterministic" in arguments and "--config" in arguments for arguments in compared)
    (unsynchronized,) = [arguments for name, arguments in runs if name == "synchronizing"]
    assert "--config" in unsynchronized  # random shift, mixup, erasing and averaging must not wait either


@pytest.mark.parametrize(("factor", "is_equal"), [(1.0, True), (1.001, False)])
def test_gradients_of_ddp_that_cancel_are_compared_with_the_largest(factor, is_equal, monkeypatch):
    """On a GPU, two backward passes differ in rounding: a norm near 0 is no scale for errors."""

    def perturbed(model, *_):
        model.stages[3].blocks[0].attn.bias_table.register_hook(lambda gradient: gradient + 1e-9)
        model.head.weight.register_hook(lambda gradient: factor * gradient)
        return model

    monkeypatch.setattr(distributed, "data_parallel", perturbed)
    assert (training._ddp_error("cpu", "gloo") <= training.MAX_ERROR) == is_equal


def test_memory_kept_by_pytorch_is_freed_before_the_huge_batch(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (calls.append("mem_get_info"), (0, 0))[1])
    report = Report(tmp_path / "rows")
    kernels._check_huge(Options("cuda", tmp_path), report, 0)
    assert calls == ["empty_cache", "mem_get_info"]
    assert read_rows(report.path)[0].note.startswith("skipped: needs ")


def test_an_epoch_of_the_timed_loader_has_enough_batches_for_all_workers(tmp_path):
    """The time of an epoch of two batches is that of two workers, whatever their number."""
    root = loading._write_images(tmp_path / "images", 3)
    (root / "train" / "class0" / "notes.txt").touch()
    assert loading._repeat_images(root, tmp_path / "unused", 3) == root
    repeated = loading._repeat_images(root, tmp_path / "repeated", 10)
    source = open_source(DataConfig(source="folder", root=str(repeated)), "train", 3)
    assert source.class_names == ("class0", "class1")
    assert len(source) == 10
    images = {str(path.resolve()) for path in root.glob("train/*/*.jpg")}
    assert {os.path.realpath(source.describe(index)) for index in range(10)} == images
    assert {source.read(index).size for index in range(10)} == {(500, 375)}
    assert loading._repeat_images(tmp_path, tmp_path / "unused", 3) == tmp_path  # no images


def test_the_time_of_compilation_does_not_omit_models_without(tmp_path, monkeypatch):
    """Compiled models take 30 s here, the others 8 s: there is no time for a fifth compilation only."""
    clock, measured = [0.0], []

    def measure(configuration, *_):
        clock[0] += 30 if configuration.is_compiled else 8
        measured.append(configuration)
        return Measurement({"batch": 128}, {"training": 0.1})

    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(models, "_measure", measure)
    report = Report(tmp_path / "rows")
    models.run(Options("cuda", tmp_path, deadline=200), report)
    assert measured == list(models.CONFIGURATIONS[:-1])
    assert "stopped before deit_small" in "".join(row.note for row in read_rows(report.path))


def test_float32_of_the_timed_models_is_that_of_training(tmp_path, monkeypatch):
    """PyTorch's default for convolutions on GPUs is TF32."""
    allowed = []

    def measure(*_, **__):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return [Measurement({}, {})]

    monkeypatch.setattr(models, "measure_models", measure)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    models._measure(models.Configuration("vil_tiny", "float32"), Options("cpu", tmp_path), Report(tmp_path))
    assert allowed == [False]


def test_the_kernels_of_the_training_runs_are_compiled_in_the_background():
    """Each of the runs, side by side, would compile them again."""
    shapes = kernels.trained_shapes()
    (stage,) = {(shape.heads, shape.head_width, shape.size, shape.window) for shape in shapes}
    assert stage == (2, 24, (8, 8), 2)
    choices = {(shape.precision, shape.spec.neighbors) for shape in shapes}
    assert choices == set(itertools.product(kernels.TOLERANCES, ("all", "one")))


def test_the_share_of_the_time_in_which_the_gpu_computes(tmp_path, monkeypatch):
    """A small attention takes the host longer to launch than the GPU to compute."""

    def measure(_, shape, methods):
        return [Measurement({"method": name}, {"forward": 1e-3, "training": 4e-3}) for name in methods]

    monkeypatch.setattr(speed, "_measure", measure)
    monkeypatch.setattr(speed, "profile_kernels", lambda _: {"forward": 1.0, "key": 2.0})
    report = Report(tmp_path / "rows")
    speed.compare(Options("cuda", tmp_path), report)
    shares = {row.name: row.value for row in read_rows(report.path) if row.unit == "%"}
    assert shares == {"stage 1: the GPU computes": 75.0, "stage 2: the GPU computes": 75.0}
