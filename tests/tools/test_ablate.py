"""tools/ablate.py: grids, scheduling of their runs, collected results and their presentation."""

import csv
import dataclasses
import fcntl
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import forked
from PIL import Image

import train
from tools.ablation import grid as grids
from tools.ablation import main as program
from tools.ablation import output, run_status, scheduler
from tools.ablation.grid import Cell, Grid, read_grid, resolve_train_command
from tools.ablation.progress import Progress
from tools.ablation.results import CellResult, Estimate, collect, estimate, paired_differences
from vil.checkpoints import run_folder
from vil.config import ModelConfig, ScheduleConfig, TrainConfig
from vil.errors import UserError

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for path in (ROOT / "configs" / "ablations").glob("*.yaml")
    if "factors" in yaml.safe_load(path.read_text())
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run each test in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_grid(text, name="grid"):
    Path(f"{name}.yaml").write_text(text)
    return f"{name}.yaml"


# --- Grids --------------------------------------------------------------------------------------------------


def test_cells_are_the_product_of_levels_with_files_and_options(folder):
    """Two models × two windows: a level's model file replaces the base's; options override both."""
    for name in ("small", "large"):
        (folder / f"{name}.yaml").write_text(
            f"name: vil_{ {'small': 'tiny', 'large': 'small'}[name] }\ndrop_path: 0.3\n"
        )
    (folder / "partial.yaml").write_text("schedule: {lr: 0.5}\n")
    path = write_grid(
        "question: Which one?\n"
        "base: {model: small.yaml, model.drop_path: 0.2, schedule.epochs: 3, data.mean: [0.1, 0.2, 0.3]}\n"
        "factors:\n"
        "  model:\n    a: null\n    b 2: {model: large.yaml, config: partial.yaml}\n"
        "  window:\n    7: {}\n    5: {model.window: 5, schedule.epochs: 4}\n"
        "compare: window\nseeds: [3, 1]\n"
    )
    grid = read_grid(path, Path("out"), ["--schedule.epochs", "9", "--model.window=3", "--channels_last"])
    assert [cell.name for cell in grid.cells] == ["a, 7", "a, 5", "b 2, 7", "b 2, 5"]
    values = [
        (c.model.name, c.model.window, c.schedule.epochs, c.schedule.lr, c.model.drop_path)
        for c in (cell.config for cell in grid.cells)
    ]
    assert values == [
        ("vil_tiny", 3, 9, 2e-3, 0.2),
        ("vil_tiny", 5, 4, 2e-3, 0.2),
        ("vil_small", 3, 9, 0.5, 0.2),
        ("vil_small", 5, 4, 0.5, 0.2),
    ]
    assert all(c.config.channels_last and c.config.data.mean == (0.1, 0.2, 0.3) for c in grid.cells)
    assert {name: cell.name for name, cell in grid.reference.items()} == {
        "a, 7": "a, 7", "a, 5": "a, 7", "b 2, 7": "b 2, 7", "b 2, 5": "b 2, 7",
    }  # fmt: skip
    assert (grid.question, grid.seeds) == ("Which one?", (3, 1))
    all_runs = grid.runs()
    assert [(run.cell.name, run.seed) for run in all_runs[:5]] == [
        ("a, 7", 3), ("a, 5", 3), ("b 2, 7", 3), ("b 2, 5", 3), ("a, 7", 1),
    ]  # fmt: skip
    assert all_runs[2].folder == Path("out/grid/model=b_2,window=7/seed=3")
    assert resolve_train_command(all_runs[3].argv).config == all_runs[3].config


BASE = "base: {model.name: vil_tiny}\n"
TWO = "factors: {pool: {avg: null, cls: {model.pool: cls}}}\n"
SEEDS = "seeds: [0]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("factor: {}", "factor: unknown key; did you mean factors?"),
        ("- a", "expected a mapping of keys to values, got ['a']"),
        (BASE + SEEDS, "factors: is missing; expected a mapping of names to plain values"),
        ("factors: {pool: {avg: null}}\n" + SEEDS, "factors.pool: expected two or more levels"),
        ("factors: {pool: {no: null, cls: null}}\n" + SEEDS, "factors.pool: False is not a valid name"),
        ("factors: {pool: {a/b: null, cls: null}}\n" + SEEDS, "factors.pool: 'a/b' is not a valid name"),
        ("factors: {pool: {1: null, '1': null}}\n" + SEEDS, "factors.pool: two levels have the same name"),
        ("factors: {a: {x: none.yaml, y: null}}\n" + SEEDS, "factors.a.x.config: none.yaml: no such file"),
        ("factors: {a: {x: 3, y: null}}\n" + SEEDS, "factors.a.x: expected a YAML file, or options"),
        ("base: {model: none.yaml}\n" + TWO + SEEDS, "base.model: none.yaml: no such file"),
        (
            "base: {model: {pool: cls}}\n" + TWO + SEEDS,
            "base.model: expected the path of a YAML file, got {'pool': 'cls'}; write model.NAME: value",
        ),
        ("base: {seed: 3}\n" + TWO + SEEDS, "base.seed: is set by the grid for each run"),
        (TWO, "seeds: is missing; expected a list of integers of at least 0, e.g. [1, 2]"),
        (TWO + "seeds: [0, 0]", "seeds: expected one or more different seeds, got [0, 0]"),
        (TWO + "seeds: [true]", "seeds: expected a list of integers of at least 0, e.g. [1, 2], got [True]"),
        (TWO + SEEDS + "compare: model", "compare: unknown factor 'model'; expected one of pool"),
        (TWO + SEEDS + "question: [a]", "question: expected text, got ['a']"),
        ("a: 1\na: 2", "a: given twice"),
        # Errors in the configuration of a cell.
        (
            BASE + "factors: {p: {a: {model.widnow: 3}, b: null}}\n" + SEEDS,
            "factors.p.a.model.widnow: unknown option; did you mean --model.window?",
        ),
        (
            BASE + "factors: {p: {a: {model.mask: exact, model.neighbors: self}, b: null}}\n" + SEEDS,
            "factors.p.a.model.neighbors: ",
        ),
        ("base: {schedule.epochs: 0}\n" + TWO + SEEDS, "base.schedule.epochs: "),
        (
            "base: {data.source: folder, data.root: nowhere}\n" + TWO + SEEDS,
            "base.data.root: nowhere: no such folder",
        ),
        (
            f"base: {{data.source: folder, data.root: {'x' * 300}}}\n" + TWO + SEEDS,
            f"base.data.root: {'x' * 300}: no such folder",
        ),
        (
            "base: {data.source: folder}\n" + TWO + SEEDS,
            "cell avg: data.root: is needed for source folder: the folder of the data set",
        ),
        (BASE + "factors: {p: {a: bad.yaml, b: null}}\n" + SEEDS, "cell a: bad.yaml: model.x: unknown key"),
        (
            BASE + "factors: {p: {a: null, b: {model.name: vil_tiny}}}\n" + SEEDS,
            "factors: the cells a and b have the same configuration",
        ),
    ],
)
def test_invalid_grids(text, message, folder):
    (folder / "bad.yaml").write_text("model: {x: 1}\n")
    with pytest.raises(UserError) as error:
        program.main([write_grid(text)])
    assert str(error.value).startswith(f"grid.yaml: {message}")
    assert "\n" not in str(error.value)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--report"], "command line: the following arguments are required: GRID"),
        (
            ["grid.yaml", "--jobs", "0"],
            "command line: argument --jobs: expected an integer of at least 1, got '0'",
        ),
        (["grid.yaml", "a/grid.yaml"], "command line: two grids are called grid"),
        (["none.yaml"], "none.yaml: no such file"),
        (["grid.yaml", "--seed", "3"], "command line: --seed: is set by the grid for each run"),
        (
            ["grid.yaml", "--seeds", "x"],
            "command line: argument --seeds: expected an integer of at least 0, got 'x'",
        ),
        (["grid.yaml", "--model.widnow", "3"], "command line: --model.widnow: unknown option"),
        (["grid.yaml", "--markdown", "page.md"], "--markdown page.md: cannot be read: No such file"),
    ],
)
def test_invalid_arguments(argv, message, folder):
    write_grid(BASE + TWO + SEEDS)
    with pytest.raises(UserError) as error:
        program.main(argv)
    assert str(error.value).startswith(message)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_provided_grids_name_their_command_and_resolve(path, monkeypatch):
    """Resolve only the last cell, which differs most from the base: each cell takes half a second."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any(f"python tools/ablate.py configs/ablations/{path.name}" in line for line in lines)
    check_model = grids._check_model
    monkeypatch.setattr(grids, "check_root", lambda data: None)
    monkeypatch.setattr(grids, "resolve_train_command", lambda argv: SimpleNamespace(config=TrainConfig()))
    monkeypatch.setattr(grids, "_check_model", lambda config: None)
    monkeypatch.setattr(grids, "_check_distinct", lambda cells: None)
    grid = read_grid(str(path), Path("out"))
    assert len(grid.cells) == math.prod(map(len, yaml.safe_load(path.read_text())["factors"].values()))
    assert len(grid.seeds) == 3
    assert len({cell.argv for cell in grid.cells}) == len(grid.cells)
    argv = grid.cells[-1].argv
    for start in (text.partition("=")[2] for text in argv if text.startswith("--model.init_from=")):
        # The run that the header of the file trains.
        options = ["--device", "cpu", "--progress", "false", "--loggers", "[]", "--attention_every", "null"]
        train.main(["--output", start, "--schedule.max_steps", "1", "--data.train_fraction", "0.2", *options])
    check_model(resolve_train_command(argv).config)


# --- Run folders --------------------------------------------------------------------------------------------


def make_grid(folder, cells=("avg", "cls"), seeds=(0, 1, 2), compare=None):
    """Build a grid without a file; its cells differ in the window."""
    made = [
        Cell({"pool": name}, ("--model.window", str(number)), TrainConfig(model=ModelConfig(window=number)))
        for number, name in enumerate(cells, start=3)
    ]
    for cell in made:
        cell.config.schedule = ScheduleConfig(epochs=4)
    reference = {cell.name: made[0] for cell in made}
    return Grid("hand", "Is it better?", tuple(made), reference, tuple(seeds), folder)


def write_run(
    run, top1, ema=None, best=None, config=None, times=((1, 9.0, 5.0), (3, 2.0, 40.0), (4, 1.0, 60.0))
):
    """Write the files of a finished run; times: (step, seconds per step, images per second)."""
    run.folder.mkdir(parents=True, exist_ok=True)
    stored = dataclasses.replace(config or run.config, precision="float32")
    stored.model = dataclasses.replace(stored.model, num_classes=10)
    run_folder.write_config(run.folder, stored)
    steps = [
        {"kind": "train", "step": step, "epoch": 1, "step_time": seconds, "images_per_second": rate}
        for step, seconds, rate in times
    ]
    averaged = {} if ema is None else {"ema_top1": ema}
    evaluations = [
        {"kind": "validation", "step": 4, "epoch": 3, "top1": 99.0},
        {"kind": "spike", "step": 4, "epoch": 3, "loss": 1.0},
        {"kind": "validation", "step": 8, "epoch": 4, "top1": top1, **averaged},
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*steps, *evaluations]))
    summary = {
        "top1": best or top1, "images": 360, "params": 800_000, "flops": 8_000_000, "train_memory_mb": 0.5,
        "eval_memory_mb": 0.25, "images_per_second": 1000.0, "device": "cpu",
    }  # fmt: skip
    (run.folder / "summary.json").write_text(json.dumps([summary]))


def test_metrics_of_a_finished_run(folder):
    (run,) = make_grid(folder, cells=("avg",), seeds=(0,)).runs()
    assert run_status.read_status(run) == run_status.RunStatus(run)
    write_run(run, 90.0, ema=80.0)
    metrics = run_status.read_status(run).metrics
    assert (metrics.top1, metrics.ema_top1, metrics.best_top1, metrics.images) == (90.0, 80.0, 99.0, 360)
    assert (metrics.params, metrics.flops, metrics.train_memory_mb, metrics.eval_memory_mb) == (
        800_000,
        8_000_000,
        0.5,
        0.25,
    )
    assert metrics.images_per_second == 50.0  # the first logged step is left out
    assert metrics.inference_images_per_second == 1000.0
    assert metrics.minutes == pytest.approx((9.0 + 2 * 2.0 + 1.0) / 60)
    assert run_status.completed_epochs(run) == 4
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "epoch": 3}\n')
    assert run_status.completed_epochs(run) == 2
    (run.folder / "summary.json").write_text("[")
    damaged = run_status.read_status(run)
    assert damaged.metrics is None
    assert damaged.failure.startswith(f"{run.folder}: cannot be read: JSONDecodeError")


def test_data_folder_and_logging_options_may_change(folder):
    """--report needs neither the data folder nor the options of logging."""
    grid = make_grid(folder, cells=("avg",), seeds=(0,))
    (run,) = grid.runs()
    data = dataclasses.replace(run.config.data, root="/elsewhere", workers=7)
    write_run(run, 90.0, config=dataclasses.replace(run.config, data=data, log_every=3, save_every=5))
    assert run_status.read_status(run).metrics.top1 == 90.0
    write_grid(BASE + TWO + SEEDS)
    argv = ["--data.source", "folder", "--data.root", "/gone"]
    with pytest.raises(UserError, match="no such folder"):
        read_grid("grid.yaml", folder, argv)
    assert len(read_grid("grid.yaml", folder, argv, check_data=False).cells) == 2


def test_a_report_with_the_options_of_no_run_keeps_the_results(folder):
    write_grid(BASE + TWO + SEEDS)
    for run in read_grid("grid.yaml", folder).runs():
        write_run(run, 90.0)
    program.main(["grid.yaml", "--output", str(folder), "--report"])
    before = {path: path.read_bytes() for path in folder.rglob("results.*")}
    assert len(before) == 4
    with pytest.raises(UserError, match=r"schedule\.epochs: 25 → 2.*the results are left as they are"):
        program.main(["grid.yaml", "--output", str(folder), "--report", "--schedule.epochs", "2"])
    assert {path: path.read_bytes() for path in folder.rglob("results.*")} == before


def test_run_of_another_configuration_is_excluded(folder):
    grid = make_grid(folder)
    for run in grid.runs():
        write_run(run, 90.0)
    run_status.check_unchanged(grid)
    for run in grid.runs()[-2:]:
        changed = dataclasses.replace(run.config, schedule=ScheduleConfig(epochs=7))
        write_run(run, 10.0, config=changed)
    with pytest.raises(UserError) as error:
        run_status.check_unchanged(grid)
    where = grid.runs()[-2].folder
    assert str(error.value) == (
        f"{where}: was started with another configuration (schedule.epochs: 7 → 4), and 1 more runs; "
        "remove it, or name another --output"
    )
    rows = collect(grid)
    assert [row.mean("top1").n for row in rows] == [2, 2]
    assert "- cls, seed 2 is excluded: the grid has changed since (schedule.epochs: 7 → 4)" in output.table(
        rows
    )


# --- Estimates ----------------------------------------------------------------------------------------------


def test_confidence_intervals_use_students_t():
    assert estimate([]) is None
    assert estimate([4.0]) == Estimate(1, 4.0, None, None)
    assert estimate([4.0]).interval is None
    three = estimate([1.0, 2.0, 3.0])
    assert (three.n, three.mean, three.sd) == (3, 2.0, 1.0)
    assert three.margin == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2)
    assert three.interval == pytest.approx((2 - three.margin, 2 + three.margin))
    assert estimate([0.0, 2.0]).margin == pytest.approx(12.706205, rel=1e-6)  # t(0.975, 1) · √2 / √2


def test_intervals_of_accuracies_end_at_0_and_100():
    assert estimate([99.0, 99.5], (0, 100)).interval == (pytest.approx(99.25 - 12.706205 / 4, rel=1e-6), 100)
    assert estimate([1.0, 2.0], (0, 100)).interval[0] == 0
    statuses = {
        seed: SimpleNamespace(metrics=SimpleNamespace(top1=top1, minutes=top1))
        for seed, top1 in enumerate([99.0, 99.5])
    }
    result = CellResult(None, None, statuses, [-99.0, -100.0])
    assert result.mean("top1").interval[1] == 100 < result.mean("minutes").interval[1]
    assert result.difference.interval[0] == -100


def test_95_percent_of_the_intervals_contain_the_mean():
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(4000, 3))
    held = [low <= 5.0 <= high for low, high in (estimate(list(row)).interval for row in draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_differences_are_paired_by_seed():
    differences = paired_differences({0: 91.0, 1: 82.0, 5: 0.0}, {1: 81.0, 0: 88.0, 7: 3.0})
    assert differences == [3.0, 1.0]
    assert estimate(differences).sd == pytest.approx(math.sqrt(2))
    assert paired_differences({0: 1.0}, {1: 1.0}) == []


# --- Results ------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(folder):
    """avg: 90, 91, 92; cls: 88, 90, failed; max: never run."""
    grid = make_grid(folder / "runs", cells=("avg", "cls", "max"))
    values = {("avg", 0): 90.0, ("avg", 1): 91.0, ("avg", 2): 92.0, ("cls", 0): 88.0, ("cls", 1): 90.0}
    for run in grid.runs():
        if (run.cell.name, run.seed) in values:
            write_run(run, values[run.cell.name, run.seed], best=95.0)
        elif run.cell.name == "cls":
            run.folder.mkdir(parents=True)
            (run.folder / run_status.FAILURE).write_text("step 3: the loss is nan\n")
    return grid


def test_table_has_means_intervals_and_paired_differences(filled):
    shown = output.table(collect(filled))
    head, _, *lines = (
        [cell.strip() for cell in line.strip("| ").split("|")] for line in shown.splitlines() if "|" in line
    )
    table = [dict(zip(head, line)) for line in lines]
    avg, cls, never = table
    assert avg == {
        "cell": "avg", "seeds": "3", "Top-1 %, last epoch": "91.00 ± 1.00", "95 % interval": "88.52 to 93.48",
        "paired difference": "base", "best epoch %": "99.00 ± 0.00", "params M": "0.80", "FLOPs M": "8.00",
        "train MB": "0.50", "eval MB": "0.25", "images/s": "50", "minutes": "0.2",
    }  # fmt: skip
    assert cls["seeds"] == "2 of 3, 1 failed"
    assert cls["Top-1 %, last epoch"] == "89.00 ± 1.41"
    assert cls["paired difference"] == "-1.50 (-7.85 to +4.85), 2 of 3 pairs"
    assert set(list(never.values())[2:]) == {"-"}
    failed_folder = filled.folder / "pool=cls" / "seed=2"
    assert shown.endswith(f"\n\n- cls, seed 2 failed: step 3: the loss is nan ({failed_folder})")


def test_ema_column_is_shown_if_a_run_has_ema(filled):
    rows = collect(filled)
    assert "EMA" not in output.table(rows)
    write_run(filled.runs()[0], 90.0, ema=93.0)
    assert "EMA %" in output.table(collect(filled))
    assert collect(filled)[0].mean("ema_top1") == Estimate(1, 93.0, None, None, (0, 100))


def test_result_files_agree_with_the_table(filled):
    rows = collect(filled)
    output.write_results(filled, rows, "COMMAND")
    folder = filled.folder
    text = (folder / "results.md").read_text()
    assert text.startswith("# hand\n\nIs it better?\n\n```sh\nCOMMAND\n```\n")
    assert output.table(rows) in text
    assert "360 validation images (one image: 0.28 %)" in text
    assert "![results](results.png)" in text
    avg, cls, never = csv.DictReader((folder / "results.csv").open())
    assert (avg["cell"], avg["pool"], avg["n"], avg["failed"]) == ("avg", "avg", "3", "0")
    assert (float(avg["top1"]), float(avg["top1_sd"]), avg["difference"]) == (91.0, 1.0, "")
    assert (float(cls["difference"]), cls["pairs"], cls["compared_with"], cls["failed"]) == (
        -1.5,
        "2",
        "avg",
        "1",
    )
    assert (never["n"], never["top1"], never["params"]) == ("0", "", "")
    content = json.loads((folder / "results.json").read_text())
    assert (content["grid"], content["command"]) == ("hand", "COMMAND")
    assert [cell["n"] for cell in content["cells"]] == [3, 2, 0]
    assert [run.get("top1") for run in content["runs"]] == [90, 91, 92, 88, 90, None, None, None, None]
    assert content["runs"][5]["failure"] == "step 3: the loss is nan"
    assert not list(folder.glob("*.tmp"))
    with Image.open(folder / "results.png") as image:
        assert image.width > 800


def test_figure_shows_every_seed_and_interval(filled):
    left, right = output.draw_figure(filled, collect(filled)).axes
    seeds = [line.get_xdata().tolist() for line in left.lines if line.get_marker() == "o"]
    assert seeds == [[90.0, 91.0, 92.0], [88.0, 90.0], []]
    (bars,) = (c.lines[2][0].get_segments() for c in left.containers[:1])
    assert bars[0][:, 0] == pytest.approx(estimate([90.0, 91.0, 92.0]).interval)
    differences = [line.get_xdata().tolist() for line in right.lines if line.get_marker() == "o"]
    assert differences == [[-2.0, -1.0]]
    assert [label.get_text() for label in left.get_yticklabels()] == ["avg", "cls", "max"]


def test_results_are_inserted_between_markers(filled):
    page = Path("docs/page.md")
    page.parent.mkdir()
    page.write_text(
        "above\n<!-- begin hand -->\nold\n<!-- end hand -->\nbelow <!-- begin other --><!-- end other -->\n"
    )
    rows = collect(filled)
    for _ in range(2):
        output.insert_into_page(page, filled, rows, "COMMAND")
    text = page.read_text()
    assert text.startswith("above\n<!-- begin hand -->\n\nIs it better?")
    assert text.endswith(
        "![Is it better?](figures/ablation_hand.png)\n\n<!-- end hand -->\n"
        "below <!-- begin other --><!-- end other -->\n"
    )
    assert "old" not in text
    assert text.count("COMMAND") == 1
    assert (page.parent / "figures" / "ablation_hand.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("<!-- end hand --> <!-- begin hand -->")
    with pytest.raises(UserError, match=r"--markdown docs/page\.md: contains no <!-- begin hand -->"):
        output.check_markers(page, ["hand"])


def test_reproducing_command_hides_the_data_folder():
    argv = ["a.yaml", "--data.root", "/home/me/x", "--report", "--seeds", "0", "--data.root=/y", "--x", "a b"]
    assert output.reproducing_command(argv) == (
        "python tools/ablate.py a.yaml --data.root DIR --seeds 0 --data.root=DIR --x 'a b'"
    )


# --- Processes ----------------------------------------------------------------------------------------------

FAKE = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
folder = pathlib.Path(argv[argv.index("--output") + 1])
with open("calls.txt", "a") as calls:
    print(folder.parent.name, folder.name, os.environ["OMP_NUM_THREADS"],
          os.environ.get("CUDA_VISIBLE_DEVICES"), file=calls)
print("hello from", folder)
if pathlib.Path("behave.py").exists():
    exec(pathlib.Path("behave.py").read_text())
(folder / "summary.json").write_text("done")
"""
"""Replacement of train.py without its slow imports; it executes behave.py of the working folder."""


@pytest.fixture
def fake(folder, monkeypatch):
    """Replace train.py by FAKE; a run is finished if its summary.json exists."""
    (folder / "fake.py").write_text(FAKE)
    monkeypatch.setattr(scheduler, "PROGRAM", [sys.executable, "-S", str(folder / "fake.py")])
    monkeypatch.setattr(scheduler, "POLL_INTERVAL_S", 0.01)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    metrics = SimpleNamespace(top1=50.0)

    def read_status(run):
        if (run.folder / "summary.json").exists():
            return run_status.RunStatus(run, metrics=metrics)
        failure = run.folder / run_status.FAILURE
        return run_status.RunStatus(run, failure=failure.read_text().strip() if failure.exists() else None)

    monkeypatch.setattr(scheduler, "read_status", read_status)

    def execute(grid, jobs=1, gpus=()):
        missing = [run for run in grid.runs() if read_status(run).metrics is None]
        progress = Progress(missing)
        try:
            scheduler.execute(missing, jobs, gpus, progress)
        finally:
            progress.bar.close()
        return [line.split() for line in Path("calls.txt").read_text().splitlines()]

    return execute


def when(is_ready, act):
    """Call `act` in the background as soon as `is_ready` returns True."""

    def wait():
        while not is_ready():
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_runs_share_cores_and_gpus_and_write_logs(fake, folder, capsys):
    grid = make_grid(folder / "runs", seeds=(0, 1))
    (folder / "behave.py").write_text(
        "time.sleep(0.3)\nimport fcntl\n"
        "try: fcntl.flock((folder / '.ablate.lock').open('a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('locked')\n"
    )
    calls = fake(grid, jobs=2, gpus=["4", "7"])
    assert sorted(call[:2] for call in calls) == [
        [f"pool={p}", f"seed={s}"] for p in ("avg", "cls") for s in "01"
    ]
    assert [call[2] for call in calls] == ["4"] * 4
    assert sorted(call[3] for call in calls) == ["4", "4", "7", "7"]
    assert calls[0][3] != calls[1][3]
    for run in grid.runs():
        assert (run.folder / "log.txt").read_text() == f"hello from {run.folder}\nlocked\n"
    shown = capsys.readouterr().out
    assert shown.count("started") == 4
    assert "[4/4]" in shown
    assert "Top-1 50.00 %" in shown
    assert fake(grid, jobs=2) == calls  # nothing is called again


def test_failed_run_reports_its_reason_and_others_continue(fake, folder, capsys):
    grid = make_grid(folder / "runs", cells=("avg", "cls", "max", "sum"), seeds=(0,))
    (folder / "behave.py").write_text(
        "if 'cls' in str(folder): sys.exit('warning\\nerror: the loss is nan\\nlate warning')\n"
        "if 'max' in str(folder): os.kill(os.getpid(), 9)\n"
        "if 'sum' in str(folder): os._exit(0)\n"
    )
    calls = fake(grid)
    assert [call[0] for call in calls] == ["pool=avg", "pool=cls", "pool=max", "pool=sum"]
    reasons = [scheduler.read_status(run).failure for run in grid.runs()]
    assert reasons == [None, "the loss is nan", "ended by SIGKILL", "exit status 0 without a message"]
    assert "[2/4] cls, seed 0: failed: the loss is nan" in capsys.readouterr().out
    (folder / "behave.py").unlink()
    assert len(fake(grid)) == 4 + 3  # only what failed is called again
    assert [scheduler.read_status(run).failure for run in grid.runs()] == [None] * 4


@pytest.fixture
def default_signal_handlers():
    """Restore the signal handlers of a foreground job, which nohup and `&` change."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signal_handlers")
@pytest.mark.parametrize(
    ("number", "passed"),
    [(signal.SIGINT, "2"), (signal.SIGTERM, "15"), (signal.SIGHUP, "15")],  # runs do not save at a SIGHUP
)
def test_signal_is_forwarded_and_ends_the_runs(fake, folder, number, passed):
    grid = make_grid(folder / "runs", seeds=(0,))
    (folder / "behave.py").write_text(
        "import signal\n"
        "def end(number, frame):\n"
        "    (folder / 'signal.txt').write_text(str(int(number))); sys.exit(1)\n"
        "for number in (2, 15): signal.signal(number, end)\n"
        "(folder / 'ready').touch(); time.sleep(60)\n"
    )

    ready = [run.folder / "ready" for run in grid.runs()]
    when(lambda: all(path.exists() for path in ready), lambda: os.kill(os.getpid(), number))
    with pytest.raises(scheduler.Stopped) as stopped:
        fake(grid, jobs=2)
    assert stopped.value.signum == number
    for run in grid.runs():
        assert (run.folder / "signal.txt").read_text() == passed
        assert not (run.folder / run_status.FAILURE).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_unresponsive_process_is_killed(fake, folder, monkeypatch):
    monkeypatch.setattr(scheduler, "KILL_DELAY_S", 0.2)
    grid = make_grid(folder / "runs", cells=("avg",), seeds=(0,))
    grid.cells[0].config.grace_period = 0.1
    (folder / "behave.py").write_text(
        "import signal\nsignal.signal(15, signal.SIG_IGN)\n"
        "(folder / 'ready').write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    ready = grid.runs()[0].folder / "ready"
    when(lambda: ready.exists() and ready.read_text(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(scheduler.Stopped):
        fake(grid)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.read_text()), 0)


def hold_lock(run_folder, host):
    """Lock a run as the first job of a call on a host does; return the open file."""
    run_folder.mkdir(parents=True)
    lock = (run_folder / ".ablate.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(f"0 {host}")
    lock.flush()
    return lock


@pytest.mark.parametrize("here", [True, False])
def test_run_locked_by_another_process_is_waited_for(fake, folder, capsys, here):
    """After a killed call of the tool, its train.py still runs and holds the lock; on this machine it counts
    as one of the jobs."""
    grid = make_grid(folder / "runs", seeds=(0,))
    first, second = (run.folder for run in grid.runs())
    lock = hold_lock(first, socket.gethostname() if here else "another")

    def finish():
        time.sleep(0.3)
        assert second.exists() != here
        (first / "summary.json").write_text("by another call")
        lock.close()

    when(lambda: here or (second / "summary.json").exists(), finish)
    assert [call[0] for call in fake(grid)] == ["pool=cls"]
    assert (second / ".ablate.lock").read_text() == f"0 {socket.gethostname()}"
    shown = capsys.readouterr().out
    assert shown.count("avg, seed 0: waiting for another process that trains it") == 1
    assert f"[{1 if here else 2}/2] avg, seed 0: Top-1 50.00 %" in shown


def test_slot_of_another_process_is_not_reused(fake, folder):
    """Two slots and GPUs; a run of another call has the first slot."""
    grid = make_grid(folder / "runs", cells=("avg", "cls", "max"), seeds=(0,))
    first = grid.runs()[0].folder
    lock = hold_lock(first, socket.gethostname())

    def finish():
        (first / "summary.json").write_text("by another call")
        lock.close()

    when((grid.runs()[2].folder / "summary.json").exists, finish)
    calls = fake(grid, jobs=2, gpus=["4", "7"])
    assert [(call[0], call[3]) for call in calls] == [("pool=cls", "7"), ("pool=max", "7")]


def test_remaining_time_includes_running_epochs(folder, monkeypatch, capsys):
    grid = make_grid(folder, cells=("avg", "cls"), seeds=(0, 1))  # four runs of four epochs
    progress = Progress(grid.runs())
    for run in grid.runs()[:2]:
        progress.run_started(run)
    second = grid.runs()[1].folder
    second.mkdir(parents=True)
    (second / "metrics.jsonl").write_text('{"kind": "validation", "epoch": 2}\n')
    progress.start_time -= 60.0
    progress.run_ended(run_status.RunStatus(grid.runs()[0], metrics=SimpleNamespace(top1=50.0)))
    assert "about 01:40 left" in capsys.readouterr().out  # six of sixteen in a minute
    progress.bar.close()


def test_visible_gpus_follow_cuda_visible_devices(monkeypatch):
    monkeypatch.setattr(scheduler.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert scheduler.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    assert scheduler.visible_gpus() == ["GPU-a", "5"]
    monkeypatch.setattr(scheduler.torch.cuda, "device_count", lambda: 0)
    assert scheduler.visible_gpus() == []


@pytest.mark.parametrize(
    ("jobs", "device", "expected"), [(None, "auto", 2), (3, "auto", 3), (None, "cpu", 1)]
)
def test_default_is_one_run_per_gpu(jobs, device, expected, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(
        program, "execute", lambda missing, jobs, gpus, progress: asked.append((jobs, len(gpus)))
    )
    grid = make_grid(folder)
    for cell in grid.cells:
        cell.config.device = device
    program.run_unfinished(grid.runs(), jobs)
    assert asked == [(expected, 0 if device == "cpu" else 2)]


# --- End to end ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupted_grid_continues_and_failed_cell_is_reported(folder, monkeypatch, capsys):
    """Stop the real train.py in the second cell, call again; the third cell has no images and fails."""
    (folder / "empty").mkdir()
    write_grid(
        "base: {model: configs/models/vil_32.yaml, model.blocks: [1, 1, 1], schedule.epochs: 1,\n"
        "  device: cpu, schedule.max_steps: 2, schedule.batch_size: 8, data.workers: 0, loggers: []}\n"
        "factors:\n  what:\n    avg: null\n    cls: configs/ablations/pool_cls.yaml\n"
        "    none: {data.source: folder, data.root: empty}\n"
        "seeds: [0]\n"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(scheduler, "PROGRAM", [forked.python(), *scheduler.PROGRAM[1:]])
    results_of = folder / "runs" / "ablations" / "grid"
    first, second = (results_of / f"what={level}" / "seed=0" for level in ("avg", "cls"))

    when((second / "config.yaml").exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        program.main(["grid.yaml"])
    assert stopped.value.code == 143
    assert "stopped; run the same command again to continue" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert not (second / "summary.json").exists()

    with pytest.raises(SystemExit) as ended:
        program.main(["grid.yaml", "--jobs", "2"])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "3 runs, 1 finished; running 2 at a time" in shown
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
    assert "- none, seed 0 failed: " in shown
    avg, cls, none = json.loads((results_of / "results.json").read_text())["cells"]
    assert [(cell["n"], cell["failed"]) for cell in (avg, cls, none)] == [(1, 0), (1, 0), (0, 1)]
    values = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["top1"] for run in (first, second)
    ]
    assert [avg["top1"], cls["top1"]] == values
    assert cls["difference"] == pytest.approx(values[1] - values[0])

    kept = (results_of / "results.json").read_bytes()  # one run failed, the others had other options
    with pytest.raises(UserError, match=r"options than --report has now \(schedule\.epochs: 1 → 2\)"):
        program.main(["grid.yaml", "--report", "--schedule.epochs", "2"])
    assert (results_of / "results.json").read_bytes() == kept


def test_a_grid_is_refused_under_torchrun_and_its_runs_are_single_processes(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        program.main(["configs/ablations/pooling_digits.yaml"])
    assert str(caught.value) == (
        "environment: WORLD_SIZE: tools/ablate.py starts the processes of its runs itself; run it without "
        "torchrun"
    )
    environment = scheduler._environment(1, 0, [])
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert "MASTER_ADDR" not in environment
