"""Published checkpoints, fine-tuning and untrusted files, by the programs."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import eval as eval_program
import train as train_program
from data import build_validation
from tools.programs import export
from vil import command_line, load_released
from vil.checkpoints import checkpoint_files
from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import read_published_config
from vil.checkpoints.training_state import read_training_state
from vil.config import DataConfig, EvalConfig, ModelConfig
from vil.evaluation import report
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.evaluation.cost import Cost
from vil.runtime.class_names import imagenet_classes
from vil.runtime.distributed import Process

ROOT = Path(__file__).parents[1]
PARITY = ROOT / "tests" / "fixtures" / "parity"
CASES = sorted(filter(Path.is_dir, PARITY.iterdir()))
DIGITS = str(ROOT / "configs" / "data" / "digits.yaml")
QUICK = ["--data.workers", "0", "--progress", "false", "--device", "cpu"]
ONE_STEP = [*QUICK, "--schedule.max_steps", "1", "--schedule.epochs", "1", "--loggers", "[]"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call a program; return its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        with pytest.raises(SystemExit) as exit_:
            command_line.main(main)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of colored images in ten classes, 40 to train on and 40 for validation."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for folder in (root / split / name for split in ("train", "val") for name in "0123456789"):
        folder.mkdir(parents=True)
        for number in range(4):
            image = Image.fromarray(generator.integers(0, 256, (12, 9, 3), dtype=np.uint8))
            image.resize((90, 120), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


@pytest.fixture
def no_cost(monkeypatch):
    """Skip the measurement of the cost, which takes longer than everything else."""
    cost = Cost(1, 1, 1.0, 1.0, "not measured", "float32", 1.0)
    monkeypatch.setattr(report, "measure_cost", lambda *args: cost)


@pytest.fixture
def evaluated(call, tmp_path, photographs, no_cost):
    """Evaluate on the photographs; return the result and the console output."""
    source = ["--data.source", "folder", "--data.root", photographs]

    def evaluated(*argv):
        path = tmp_path / "out.json"
        status, out, err = call(eval_program.main, *argv, *source, *QUICK, "--json", path)
        assert status == 0, err
        (result,) = json.loads(path.read_text())
        return result, out

    return evaluated


@pytest.fixture
def by_api(photographs):
    """Evaluate a model without eval.py."""

    def by_api(model, image_size, **transform):
        data = DataConfig(source="folder", root=str(photographs), workers=0, **transform)
        config = EvalConfig(model=ModelConfig(image_size=image_size), data=data)
        images = build_validation(config, Process(0, 0, 1, torch.device("cpu")))
        dataset = EvaluationDataset(images.name, images.loader)
        return evaluate(model.eval(), dataset, EvaluationOptions(torch.device("cpu"), "float32")).values

    return by_api


def published(case, name="model_best.pth"):
    return ["--checkpoint", PARITY / case / name, "--released-config", PARITY / case / "config.yaml"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_parity_case_on_a_data_set(evaluated, by_api, case):
    released = read_published_config(case / "config.yaml")
    argv = ["--model.num_classes", "10"] if released.model.num_classes != 10 else []
    result, _ = evaluated(*published(case.name), *argv)
    model = load_released(case / "config.yaml", case / "model_best.pth", num_classes=10)
    expected = by_api(model, released.model.image_size, **released.transform)
    assert (result["top1"], result["top5"]) == (expected["top1"], expected["top5"])
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert (result["images"], result["model"], result["weights"]) == (40, "vil", "raw")
    assert result["image_size"] == released.model.image_size


def test_the_transform_is_the_published_one_except_for_options(evaluated, by_api, tmp_path):
    case = PARITY / "vil_rpe_chunk"
    tree = yaml.safe_load((case / "config.yaml").read_text())
    tree["INPUT"].update(CROP_PCT=0.5, INTERPOLATION=2, MEAN="(0.2, 0.3, 0.4)", STD=[0.5, 0.6, 0.7])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    argv = ["--checkpoint", case / "model_best.pth", "--released_config", tmp_path / "config.yaml"]
    model = load_released(tmp_path / "config.yaml", case / "model_best.pth")
    transform = {"crop_pct": 0.5, "interpolation": "bilinear", "std": (0.5, 0.6, 0.7)}
    expected = by_api(model, 64, mean=(0.2, 0.3, 0.4), **transform)["loss"]
    result, _ = evaluated(*argv)
    assert result["loss"] == pytest.approx(expected, abs=1e-6)
    result, screen = evaluated(*argv, "--data", DIGITS)
    assert result["loss"] == pytest.approx(expected, abs=1e-6)
    assert f"data.crop_pct: 0.5, required by the weights, overrides {DIGITS}" in screen
    result, _ = evaluated(*argv, "--data", DIGITS, "--data.mean", "[0.9, 0.9, 0.9]")
    changed = by_api(model, 64, mean=(0.9, 0.9, 0.9), **transform)["loss"]
    assert result["loss"] == pytest.approx(changed, abs=1e-6)
    assert changed != pytest.approx(expected, abs=1e-4)


def test_another_resolution_and_fewer_classes_are_shown(evaluated, by_api):
    case = PARITY / "finetune_resolution_rpe_head"
    result, screen = evaluated(*published(case.name), "--model.image_size=96", "--model.num_classes=10")
    model = load_released(case / "config.yaml", case / "model_best.pth", image_size=96, num_classes=10)
    expected = by_api(model, 96, **read_published_config(case / "config.yaml").transform)
    assert result["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert result["image_size"] == 96
    assert "head.weight: (20, 32) → (10, 32), first rows kept" in screen
    assert "stages.2.blocks.0.attn.bias_table: (2, 7, 7) → (2, 11, 11)" in screen


def test_a_published_configuration_alone_has_a_complexity(call, tmp_path):
    config = PARITY / "srformer" / "config.yaml"
    call(eval_program.main, "--released-config", config, "--complexity", *QUICK, "--json", "out.json")
    (result,) = json.loads((tmp_path / "out.json").read_text())
    model = load_released(config, PARITY / "srformer" / "model_best.pth")
    assert result["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert (result["weights"], result["image_size"], result["top1"]) == ("untrained", 64, None)


def test_converted_and_original_evaluate_alike(evaluated, call, tmp_path):
    status, out, err = call(
        export.main,
        PARITY / "vil_rpe_exact" / "model_best.pth",
        "x.safetensors",
        "--released-config",
        PARITY / "vil_rpe_exact" / "config.yaml",
        "--format",
        "safetensors",
    )
    assert status == 0, err
    assert out.startswith("x.safetensors: ")
    original, _ = evaluated(*published("vil_rpe_exact"), "--data", DIGITS)
    converted, _ = evaluated("--checkpoint", "x.safetensors", "--data", DIGITS)
    assert converted["loss"] == original["loss"]


@pytest.fixture
def trained(call, tmp_path, photographs, no_cost):
    """Train for one step on the photographs; return the run's folder and the console output."""
    source = ["--data.source", "folder", "--data.root", photographs, "--schedule.batch_size", "8"]

    def trained(*argv, output="run"):
        status, out, err = call(train_program.main, *ONE_STEP, *source, *argv, "--output", tmp_path / output)
        assert status == 0, err
        return tmp_path / output, out

    return trained


FROZEN = ["--schedule.lr", "1e-20", "--schedule.weight_decay", "0"]
"""A run that leaves its weights where they began."""


def final(run):
    return read_training_state(checkpoint_files.step_files(run)[0][1])["model"]


def test_fine_tuning_from_a_published_checkpoint(trained):
    case = PARITY / "finetune_resolution_rpe_head"
    start = [
        "--model.init_from",
        case / "model_best.pth",
        "--model.init_released_config",
        case / "config.yaml",
    ]
    schedule = ["--schedule", ROOT / "configs/schedules/finetune_384.yaml", "--schedule.batch_size", "8"]
    run, screen = trained(
        *schedule, *start, *FROZEN, *ONE_STEP, "--model.image_size", "96", "--model.drop_path", "0.1"
    )
    assert "head: new, 10 classes; the weights do not name their 20 classes" in screen
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert (config["name"], config["image_size"], config["num_classes"]) == ("vil", 96, 10)
    assert config["drop_path"] == 0.1
    assert config["stages"][0]["window"] == read_published_config(case / "config.yaml").model.stages[0].window
    model = load_released(case / "config.yaml", case / "model_best.pth", image_size=96, num_classes=10)
    for name, value in final(run).items():
        if not name.startswith("head."):
            torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=1e-5)


def test_fine_tuning_a_run_with_its_best_weights(trained):
    model = ROOT / "configs/models/vil_32.yaml"
    run, _ = trained("--model", model, "--schedule.ema_decay", "0.5", "--schedule.lr", "1e-3")
    started, screen = trained("--model.init_from", run, "--model.image_size", "48", *FROZEN, output="tuned")
    best = open_weights(run)
    assert f"starting from {run / checkpoint_files.BEST}, {best.kind} weights" in screen
    assert "head: new, 10 classes; the weights do not name their 10 classes\n" in screen
    assert "stages.1.blocks.0.attn.bias_table" in screen
    ours = final(started)
    body = [name for name in ours if not name.startswith("head.")]
    fixed = [name for name in body if ours[name].shape == best.state_dict[name].shape]
    assert len(fixed) > 30
    assert all(torch.allclose(ours[name], best.state_dict[name], atol=1e-7) for name in fixed)
    # the run continues without its initial weights
    (run / checkpoint_files.BEST).unlink()
    _, screen = trained("--schedule.epochs", "2", "--schedule.max_steps", "2", output="tuned")
    assert "continuing" in screen
    assert "starting from" not in screen


def test_a_named_model_and_a_head_that_does_not_fit(trained, tmp_path):
    case = PARITY / "vil_ape_chunk"
    stages = [vars(stage) for stage in read_published_config(case / "config.yaml").model.stages]
    text = {"name": "vil", "image_size": 64, "num_classes": 12, "stages": stages}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(text))
    argv = ["--model", "model.yaml", "--model.init_from", case / "model_best.pth", *FROZEN]
    run, screen = trained(*argv)
    assert "head: new, 10 classes; the weights do not name their 10 classes" in screen
    model = load_released(case / "config.yaml", case / "model_best.pth")
    torch.testing.assert_close(final(run)["norm.weight"], model.norm.weight)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def untrusted_file(kind, folder):
    """Create a file that every program must refuse; return its path and the expected message."""
    path = folder / "untrusted.pth"
    case = PARITY / "vil_ape_chunk"
    whole = (case / "model_best.pth").read_bytes()
    if kind == "malicious":
        content = torch.load(case / "model_best.pth", weights_only=True)
        torch.save({**content, "extra": Malicious(folder / "victim")}, path)
        return path, "refused"
    if kind == "malicious without a zip":
        path.write_bytes(pickle.dumps(Malicious(folder / "victim")))
        return path, "refused"
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
        return path, "cut off"
    if kind == "another architecture":
        path.write_bytes((PARITY / "srformer" / "model_best.pth").read_bytes())
        return path, "another architecture; "
    if kind == "not finite":
        content = torch.load(case / "model_best.pth", weights_only=True)
        content["net"]["head.bias"][0] = float("nan")
        torch.save(content, path)
        return path, "head.bias holds values that are not finite"
    path.write_bytes(b"" if kind == "empty" else b"hello\n")
    return path, "the file is empty" if kind == "empty" else "not a checkpoint"


KINDS = [
    "malicious",
    "malicious without a zip",
    "truncated",
    "another architecture",
    "not finite",
    "empty",
    "text",
]


@pytest.mark.parametrize("program", ["eval", "train", "safetensors", "onnx"])
@pytest.mark.parametrize("kind", KINDS)
def test_untrusted_files(call, tmp_path, kind, program):
    path, message = untrusted_file(kind, tmp_path)
    before, config = set(tmp_path.iterdir()), PARITY / "vil_ape_chunk" / "config.yaml"
    if program == "eval":
        result = call(eval_program.main, "--checkpoint", path, "--released-config", config, *QUICK)
    elif program == "train":
        result = call(train_program.main, "--model.init_from", path, "--model.init_released_config", config,
                      *ONE_STEP, "--output", tmp_path / "run")  # fmt: skip
    else:
        result = call(export.main, path, tmp_path / "out", "--released-config", config, "--format", program)
    status, _, err = result
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert str(path) in err
    assert message in err
    assert not (tmp_path / "victim").exists()
    written = {p for p in set(tmp_path.rglob("*.*")) if p.is_file()} - before
    assert not written


PTH, YAML = str(PARITY / "vil_ape_chunk" / "model_best.pth"), str(PARITY / "vil_ape_chunk" / "config.yaml")
PUBLISHED = ["--checkpoint", PTH, "--released-config", YAML]


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        ("eval", ["--checkpoint", PTH], "does not describe its model; add the configuration"),
        ("eval", ["--checkpoint", PTH, "--released-config", "no"], "released_config: no: no such file"),
        ("eval", [*PUBLISHED, "--weights", "ema"], "holds raw weights only, not ema"),
        ("eval", [*PUBLISHED, "--model.num_classes", "11"], "head.weight is (10, 32), the model's (11, 32)"),
        ("eval", [*PUBLISHED, "--model.position", "relative"], "unexpected: stages.0.position.globals"),
        ("eval", ["--model.init_from", "x", "--model.name", "vil_tiny"], "model.init_from: is for training"),
        ("eval", ["--model.new_head", "true", "--model.name", "vil_tiny"], "model.new_head: is for training"),
        (
            "train",
            ["--model.new_head", "true"],
            "command line: model.new_head: requires initial weights: model.init_from, or those of timm",
        ),
        ("train", ["--model.init_from", PTH], "does not describe its model; add the configuration"),
        ("train", ["--model.init_from", "nowhere"], "model.init_from: nowhere: no such file or folder"),
        ("train", ["--model.init_released_config", YAML], "requires model.init_from"),
        ("train", ["--model.init_from", PTH, "--model.init_released_config", "no"], "_config: no: no such"),
        ("train", ["--model.name", "vil_tiny", "--model.init_from", PTH], "another architecture"),
        ("export", [PTH, "out", "--format", "safetensors"], "does not describe its model"),
        ("export", [PTH], "command line: the following arguments are required: output, --format"),
        (
            "export",
            [PTH, "/dev/null/out", "--released-config", YAML, "--format", "safetensors"],
            "/dev/null/out: cannot be written",
        ),
        ("export", [PTH, "out", "--format", "exe"], "command line: argument --format: invalid choice"),
    ],
)
def test_invalid_command_lines(call, tmp_path, program, argv, message):
    main = {"eval": eval_program.main, "train": train_program.main, "export": export.main}[program]
    more = {"eval": QUICK, "train": [*ONE_STEP, "--output", tmp_path / "run"]}.get(program, [])
    status, _, err = call(main, *argv, *more)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_run_started_by_timm_continues_without_initial_weights(call, tmp_path, photographs):
    """Options that start a run are read from the command line, and neither stored nor used again."""
    start = timm.create_model("resnet10t", num_classes=10)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    argv = ["--model.name", "timm/resnet10t", "--model.image_size", "32", "--schedule.batch_size", "16"]
    argv += ["--data.source", "folder", "--data.root", photographs]
    options = ["--model.timm_options", "{checkpoint_path: start.pth, drop_rate: 0.1}"]
    status, screen, error = call(train_program.main, *argv, *options, "--output", "run", *ONE_STEP)
    assert status == 0, error
    assert "timm/resnet10t: timm loads weights: checkpoint_path" in screen
    stored = read_training_state(tmp_path / "run" / checkpoint_files.BEST)["config"]
    assert stored["model"]["timm_options"] == {"drop_rate": 0.1}
    (tmp_path / "start.pth").unlink()
    status, screen, error = call(eval_program.main, "--checkpoint", "run", *QUICK)
    assert status == 0, error
    longer = [*QUICK, "--schedule.max_steps", "2", "--schedule.epochs", "1", "--loggers", "[]"]
    status, screen, error = call(train_program.main, *argv, *options, "--output", "run", *longer)
    assert status == 0, error
    assert "continuing run after step 1" in screen
    assert "loads weights" not in screen


def test_a_run_without_its_timm_weights_is_refused(call, tmp_path, photographs):
    """It ended before its first checkpoint, and its folder does not contain the path of the weights."""
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "start.pth")
    argv = ["--model.name", "timm/resnet10t", "--model.image_size", "32", "--schedule.batch_size", "16"]
    argv += ["--data.source", "folder", "--data.root", photographs]
    options = ["--model.timm_options", "{checkpoint_path: start.pth}"]
    status, _, error = call(train_program.main, *argv, *options, "--output", "run", *ONE_STEP)
    assert status == 0, error
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["model"]["timm_options"] = {"checkpoint_path": "start.pth"}  # as before the first checkpoint
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    status, _, error = call(train_program.main, "--output", "run", *QUICK)
    assert status == 2
    assert "was started with checkpoint_path and has no checkpoint yet; give the same command again" in error
    status, screen, error = call(train_program.main, "--output", "run", *options, *QUICK)
    assert status == 0, error
    assert "timm loads weights" in screen


def test_weights_that_timm_loads_are_evaluated_by_class_name(call, tmp_path):
    """Their head has the rows of pretrained_cfg, ImageNet's classes."""
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "in1k.pth")
    names = imagenet_classes()
    argv = ["--model.name", "timm/resnet10t", "--model.image_size", "32", *QUICK]
    argv += ["--model.timm_options", "{checkpoint_path: in1k.pth}", "--data.source", "folder"]
    for root, folders in (
        ("part", names[3:5]),
        ("renamed", [*names[3:5], "n00000001"]),
        ("other", ["cat", "dog"]),
    ):
        for name in folders:
            (tmp_path / root / "val" / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(tmp_path / root / "val" / name / "1.png")
    status, screen, error = call(eval_program.main, *argv, "--data.root", "part")
    assert status == 0, error
    assert " timm " in screen
    for root, message in (
        ("renamed", "class 'n00000001' is not among the 1000"),
        ("other", "no class names to find the row"),
    ):
        status, _, error = call(eval_program.main, *argv, "--data.root", root)
        assert status == 2
        assert message in error
