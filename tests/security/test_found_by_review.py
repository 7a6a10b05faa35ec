"""Attacks that a reviewer found against the first version of these defences."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import signal
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers.audit import NETWORK, recorded
from safetensors.torch import save_file
from torch import nn

import data.loaders
import eval as eval_program
from tools.ablation import main as ablate
from tools.report_page import main as report
from vil import command_line
from vil.checkpoints import checkpoint_files
from vil.checkpoints.open import open_weights
from vil.checkpoints.training_state import read_training_state
from vil.config import ModelConfig, ScheduleConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config
from vil.runtime.yaml_files import parse_yaml, read_yaml
from vil.training.optimizer import build_optimizer, check_optimizer_state, merge_group_options

QUICK = ["--data.workers", "0", "--device", "cpu", "--progress", "false"]
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1_0" / "run"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a program that must not use the network; return its status, output and errors."""

    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with recorded() as events, pytest.raises(SystemExit) as ended:
            command_line.main(main)
        remote = [
            event for event in events if event[0] in NETWORK and "family=1," not in event[1]
        ]  # 1: AF_UNIX
        assert not remote
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


# --- State of an optimizer, which kernels trust ---


def trained_optimizer(name="adamw"):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, ScheduleConfig(optimizer=name))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("adamw", "exp_avg", torch.zeros(1)),
        ("adamw", "exp_avg_sq", torch.zeros(2, 2)),
        ("adamw", "exp_avg", None),
        ("adamw", "step", torch.zeros(2)),
        ("adamw", "exp_avg", torch.zeros(1).expand(10**9)),
        ("sgd", "momentum_buffer", torch.zeros(1)),
        ("lamb", "exp_avg", torch.zeros(1).expand(10**9)),
        ("lamb", "exp_avg", torch.zeros(1).expand(2)),
        ("lion", "exp_avg", torch.eye(3).to_sparse()),
    ],
)
def test_state_of_another_shape_is_refused(name, key, value):
    """A fused kernel reads and writes past the end of a moment that is too small."""
    optimizer = trained_optimizer(name)
    state = optimizer.state_dict()
    check_optimizer_state(optimizer, state)
    if value is None:
        del state["state"][0][key]
    else:
        state["state"][0][key] = value
    with pytest.raises(ValueError, match=key):
        check_optimizer_state(optimizer, state)


def test_options_of_an_optimizer_are_not_taken_from_a_checkpoint():
    built = trained_optimizer().param_groups[0]
    stored = {**built, "fused": None, "amsgrad": True, "lr": 3.0, "foreach": True}
    options = merge_group_options(stored, built)
    assert {key: options[key] for key in ("fused", "amsgrad", "lr")} == {
        "fused": True,
        "amsgrad": False,
        "lr": built["lr"],
    }
    lookahead = trained_optimizer("lookahead_adamw").param_groups[0]
    assert merge_group_options({**lookahead, "lookahead_step": 5}, lookahead)["lookahead_step"] == 5
    assert (
        merge_group_options({**lookahead, "lookahead_step": float("nan")}, lookahead)["lookahead_step"] != 5
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", {}),
        ("config", {"model": [1], "schedule": {}, "data": {}}),
        ("step", 10**17),
        ("watched", {"skipped": 0, "skipped_in_a_row": 0, "losses": [float("nan")]}),
        ("watched", {"skipped": 0, "skipped_in_a_row": 0, "losses": ["1.0"]}),
    ],
)
def test_invalid_run_checkpoints(key, value):
    state = read_training_state(OLD_RUN / "checkpoints" / "best.pt")
    torch.save({**state, key: value}, "x.pt")
    with pytest.raises(UserError, match=f"x.pt: damaged: {key} is not"):
        read_training_state("x.pt")


# --- Grids: keys are names of options, in one spelling ---


@pytest.mark.parametrize(
    "base",
    [
        {"model.name": "timm/resnet10t", "model.timm-options": {"pretrained": True}},
        {"data.download=true #": 1, "data.source": "torch/cifar10", "data.root": "planted"},
        {"data.download": True, "data.source": "torch/cifar10", "data.root": "planted"},
        {"print_config": "all"},
        {"--data.download": True},
        {"model.timm_options=": {"pretrained": True}},
    ],
)
def test_keys_of_grids(call, base):
    factors = {"f": {"a": {"schedule.lr": 0.1}, "b": {"schedule.lr": 0.2}}}
    Path("grid.yaml").write_text(yaml.safe_dump({"base": base, "factors": factors, "seeds": [0]}))
    for argv in (["--report"], []):
        status, _, error = call(ablate.main, "grid.yaml", "--output", "grids", *argv)
        assert status == 2
        assert error.count("\n") == 1
        assert "grid.yaml: base." in error
    assert not Path("planted").exists()


def test_escape_characters_in_the_question_of_a_grid(call):
    content = {
        "question": "x\x1b]0;PWNED\x07",
        "factors": {"f": {"a": {"schedule.lr": 0.1}, "b": {"schedule.lr": 0.2}}},
        "seeds": [0],
    }
    Path("grid.yaml").write_text(yaml.safe_dump(content))
    status, output, _ = call(ablate.main, "grid.yaml", "--output", "grids", "--report")
    assert status == 0
    assert "\x1b" not in output


# --- Pickles: the directory that is checked is the one that is read ---


def stored_zip(content, padding):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, part in (("data.pkl", content), ("version", "3\n"), ("pad", bytes(padding))):
            archive.writestr(f"archive/{name}", part)
    whole = file.getvalue()
    size, offset = struct.unpack("<II", whole[-10:-2])
    return whole[:offset], whole[offset : offset + size]


def test_a_zip_with_two_directories():
    """Python finds a zip's directory from the end of the file, PyTorch from the offset in its last record."""
    huge = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (3 * 10**9).to_bytes(5, "little") + b"\x85R."
    hidden, hidden_directory = stored_zip(huge, 4096)
    shown, directory = stored_zip(pickle.dumps({"net": {"w": 1}}, 2), 0)
    start = len(hidden) + len(hidden_directory)
    moved, position = bytearray(directory), 0
    concatenated = start + len(shown) - len(hidden)
    while position < len(moved):
        lengths = struct.unpack("<HHH", moved[position + 28 : position + 34])
        (offset,) = struct.unpack("<I", moved[position + 42 : position + 46])
        struct.pack_into("<I", moved, position + 42, offset + start - concatenated)
        position += 46 + sum(lengths)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 3, 3, len(moved), len(hidden), 0)
    Path("x.pt").write_bytes(hidden + hidden_directory + shown + bytes(moved) + last)
    assert pickle.loads(zipfile.ZipFile("x.pt").read("archive/data.pkl")) == {"net": {"w": 1}}
    with pytest.raises(UserError, match="the directory of its zip is misplaced"):
        open_weights("x.pt")


# --- YAML: numbers are read in linear time ---


@pytest.mark.parametrize(
    "text",
    [f"name: {'1' * 400_000}x", f"name: {'1_' * 200_000}e", f"name: {'1:' * 200_000}1", "1" * 400_000],
    ids=["digits", "underscores", "base 60", "a number"],
)
def test_long_numbers(text):
    Path("x.yaml").write_text(text)

    def stop(*_):
        raise AssertionError("took more than 20 s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        with contextlib.suppress(UserError):
            read_yaml("x.yaml")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def test_numbers_are_those_of_yaml_1_2():
    assert parse_yaml("[1e-3, 1.5e3, 1_000, 0x1f, -.5e1, .inf, 1:30, 2]") == [
        1e-3, 1.5e3, 1000, 31, -5.0, float("inf"), "1:30", 2,
    ]  # fmt: skip


# --- Files with odd names, and results over inputs ---


def test_a_file_that_is_called_command_line(call):
    options = {"name": "timm/resnet10t", "image_size": 32, "timm_options": {"pretrained": True}}
    Path("command line").write_text(yaml.safe_dump(options))
    status, _, error = call(eval_program.main, "--model", "command line", "--complexity", *QUICK)
    assert status == 2
    assert error.startswith("error: ./command line: model.timm_options.pretrained: ")
    Path("command line").write_text("data: {download: true}\n")
    status, _, error = call(eval_program.main, "--config", "command line", "--model.name", "vil_tiny", *QUICK)
    assert status == 2
    assert error.startswith("error: ./command line: data.download: a file cannot set this option; ")


@pytest.mark.parametrize("option", ["--data", "--config", "--datasets", "--model"])
def test_results_over_a_configuration(call, option):
    text = {"--config": "seed: 1\n", "--model": "name: vil_tiny\n"}.get(option, "source: digits\n")
    Path("d.yaml").write_text(text.replace("seed: 1\n", "batch_size: 8\n"))
    before = Path("d.yaml").read_text()
    argv = ["--complexity", "--model.name", "vil_tiny", *QUICK]
    status, _, error = call(eval_program.main, option, "d.yaml", "--json", "d.yaml", *argv)
    assert (status, Path("d.yaml").read_text()) == (2, before)
    assert "json" in error


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_names_that_no_file_has(call, path):
    Path("m.yaml").write_text(yaml.safe_dump({"name": "vil_tiny", "init_from": path}))
    with pytest.raises(UserError):
        open_weights(path)


@pytest.mark.parametrize("size", [0, -16, 7, 60_000, 10**17])
def test_stored_image_sizes(size):
    config = ModelConfig(name="timm/swin_tiny_patch4_window7_224", image_size=64, num_classes=2)
    weights = {"norm.weight": model_from_config(config).norm.weight}
    metadata = {"name": config.name, "image_size": size, "num_classes": 2}
    save_file(weights, "x.safetensors", {"model": json.dumps(metadata)})
    with pytest.raises(UserError) as refusal:
        eval_program.main(
            ["--checkpoint", "x.safetensors", "--model.image_size", "64", "--complexity", *QUICK]
        )
    assert "x.safetensors" in str(refusal.value)


def test_workers_of_a_stored_data_section(call, monkeypatch):
    """They start processes on this machine, whose number a checkpoint must not determine."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5})
    started = []
    loader_class = data.loaders.DataLoader

    def recording(*arguments, num_workers, **options):
        started.append(num_workers)
        return loader_class(*arguments, num_workers=num_workers, **options)

    monkeypatch.setattr(data.loaders, "DataLoader", recording)
    model = model_from_config(ModelConfig(name="timm/resnet10t", image_size=32, num_classes=10))
    config = {
        "model": {"name": "timm/resnet10t", "image_size": 32},
        "data": {"source": "digits", "workers": 900},
    }
    content = {"model": model.state_dict(), "ema": None, "best": {}, "class_names": list("0123456789")}
    path = Path("run") / checkpoint_files.BEST
    path.parent.mkdir(parents=True)
    torch.save({**content, "config": config}, path)
    checkpoint_files.write_digest(path, checkpoint_files.file_digest(path))
    status, *_ = call(eval_program.main, "--checkpoint", "run", "--device", "cpu", "--progress", "false")
    assert status == 0
    assert started == [2]


def test_a_report_on_a_model_that_cannot_be_counted(call):
    Path("run").mkdir()
    model = {"name": "timm/resnet10t", "image_size": 0, "num_classes": 2}
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": model, "schedule": {}, "data": {}}))
    records = [
        {"kind": "train", "step": s, "epoch": 1, "loss": 1.0, "time": t} for s, t in ((1, -1e308), (2, 1e308))
    ]
    Path("run/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    status, _, error = call(report.main, "run", "--output", "page.html")
    assert status == 0, error
