"""Evaluates checkpoints: Top-1, Top-5, parameters, FLOPs, memory, images per second.

    python eval.py --checkpoint runs/digits                            the best model of a run, on its data
    python eval.py --checkpoint runs/a runs/b --data … --json out.json several, on other data
    python eval.py --model configs/models/vil_tiny.yaml --complexity   no weights, no data

Alone or as one of the processes that torchrun starts. A checkpoint brings its model and its data; any option
on the line goes over them. Every option of `EvalConfig` in vil/config.py can be given; --help lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from data import build_validation
from data.loaders import ValidationLoader
from vil import command_line
from vil.command_line import CommandLine
from vil.config import ConfigError, DataConfig, EvalConfig, in_section
from vil.evaluation import report
from vil.evaluation.weights import choose_weights, find_checkpoint, load_weights
from vil.models.zoo import model_from_config
from vil.training import checkpoint, distributed
from vil.training.distributed import Process, from_main
from vil.training.precision import check_precision
from vil.training.trainer import seed_generators

IMAGENET_CLASSES = 1000
"""Classes of a model where neither data nor checkpoint nor configuration says how many."""


@dataclass
class Subject:
    """A model with its weights, and the images to evaluate it on, unless its cost alone is asked for."""

    config: EvalConfig
    model: nn.Module
    loader: ValidationLoader | None
    classes: int | None
    path: str | None
    weights: str


def evaluate(words: Sequence[str]) -> None:
    """Parses, loads everything, so that what cannot be used is found first, then evaluates and reports."""
    command = command_line.parse(EvalConfig, words, prog="eval.py")
    config = command.config
    if not config.checkpoint and not command.sets("model"):
        raise ConfigError(
            "checkpoint", "nothing to evaluate: give --checkpoint RUN, --model FILE or --model.name"
        )
    try:
        with distributed.start(config.device) as process:
            if json := config.json:
                from_main(lambda: report.check_writable(json))
            paths: Sequence[str | None] = config.checkpoint or [None]
            precision = check_precision(config.precision, process.device)
            subjects = [prepare(path, words, command, process) for path in paths]
            results = [
                report.evaluate_model(
                    subject.model.to(process.device),
                    subject.loader,
                    image_size=subject.config.model.image_size,
                    in_chans=subject.config.model.in_chans,
                    device=process.device,
                    precision=precision,
                    checkpoint=subject.path,
                    model_name=subject.config.model.name,
                    weights=subject.weights,
                    data=None if config.complexity else describe(subject.config.data),
                    batch_size=config.batch_size,
                    class_count=subject.classes,
                    progress=config.progress and process.is_main,
                )
                for subject in subjects
            ]
            if process.is_main:
                print(report.table(results))
                if json:
                    report.write_json(json, results)
    except ConfigError as error:
        raise command.locate(error) from error


def prepare(
    path: str | None, words: Sequence[str], command: CommandLine[EvalConfig], process: Process
) -> Subject:
    """The model of a checkpoint, or an untrained one of the command line, and its validation images."""
    state: dict[str, Any] | None = None
    if path is not None:
        path = str(find_checkpoint(path, command.config.which))
        state = checkpoint.load(path)
        command = over_run(state, words, command)
    config = command.config
    loader, classes = None, None
    if not config.complexity:
        validation = build_validation(
            config.data,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            batch_size=config.batch_size,
            rank=process.rank,
            world_size=process.world_size,
            device=process.device,
        )
        loader, classes = validation.loader, validation.num_classes
        if state is not None:
            check_classes(validation.class_names, tuple(state["class_names"]))
    seed_generators(0, "weights")  # an untrained model is the same on every rank
    with in_section("model"):
        model = model_from_config(config.model, classes or IMAGENET_CLASSES)
    weights = "untrained"
    if state is not None:
        values, weights = choose_weights(state, config.weights)
        load_weights(model, values, path or "")
    return Subject(config, model, loader, classes, path, weights)


def over_run(
    state: dict[str, Any], words: Sequence[str], command: CommandLine[EvalConfig]
) -> CommandLine[EvalConfig]:
    """The command line over a run's model and data; over its data alone where the line names a model."""
    stored = {"model": state["config"]["model"], "data": state["config"]["data"]}
    if "model.name" in command.origins:
        stored["model"] = {"num_classes": stored["model"]["num_classes"]}
    return command_line.parse(EvalConfig, words, base_values=stored, prog="eval.py")


def check_classes(names: tuple[str, ...], trained: tuple[str, ...]) -> None:
    """Raises ConfigError where the labels of the data cannot mean what the model has learned."""
    if len(names) != len(trained):
        reason = f"the data has {len(names)} classes, the checkpoint was trained on {len(trained)}"
        raise ConfigError("data.source", reason)
    if names != trained and set(names) == set(trained):
        place = next(i for i, pair in enumerate(zip(names, trained)) if pair[0] != pair[1])
        reason = f"class {place} is {names[place]!r} in the data, {trained[place]!r} in the checkpoint"
        raise ConfigError("data.source", f"the classes have another order: {reason}")


def describe(data: DataConfig) -> str:
    """A data set in one word: digits, torch/cifar10, or the folder."""
    return f"{data.root}/{data.val_split}" if data.source == "folder" else data.source


if __name__ == "__main__":
    command_line.main(evaluate)
