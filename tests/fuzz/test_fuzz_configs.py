"""Mutated YAML files as input of the programs: a configuration, or one line."""

import contextlib
import copy
import dataclasses
import functools
import os
import random
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import sklearn.datasets
import torch
import yaml
from helpers.mutations import (
    CHANGES,
    EDITS,
    EXAMPLES,
    TEXTS,
    VALUES,
    as_yaml,
    bounded,
    changed_bytes,
    changed_tree,
    examples,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import eval as eval_program
import train as train_program
import vil
from vil import command_line
from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import read_published_config
from vil.command_line import resolve_train_command
from vil.config import EvalConfig, TrainConfig
from vil.errors import UserError
from vil.models import limits
from vil.models.zoo import model_from_config
from vil.runtime.distributed import Process
from vil.runtime.epoch_steps import EpochSteps
from vil.training.optimizer import build_optimizer, build_scheduler

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "fixtures" / "parity"
PROCESS = Process(0, 0, 1, torch.device("cpu"))
MEMORY = 12_000_000
"""Bytes of weights that a model may have here: three million, so that no example builds for long."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """(Kind, bytes) of whole files of every kind: the options that may name them are the kinds."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / split / name / f"{number}.png")
    own_data = {"source": "folder", "root": str(folder), "workers": 0, "list_file": None, "real_labels": None}
    found = [("--data", as_yaml(own_data))]
    for kind in ("models", "schedules", "data"):
        option = {"models": "--model", "schedules": "--schedule", "data": "--data"}[kind]
        found += [(option, path.read_bytes()) for path in sorted((ROOT / "configs" / kind).glob("*.yaml"))]
    found += [("--config", b"model: {mask: cyclic}\nschedule: {augment: {mixup: 0.8}}\nseed: 3\n")]
    whole = dataclasses.asdict(resolve_train_command([]).config)
    for name in ("vil_32", "vil_32", "vil_32"):  # a run's own file, with every option in it
        whole["model"] |= yaml.safe_load((ROOT / "configs" / "models" / f"{name}.yaml").read_text())
        found += [("--config", as_yaml(whole)), ("run", as_yaml(whole)), ("stored", as_yaml(whole))]
    found += [("released", path.read_bytes()) for path in sorted(PARITY.glob("*/config.yaml"))]
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Small models, digits that are read once, no downloads, and a separate folder."""
    monkeypatch.setattr(limits, "total_memory", lambda: MEMORY)
    monkeypatch.setattr(sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)


def to_training(argv):
    """Run train.py on a command line up to the first step."""
    command = resolve_train_command(argv)
    try:
        config = command.config
        loaders, model, _ = train_program.build(config, PROCESS, is_new=False)
        optimizer = build_optimizer(model, config.schedule)
        build_scheduler(optimizer, config.schedule, EpochSteps.constant(loaders.train.steps_per_epoch))
    except UserError as error:
        raise command.locate(error) from error


def to_evaluation(argv):
    """Open the model and the data sets of a command line of eval.py."""
    line = command_line.ParsedArguments(EvalConfig, argv, prog="eval.py")
    eval_program.open_evaluation(None, line, line.resolve(), PROCESS)


def use(kind, content):
    """Pass a file's bytes to every program and option that reads such files."""
    path = Path("strange.yaml")
    path.write_bytes(content)
    if kind == "released":
        model_from_config(read_published_config(path).model)
        with contextlib.suppress(UserError):  # that the weights do not fit another model is no news
            vil.load_released(path, PARITY / "vil_rpe_chunk" / "model_best.pth")
    elif kind == "run":
        Path("run").mkdir(exist_ok=True)
        path.rename("run/config.yaml")
        to_training(["--output", "run"])
    elif kind == "stored":  # the configuration in a checkpoint, which is no YAML there
        config = yaml.load(content, Loader=yaml.CSafeLoader)
        state = {
            "model": {"w": torch.ones(1)},
            "ema": None,
            "best": {},
            "class_names": ["a"],
            "config": config,
        }
        torch.save(state, "strange.pt")
        file = open_weights("strange.pt")
        model_from_config(file.model, 10)
        command_line.parse(EvalConfig, [], base_values={"data": dict(file.data)})
    elif kind == "--schedule":
        to_training([kind, str(path)])
    else:
        to_training([kind, str(path)])
        if kind != "--config":
            to_evaluation([kind, str(path)])


def check(kind, content):
    """Fail unless the input is accepted, or refused with one line."""
    with bounded():
        try:
            use(kind, content)
        except UserError as error:
            end, line = 2, str(error)
        except SystemExit as error:
            end, line = error.code, "help"
        else:
            return
    assert end in (0, 2)
    assert line.isprintable()
    assert line.strip()


def options(config_class, prefix=()):
    """(Path of keys, type) of every option."""
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            yield from options(hint, (*prefix, name))
        else:
            yield (*prefix, name), hint


NUMBERS = [0, 1, 2, 3, 5, 7, 16, 33, 100, 4097, 10**5, 10**6, 10**9, 10**17, -1, -7, -(10**9)]
FRACTIONS = [0, 1, 2, 0.5, 0.999, 1e-3, 1e-9, 1e-320, 1e9, 1e308, -0.5, -1, float("nan"), float("inf")]
SAMPLE_TEXTS = [
    "", ".", "..", "x", "vil", "vil_tiny", "timm/resnet10t", "timm/vit_tiny_patch16_224", "timm/x",
    "digits", "folder",
    "zip", "tar", "wds", "ffcv", "torch/cifar10", "torch/fake", "hfds/x", "hfids/x", "train", "val",
    "test", "/dev/zero",
    "/dev", "/etc/passwd", "~nobody/x", "a\nb", "\x1b[2J", "\0", "x" * 5000, "rand-m9-mstd0.5-inc1",
    "rand-m9", "augmix",
    "augmix-w99-d99", "original-mstd1", "3a", "trivial", "sgd", "lion", "adafactor", "lookahead_sgd",
    "muon", "kron",
    "adahessian", "lbfgs", "bnbadam8bit", "cuda", "cuda:9", "cpu", "meta", "mps", "strange.yaml",
]  # fmt: skip


def values_of(hint):
    """Values that an option accepts, the most unlikely ones among them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values_of(a) for a in arguments))
    if origin is tuple and arguments[-1] is not ...:
        return st.tuples(*(values_of(a) for a in arguments)).map(list)
    if origin in (list, tuple):
        return st.lists(values_of(arguments[0]), max_size=4)
    if dataclasses.is_dataclass(hint):
        fields = {key[0]: values_of(inner) for key, inner in options(hint)}
        need = {key: fields[key] for key in ("dim", "heads")}
        return st.fixed_dictionaries(need, optional={k: v for k, v in fields.items() if k not in need})
    if origin is dict:
        names = st.sampled_from(
            ["depth", "embed_dim", "img_size", "num_heads", "pretrained", "x", "patch_size"]
        )
        return st.dictionaries(names, VALUES, max_size=3)
    kinds = {int: st.sampled_from(NUMBERS), float: st.sampled_from(FRACTIONS), bool: st.booleans(),
             str: st.sampled_from(SAMPLE_TEXTS), type(None): st.none()}  # fmt: skip
    return kinds[hint]


OPTIONS = list(options(TrainConfig))
CHOSEN = st.lists(st.sampled_from(OPTIONS).flatmap(lambda o: st.tuples(st.just(o[0]), values_of(o[1]))),
                  min_size=1, max_size=4)  # fmt: skip


@examples(40)
@given(which=st.sampled_from(["--config", "--config", "run", "stored"]), chosen=CHOSEN)
def test_values_of_the_right_type(seeds, which, chosen):
    tree = yaml.load(dict(seeds)[which], Loader=yaml.CSafeLoader) if which != "--config" else {}
    for (*sections, name), value in chosen:
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = copy.deepcopy(value)
    check(which, as_yaml(tree))


@examples(40)
@given(which=st.integers(0, 10**6), changes=CHANGES)
def test_changed_trees(seeds, which, changes):
    kind, content = seeds[which % len(seeds)]
    tree = changed_tree(yaml.load(content, Loader=yaml.CSafeLoader), changes)
    try:
        content = as_yaml(tree)
    except Exception:  # PyYAML cannot write it
        return
    check(kind, content)


@examples(40)
@given(which=st.integers(0, 10**6), edits=EDITS)
def test_changed_bytes(seeds, which, edits):
    kind, content = seeds[which % len(seeds)]
    if kind != "stored":
        check(kind, changed_bytes(content, edits))


@pytest.mark.skipif(not EXAMPLES, reason="thirty processes: only with FUZZ_EXAMPLES")
@pytest.mark.parametrize("number", range(30))
def test_exit_statuses_of_processes(seeds, number):
    drawn = random.Random(number)
    option, content = drawn.choice([seed for seed in seeds if seed[0].startswith("--m")])
    edits = [
        (
            drawn.choice(["insert", "replace", "flip"]),
            drawn.random(),
            drawn.choice(TEXTS),
            drawn.randrange(256),
        )
    ]
    Path("strange.yaml").write_bytes(changed_bytes(content, edits[: drawn.randrange(2)]))
    program, *argv = drawn.choice([("eval.py", "--complexity"), ("train.py", "--print_config")])
    line = [sys.executable, str(ROOT / program), option, "strange.yaml", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 2), done.stderr
    assert done.stderr.count("\n") == (done.returncode == 2), done.stderr
    assert done.stderr.startswith("error: ") or not done.returncode


@pytest.mark.parametrize(
    ("option", "content", "line"),
    [
        ("--data", "crop_pct: 1.0e-320", "data.crop_pct: expected a number from 0.01 to 1"),
        (
            "--data",
            "workers: 1000000000",
            "data.workers: expected an integer from 0 to 1,024, got 1000000000",
        ),
        ("--data", "list_file: /dev/zero", "data.list_file: /dev/zero: is not a regular file"),
        ("--data", "real_labels: /dev/zero", "data.real_labels: /dev/zero: is not a regular file"),
        ("--data", "workers: null", "data.workers: expected an integer from 0 to 1,024, got None"),
        ("--model", "name: null", "model.name: expected text, got None"),
        (
            "--model",
            "{name: vil, stages: [{dim: 1000000000, heads: 1}]}",
            "model.stages[0].dim: expected an integer",
        ),
        ("--model", "{name: vil, stages: [{dim: 9000, heads: 1}]}", "model.name: takes more memory"),
        (
            "--model",
            "{name: vil, stages: [{dim: 64, heads: 1, blocks: 1000000}]}",
            "model.blocks: a model has at most 2,000 blocks",
        ),
        (
            "--model",
            "{name: timm/vit_tiny_patch16_224, timm_options: {depth: 100000}}",
            "model.timm_options: depth: numbers must be from -2,000 to 2,000",
        ),
        (
            "--model",
            "{name: timm/vit_tiny_patch16_224, timm_options: {depth: 1.0e+18}}",
            "model.timm_options: depth: numbers must be from -2,000 to 2,000",
        ),
        ("--model", "stages: [3]", "model.stages[0]: expected a mapping of keys to values, got 3"),
        ("--model", "stages: [antigravity.geohash]", "model.stages[0]: expected a mapping"),
        (
            "--model",
            "timm_options: {a: {class_path: antigravity.geohash}}",
            "model.timm_options.a: a file may set options of an architecture only",
        ),
        ("--schedule", f"batch_size: 0x{'f' * 5000}", "holds a number of more than 18 digits"),
        (
            "--schedule",
            "augment: {random_erasing_count: 1000000000}",
            "schedule.augment.random_erasing_count: expected an integer from 1 to 1,000, got 1000000000",
        ),
        (
            "--schedule",
            "augment: {pad: 1000000000}",
            "schedule.augment.pad: expected an integer from 0 to 4,096, got 1000000000",
        ),
        ("--schedule", "&a {augment: *a}", "holds more than 10,000 values, or circular references"),
        ("--schedule", f"epochs: {'[' * 40}{']' * 40}", "nested more than 30 levels deep"),
        ("--schedule", "x" * 1_000_001, "larger than 1,000,000 bytes"),
        ("--schedule", '"\\e[2J": 3', r"schedule.\x1b[2J: unknown key"),
    ],
)
def test_found_failures_are_fixed(option, content, line):
    """Each caused a traceback, an import, or an endless wait."""
    Path("strange.yaml").write_text(content)
    with bounded(), pytest.raises(UserError) as error:
        to_training([option, "strange.yaml"])
    assert line in str(error.value)
    assert str(error.value).isprintable()
