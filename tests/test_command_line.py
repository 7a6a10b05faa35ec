"""Command lines: precedence, lists and flags, and one line that names the file and the key."""

import argparse
import contextlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vil.command_line import bounded_int, parse, resolve_train_command
from vil.config import EvalConfig, StageConfig, TrainConfig
from vil.errors import UserError, errors_in_section
from vil.evaluation.accuracy import EvaluationDataset, TooFewClassesError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the working folder of the test and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="file.yaml"):
        Path(name).write_text(text)
        return name

    return write


def test_later_arguments_override_earlier_ones_and_files(write):
    model = write("name: vil\nwindow: 3\nstages: [{dim: 8, heads: 1}]\n", "model.yaml")
    partial = write("model: {window: 5}\nschedule: {augment: {mixup: 0.1}}\nseed: 7\n", "partial.yaml")
    base = write("epochs: 9\nlr: 1e-2\n", "schedule.yaml")
    line = parse(
        TrainConfig,
        ["--model", model, "--config", partial, "--schedule.lr=0.5", "--output", "2024"],
        base_files={"schedule": Path(base), "model": Path("not-needed.yaml")},
    )
    config = line.config
    assert (config.model.name, config.model.window, config.seed) == ("vil", 5, 7)
    assert config.model.stages == [StageConfig(dim=8, heads=1)]
    assert (config.schedule.epochs, config.schedule.lr, config.schedule.augment.mixup) == (9, 0.5, 0.1)
    assert config.output == "2024"
    assert line.origins["model.window"] == partial
    assert line.origins["schedule.lr"] == "command line"
    assert line.sets("model")
    assert not line.sets("data")


def test_base_values_are_overridden_by_everything(write):
    stored = {"data": {"source": "folder", "root": "/x"}, "model": {"window": 3, "blocks": [1, 2]}}
    config = parse(
        EvalConfig, ["--data.root", "/y", "--checkpoint", "a", "b", "--complexity"], base_values=stored
    ).config
    assert (config.data.source, config.data.root) == ("folder", "/y")
    assert (config.model.window, config.model.blocks) == (3, (1, 2))
    assert config.checkpoint == ["a", "b"]
    assert config.complexity is True


def test_an_error_is_located_where_its_key_was_set(write):
    line = parse(TrainConfig, ["--model", write("window: 1\n"), "--seed", "3"])
    assert str(line.locate(UserError("model.window", "must be 1"))) == "file.yaml: model.window: must be 1"
    assert str(line.locate(UserError("seed", "too small"))) == "command line: seed: too small"
    assert str(line.locate(UserError("device", "none"))) == "device: none"
    counted = TooFewClassesError(3, EvaluationDataset("x", [], "abcd"))
    of_a_subclass = parse(TrainConfig, ["--model.num_classes", "4"]).locate(counted)
    reason = "model.num_classes: the model has 3 classes, the data has 4"
    assert str(of_a_subclass) == f"command line: {reason}"
    assert pickle.loads(pickle.dumps(of_a_subclass)).num_logits == 3
    stages = parse(TrainConfig, ["--model", write("stages: []\n", "stages.yaml")])
    assert str(stages.locate(UserError("model.stages", "none"))) == "stages.yaml: model.stages: none"
    stage_error = stages.locate(UserError("model.stages[0].dim", "odd"))
    assert str(stage_error) == "stages.yaml: model.stages[0].dim: odd"
    of_a_stage = line.locate(UserError("model.stages[1].window", "must be 1"))
    assert str(of_a_stage) == "file.yaml: model.window: must be 1"
    with (
        pytest.raises(UserError, match=r"^model\.stages\[0\]\.dim: odd$"),
        errors_in_section("model"),
        errors_in_section("stages[0]"),
    ):
        raise UserError("dim", "odd")


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--model", "windw: 7", "model.windw: unknown key; did you mean model.window?"),
        ("--config", "modle: {}", "modle: unknown key; did you mean model?"),
        ("--config", "model: null", "model: expected a mapping of keys to values, got None"),
        (
            "--config",
            "schedule: {augment: {mixp: 1}}",
            "schedule.augment.mixp: unknown key; did you mean schedule.augment.mixup?",
        ),
        (
            "--model",
            "stages: [{dim: 8, head: 1}]",
            "model.stages[0].head: unknown key; did you mean model.stages[0].heads?",
        ),
        (
            "--model",
            "stages: [{dim: 8, heads: one}]",
            "model.stages[0].heads: expected an integer from 1 to 1,000,000, got 'one'",
        ),
        (
            "--model",
            "window: seven",
            "model.window: expected an integer from 1 to 1,000,000 or null, got 'seven'",
        ),
        ("--model", "pool: sum", "model.pool: expected one of avg, cls or null, got 'sum'"),
        ("--schedule", "epochs: 1.5", "schedule.epochs: expected an integer of at least 1, got 1.5"),
        ("--data", "mean: [1, 2]", "data.mean: expected a list of 3 numbers, got [1, 2]"),
        ("--model", "name: a\nname: b", "name: given twice"),
        ("--model", "{: [", "line 1: not valid YAML"),
        ("--model", "- a\n- b", "expected a mapping of keys to values, got ['a', 'b']"),
        ("--model", "", "the file is empty"),
        ("--model", "!!python/object/apply:os.system ['true']", "line 1: not valid YAML"),
        ("--model", "window: 2020-99-99", "line 1: not valid YAML"),
    ],
)
def test_errors_of_a_file(write, option, text, message):
    with pytest.raises(UserError) as error:
        parse(TrainConfig, [option, write(text)])
    assert f"file.yaml: {message}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "none.yaml"], "--model: none.yaml: no such file"),
        (["--model", "."], "--model: .: cannot be read: Is a directory"),
        (["--model"], "--model: expected the path of a YAML file"),
        (["--model.windw", "3"], "command line: --model.windw: unknown option; did you mean --model.window?"),
        (
            ["--model.window", "x"],
            "command line: model.window: expected an integer from 1 to 1,000,000 or null, got 'x'",
        ),
        (
            ["--model.blocks", "1,2"],
            "model.blocks: expected a list of integers from 0 to 1,000,000, e.g. [1, 2] or null",
        ),
        (["--device"], "command line: --device: expected a value"),
        (["word"], "command line: word: unknown option"),
    ],
)
def test_errors_of_the_arguments(write, argv, message):
    with pytest.raises(UserError) as error:
        parse(TrainConfig, argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs/models/vil_small.yaml"
    for name in (
        "configs/models/vil_small.yaml",
        "./configs/models/vil_small.yaml",
        "vil_small.yaml",
        "vil_small",
    ):
        command = parse(TrainConfig, ["--model", name])
        assert (command.config.model.name, command.origins["model.name"]) == ("vil_small", str(file))
    assert parse(TrainConfig, ["--schedule", "deit_300", "--config", "pool_cls"]).config.model.pool == "cls"
    (tmp_path / "vil_small").mkdir()  # a folder, such as a run
    assert parse(TrainConfig, ["--model", "vil_small"]).config.model.name == "vil_small"
    (tmp_path / "vil_small").rmdir()
    (tmp_path / "vil_small").write_text("name: vil_tiny")
    assert parse(TrainConfig, ["--model", "vil_small"]).config.model.name == "vil_tiny"
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/models/vil_base_deep.yaml").write_text("name: vil_tiny")
    assert (
        parse(TrainConfig, ["--model", "configs/models/vil_base_deep.yaml"]).config.model.name == "vil_tiny"
    )
    for name in ("configs/../README.md", "../configs/models/vil_small.yaml", "models/vil_small.yaml"):
        with pytest.raises(UserError) as error:
            parse(TrainConfig, ["--model", name])
        assert str(error.value).startswith(f"--model: {name}: no such file")


FILES = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in FILES if "factors" not in yaml.safe_load(path.read_text())]
"""Grids, which have factors, are for tools/ablate.py."""
SECTIONS = {"models": "--model", "schedules": "--schedule", "data": "--data"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_file_in_configs_is_read_and_begins_with_a_comment(path):
    option = SECTIONS.get(path.parent.name, "--config")
    assert parse(TrainConfig, [option, str(path)]).origins
    opening = path.read_text().split("\n\n")[0]
    assert opening.startswith("# ")
    assert "python" in opening or "torchrun" in opening


KEYS = ["model", "data", "augment", "stages", "window", "name", "x"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(TREES, st.sampled_from(["--config", "--model"]))
def test_any_tree_is_read_or_refused(tmp_path_factory, tree, option):
    path = tmp_path_factory.mktemp("fuzz") / "tree.yaml"
    path.write_text(yaml.safe_dump(tree))
    with contextlib.suppress(UserError):
        parse(TrainConfig, [option, str(path)])


def test_help_lists_every_option_with_its_text():
    run = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    text = " ".join(run.stdout.split())
    assert "--schedule.augment.mixup_switch_prob" in text
    assert "Probability of CutMix if both are on." in text
    assert "default: 0.5" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "1"], "command line: --lr: unknown option; did you mean --schedule.lr?"),
        (["--data-dir", "x"], "command line: --data-dir: unknown option; did you mean --data.root?"),
        (
            ["--schedule.sizes", "1"],
            "command line: --schedule.sizes: unknown option; did you mean --schedule.progressive_resizing?",
        ),
        (
            ["--scheduler.lr", "1"],
            "command line: --scheduler.lr: unknown option; did you mean --schedule.lr?",
        ),
        (
            ["--model", "vil_smal"],
            "--model: vil_smal: no such file; did you mean --model configs/models/vil_small.yaml?",
        ),
        (
            ["--schedule", "schedules/deit.yaml"],
            "--schedule: schedules/deit.yaml: no such file; did you mean "
            "--schedule configs/schedules/deit_300.yaml?",
        ),
        (
            ["--interpolation", "x"],
            "command line: --interpolation: unknown option; did you mean "
            "--schedule.augment.interpolation or --data.interpolation?",
        ),
    ],
)
def test_suggestions_for_unknown_options(monkeypatch, argv, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        parse(TrainConfig, argv)
    assert str(error.value) == message


def test_the_origins_of_a_section_name_the_defaults():
    command = resolve_train_command(
        ["--config", "configs/ablations/pool_cls.yaml", "--model.drop_path", "0.1"]
    )
    assert command.describe_origin("model") == (
        "configs/models/vil_32.yaml, the default; configs/ablations/pool_cls.yaml; command line"
    )


def test_an_open_range_is_described_with_both_ends():
    with pytest.raises(UserError) as error:
        resolve_train_command(["--data.val_fraction", "1"])
    assert str(error.value) == (
        "command line: data.val_fraction: expected a number between 0 and 1, both excluded or null, got 1"
    )


def test_help_without_docstrings():
    """python -OO, or PYTHONOPTIMIZE=2, removes docstrings, which describe some ranges."""
    argv = [sys.executable, "-OO", str(ROOT / "train.py"), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--schedule.augment.mixup VALUE" in done.stdout


@pytest.mark.parametrize("text", ["1" + "0" * 18, "9" * 5000])
def test_integers_of_tools_have_at_most_18_digits(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"of at least 1, of at most 18 digits$"):
        bounded_int(1)(text)
    assert bounded_int(1)("9" * 18) == 10**18 - 1
