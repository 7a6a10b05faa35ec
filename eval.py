"""Evaluates checkpoints: Top-1, Top-5, parameters, FLOPs, memory, images per second.

    python eval.py --checkpoint runs/digits                            the best model of a run, on its data
    python eval.py --checkpoint runs/a runs/b --data … --json out.json several, on other data
    python eval.py --checkpoint model_best.pth --released-config config.yaml --data …   as published
    python eval.py --model configs/models/vil_tiny.yaml --complexity   no weights, no data

Alone or as one of the processes that torchrun starts. A run's checkpoint brings its model and its data; any
option on the line goes over them. A published or a converted checkpoint brings its model and how images are
brought to it, over which the words of the line go, but no file of --data. Every option of `EvalConfig` in
vil/config.py can be given; --help lists them.
"""

from __future__ import annotations

import os

# Threads that wait for one another sleep instead of spinning: they share their cores with the processes that
# load images. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from data import build_validation
from data.loaders import ValidationLoader
from vil import command_line
from vil.command_line import COMMAND_LINE, CommandLine
from vil.config import ConfigError, DataConfig, EvalConfig, ModelConfig, in_section, of_option
from vil.evaluation import report
from vil.models.released import read_config, read_weights
from vil.models.weights import load_file
from vil.models.zoo import check_device, model_from_config
from vil.training import distributed
from vil.training.distributed import Process, from_main
from vil.training.precision import check_precision
from vil.training.trainer import seed_generators
from vil.weight_files import NO_MODEL, WeightsFile, transform_of

_logger = logging.getLogger("vil.eval")  # a child of vil, whose records are shown

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
    words, printing = command_line.without_print_config(words)
    command = command_line.parse(EvalConfig, words, prog="eval.py")
    config = command.config
    if not (printing or config.checkpoint or config.released_config or command.sets("model")):
        raise ConfigError(
            "checkpoint", "nothing to evaluate: give --checkpoint RUN, --model FILE or --model.name"
        )
    for key in ("weights", "which"):
        if key in command.origins and not config.checkpoint:
            raise command.locate(ConfigError(key, "goes with --checkpoint, whose weights it chooses"))
    for key in ("model.init_from", "model.init_released_config"):
        if key in command.origins and getattr(config.model, key.removeprefix("model.")):
            raise command.locate(ConfigError(key, "is for training; evaluate weights with --checkpoint"))
    try:
        with distributed.start(config.device) as process:
            if output := config.json:
                from_main(lambda: report.check_writable(output))
            paths: Sequence[str | None] = config.checkpoint or [None]
            precision = check_precision(config.precision, process.device)
            subjects = [prepare(path, [*words, *printing], command, process) for path in paths]
            with command_line.reading_images():
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
                if output:
                    report.write_json(output, results)
    except ConfigError as error:
        raise command.locate(error) from error


def prepare(
    path: str | None, words: Sequence[str], command: CommandLine[EvalConfig], process: Process
) -> Subject:
    """The model of a checkpoint, or an untrained one of the command line, and its validation images.

    With --print_config among the words, the configuration of this subject is printed instead.
    """
    file: WeightsFile | None = None
    config = command.config
    released = None
    if config.released_config is not None:
        with of_option("released_config"):
            released = read_config(config.released_config)
    if path is not None:
        with of_option("checkpoint"):
            file = read_weights(path, released, config.which, config.weights)
            if file.model is None and "model.name" not in command.origins:
                raise ConfigError(file.path, f"{NO_MODEL}: --released_config")
        if file.origin == "run":
            command = over_stored(file.model, file.data, {}, words, command)
        else:
            command = over_stored(file.model, {}, file.data, words, command)
    elif released is not None:
        command = over_stored(released.model, {}, transform_of(released.data), words, command)
    else:
        command = over_stored(None, {}, {}, words, command)
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
        if file is not None and file.class_names is not None:
            check_classes(validation.class_names, file.class_names)
    seed_generators(0, "weights")  # an untrained model is the same on every rank
    with in_section("model"):
        model = model_from_config(config.model, classes or IMAGENET_CLASSES)
        check_device(model, process.device)
    if file is None:
        return Subject(config, model, loader, classes, None, "untrained")
    with of_option("checkpoint"):
        load_file(model, file, config.model.image_size)
    return Subject(config, model, loader, classes, file.path, file.kind)


def over_stored(
    model: ModelConfig | None,
    data: Mapping[str, Any],
    transform: Mapping[str, Any],
    words: Sequence[str],
    command: CommandLine[EvalConfig],
) -> CommandLine[EvalConfig]:
    """The command line over a stored model, of which a line that names a model keeps the classes alone.

    `data` lies under everything. `transform` belongs to the weights: it lies under the words of the line, but
    over a file of --data, which tells of the images.
    """
    stored: dict[str, Any] = {"data": {**data, **transform}, "model": {}}
    if model is not None:
        named = "model.name" in command.origins
        stored["model"] = {"num_classes": model.num_classes} if named else dataclasses.asdict(model)
    for key, value in transform.items():
        source = command.origins.get(f"data.{key}", COMMAND_LINE)
        if source != COMMAND_LINE:
            _logger.info("data.%s: %s, of the checkpoint, not of %s", key, value, source)
            words = [*words, f"--data.{key}={json.dumps(value)}"]
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
