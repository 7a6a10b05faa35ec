"""Evaluates checkpoints: Top-1, Top-5, parameters, FLOPs, memory, images per second.

    python eval.py --checkpoint runs/digits                            the best model of a run, on its data
    python eval.py --checkpoint runs/a runs/b --data … --json out.json several, on other data
    python eval.py --checkpoint runs/a --sets imagenet/val imagenet-a imagenet-c    several data sets
    python eval.py --checkpoint model_best.pth --released-config config.yaml --data …   as published
    python eval.py --model configs/models/vil_tiny.yaml --complexity   no weights, no data

Alone or as one of the processes that torchrun starts. A run's checkpoint brings its model and its data; any
option on the line goes over them. With --sets, the folders or files named there take the place of the data;
of a data set that holds a part of the model's classes, the other logits are left out. How images are resized,
cropped and normalised belongs to the weights: options of the line go over what the checkpoint says of it, a
file of --data does not, which one line says. Every option of `EvalConfig` in vil/config.py can be given;
--help lists them.
"""

from __future__ import annotations

import os
import sys

# Threads that wait for one another sleep instead of spinning: they share their cores with the processes that
# load images. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data import ForeignImagesError, Validation, build_validation
from data.loaders import ValidationLoader
from vil import command_line, console
from vil.command_line import COMMAND_LINE, CommandLine, Line, file_origin
from vil.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Precision,
    in_section,
    of_option,
)
from vil.evaluation import report
from vil.evaluation.classes import find_rows
from vil.evaluation.corruptions import corrupted_sets, with_summaries
from vil.models.limits import sized_for
from vil.models.released import read_config, read_weights
from vil.models.weights import head_rows, load_file
from vil.models.zoo import check_device, model_from_config, pretrained_classes, pretrained_transform
from vil.randomness import seed_generators
from vil.runtime.files import refuse_input_as_output
from vil.schema import as_tree, timm_start_options
from vil.training import distributed
from vil.training.distributed import LostRankError, Process, from_main
from vil.training.precision import check_precision, set_deterministic
from vil.weight_files import NO_MODEL, TRANSFORM, WeightsFile, transform_of

_logger = logging.getLogger("vil.eval")  # a child of vil, whose records are shown

IMAGENET_CLASSES = 1000
"""Classes of a model where neither data nor checkpoint nor configuration says how many."""


@dataclass
class DataSet:
    """Images to evaluate on, and the rows of the head that their classes are; None for rows 0, 1, ..."""

    name: str | None
    loader: ValidationLoader | None
    num_classes: int | None
    rows: list[int] | None


@dataclass
class Subject:
    """A model with its weights, and the data sets to evaluate it on, unless its cost alone is asked for."""

    config: EvalConfig
    model: nn.Module
    sets: list[DataSet]
    path: str | None
    weights: str


def evaluate(argv: Sequence[str]) -> None:
    """Parse, load everything, so that unusable input is found first, then evaluate and report."""
    line = Line(EvalConfig, argv, prog="eval.py")
    command = line.resolve()
    config = command.config
    if not (line.print_config or config.checkpoint or config.released_config or command.sets("model")):
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
                named = (config.released_config, config.data.list_file, config.data.real_labels)
                sets = [name for name in config.sets or () if Path(name).is_file()]
                inputs = [*line.files(), *sets, *(config.checkpoint or ()), *filter(None, named)]
                refuse_input_as_output(Path(output), inputs, "json")
                from_main(lambda: report.check_writable(output))
            paths: Sequence[str | None] = config.checkpoint or [None]
            precision = check_precision(config.precision, process.device)
            set_deterministic(config.deterministic)
            subjects = [prepare(path, line, command, process) for path in paths]
            with command_line.reading_images():
                results = [
                    result for subject in subjects for result in evaluate_subject(subject, precision, process)
                ]
            results = with_summaries(results)
            if process.is_main:
                for row in report.table(results).splitlines():  # names of files and devices are a stranger's
                    console.say(row)
                if output:
                    report.write_json(output, results)
    except ConfigError as error:
        raise command.locate(error) from error


def evaluate_subject(subject: Subject, precision: Precision, process: Process) -> list[report.Result]:
    """One result per data set; what the model costs is measured once."""
    config = subject.config
    results: list[report.Result] = []
    model = subject.model.to(process.device)
    nothing = DataSet(None, None, None, None)
    for data_set in subject.sets or [nothing]:
        result = report.evaluate_model(
            model,
            data_set.loader,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            device=process.device,
            precision=precision,
            checkpoint=subject.path,
            model_name=config.model.name,
            weights=subject.weights,
            data=data_set.name,
            batch_size=config.batch_size,
            class_count=data_set.num_classes,
            class_rows=data_set.rows,
            progress=config.progress and process.is_main,
            cost=results[0] if results else None,
        )
        results.append(result)
        data_set.loader = None  # and with it the processes that loaded its images: ImageNet-C is 75 sets
    return results


def prepare(
    path: str | None, line: Line[EvalConfig], command: CommandLine[EvalConfig], process: Process
) -> Subject:
    """Return the model of a checkpoint, or an untrained one of the command line, and its validation images.

    With --print_config on the line, the configuration of this subject is printed instead, on its first data
    set.

    Args:
        path: the checkpoint; None for an untrained model.
        line: the command line.
        command: what it amounts to without a checkpoint.
        process: this process.
    """
    file: WeightsFile | None = None
    config = command.config
    model: ModelConfig | None = None
    data: Mapping[str, Any] = {}
    transform: Mapping[str, Any] = {}
    released = None
    if config.released_config is not None:
        with of_option("released_config"):
            released = read_config(config.released_config)
            model, transform = released.model, transform_of(released.data)
    if path is not None:
        with of_option("checkpoint"):
            file = read_weights(path, released, config.which, config.weights)
            if file.model is None and "model.name" not in command.origins:
                raise ConfigError(file.path, f"{NO_MODEL}: --released_config")
        model = file.model
        transform = {key: value for key, value in file.data.items() if key in TRANSFORM}
        data = {key: value for key, value in file.data.items() if key not in TRANSFORM}
    named = command.config.model
    loads_weights = file is None and bool(timm_start_options(named.timm_options))
    if named.name.startswith("timm/") and (loads_weights or (file is not None and file.model is None)):
        transform = pretrained_transform(named.name)  # weights of others need what they were trained with
    lines = lines_of_sets(config.sets, line)
    commands = [
        over_stored(model, data, transform, set_line, path or config.released_config) for set_line in lines
    ]
    config = commands[0].config
    lines[0].finish(commands[0])
    origins, stored_origin = commands[0].origins, file_origin(path or "")
    most = max(DataConfig.workers, os.cpu_count() or 1)
    if origins.get("data.workers") == stored_origin and config.data.workers > most:
        _logger.info("data.workers: %s, not %s as %s says", most, config.data.workers, path)
        for set_command in commands:
            set_command.config.data.workers = most
    if file is not None and not config.complexity and origins.get("data.source") == stored_origin:
        _logger.info("evaluating on %s, as %s says", describe(config.data), file.path)
    validations = [] if config.complexity else open_sets(commands, process)
    classes = validations[0].num_classes if validations else IMAGENET_CLASSES
    if file is not None and file.model is None:
        classes = head_rows(config.model.name, file.weights) or classes
    elif loads_weights:
        classes = pretrained_classes(config.model.name)
    seed_generators(0, "weights")  # an untrained model is the same on every rank
    with in_section("model"), nullcontext() if file is None else sized_for(file):
        network = model_from_config(config.model, classes)
        check_device(network, process.device)
    if file is not None:
        trained = file.class_names
    elif validations and config.model.num_classes is None and not loads_weights:
        trained = validations[0].class_names
    else:
        trained = None
    rows = config.model.num_classes or getattr(network, "num_classes", None)
    # The classes of an untrained model mean nothing yet.
    by_position = config.match_classes == "position" or (file is None and not loads_weights)
    sets = []
    for set_command, validation in zip(commands, validations):
        name = describe(set_command.config.data)
        try:
            found = find_rows(validation.class_names, trained, rows, by_position)
        except ConfigError as error:
            raise ConfigError(error.key, f"{name}: {error.reason}") from None
        sets.append(DataSet(name, validation.loader, validation.num_classes, found))
    if config.match_classes == "position" and file is not None:
        _logger.info("classes without a known name are matched by position: class k is row k of the head")
    if file is None:
        return Subject(config, network, sets, None, "timm" if loads_weights else "untrained")
    with of_option("checkpoint"):
        load_file(network, file, config.model.image_size)
    return Subject(config, network, sets, file.path, file.kind)


def lines_of_sets(sets: Sequence[str] | None, line: Line[EvalConfig]) -> list[Line[EvalConfig]]:
    """Return the line for each data set, as if it named this one alone.

    A YAML file goes over the one that --data names, and under the options that follow it.
    """
    if sets is None:
        return [line]
    found = []
    for name in sets:
        if name.endswith((".yaml", ".yml")):
            found.append(line.with_file("data", name))
            continue
        with of_option("sets"):
            folders = corrupted_sets(name)
        for folder in folders:
            # The set is its own training split, or a class named train would be taken for one.
            splits = {"data.train_split": ".", "data.val_split": "."}
            found.append(line.with_values({"data.source": "folder", "data.root": str(folder), **splits}))
    if not found:
        raise ConfigError("sets", "expected at least one folder or YAML file")
    return found


def open_sets(commands: Sequence[CommandLine[EvalConfig]], process: Process) -> list[Validation]:
    """Open the images of every data set. Of several, ReaL labels are for those that are ImageNet's own."""
    found: list[Validation] = []
    foreign: list[ForeignImagesError] = []
    for command in commands:
        config = command.config

        def build(data: DataConfig, config: EvalConfig = config) -> Validation:
            return build_validation(
                data,
                image_size=config.model.image_size,
                in_chans=config.model.in_chans,
                batch_size=config.batch_size,
                rank=process.rank,
                world_size=process.world_size,
                device=process.device,
            )

        try:
            found.append(build(config.data))
        except ForeignImagesError as error:
            foreign.append(error)
            if len(foreign) == len(commands):
                raise
            found.append(build(dataclasses.replace(config.data, real_labels=None)))
    return found


def over_stored(
    model: ModelConfig | None,
    data: Mapping[str, Any],
    transform: Mapping[str, Any],
    line: Line[EvalConfig],
    path: str | None,
) -> CommandLine[EvalConfig]:
    """Resolve the line over a stored model, of which a line that names a model keeps the classes alone.

    Args:
        model: the stored model.
        data: a stored data section, which lies under everything.
        transform: what belongs to the weights: it lies under the options of the line, but over a file of
            --data, which describes the images.
        line: the command line.
        path: the file of the stored values.
    """
    command = line.resolve()
    stored: dict[str, Any] = {"data": {**data, **transform}, "model": {}}
    if model is not None:
        stored["model"] = (
            {"num_classes": model.num_classes} if "model.name" in command.origins else as_tree(model)
        )
    given = as_tree(command.config.data)
    for key, value in transform.items():
        source = command.origins.get(f"data.{key}", COMMAND_LINE)
        if source == COMMAND_LINE:
            continue
        if (list(value) if isinstance(value, tuple) else value) != given[key]:
            _logger.info("data.%s: %s, as the weights need it, not of %s", key, value, source)
        line = line.with_values({f"data.{key}": value}, file_origin(str(path)))
    return line.resolve(base_values=stored, base_origin=str(path))


def describe(data: DataConfig) -> str:
    """A data set in one word: digits, torch/cifar10, the folder, or zip: and the folder of its files."""
    if data.source == "folder":
        return os.path.normpath(f"{data.root}/{data.val_split}")
    if data.source in ("zip", "ffcv", "tar", "wds"):
        return f"{data.source}:{os.path.normpath(f'{data.root}/{data.val_split}')}"
    return data.source


def main(words: Sequence[str]) -> None:
    """`evaluate`; exit status 1 and one line where another rank is gone."""
    try:
        evaluate(words)
    except LostRankError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            console.say(f"error: {error}", sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    command_line.main(main)
