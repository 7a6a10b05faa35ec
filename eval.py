"""Evaluate checkpoints: Top-1, Top-5, parameters, FLOPs, memory, images per second.

    python eval.py --checkpoint runs/digits                            the best model of a run, on its data
    python eval.py --checkpoint runs/a runs/b --data … --json out.json several models, on other data
    python eval.py --checkpoint runs/a --per_class_csv classes.csv     precision, recall and F1 of each class
    python eval.py --checkpoint runs/a --datasets imagenet/val imagenet-a imagenet-c    several data sets
    python eval.py --checkpoint model_best.pth --released-config config.yaml --data …   as published
    python eval.py --model configs/models/vil_tiny.yaml --complexity   without weights and data

Runs alone or under torchrun. A checkpoint of train.py provides its model and its data, which options of the
command line override. --datasets replaces the data by other folders or files; on a data set with a subset of
the model's classes, the logits of all other classes are ignored. The transform (resizing, crop,
normalization) is stored with the weights: options of the command line override it, a file of --data does
not, which is logged. --help lists all options (`EvalConfig` in vil/config.py).
"""

from __future__ import annotations

import sys

from vil.command_line import ParsedArguments, ResolvedConfig, resolve_eval_command, run_program
from vil.runtime.launch import set_ranks, set_torch_environment

set_torch_environment()
if __name__ == "__main__":  # before the slow import of PyTorch, for a fast --help
    run_program(set_ranks)
    ARGUMENTS = run_program(resolve_eval_command, sys.argv[1:])

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

import vil
from data import (
    NotImageNetError,
    Validation,
    build_validation,
    check_same_images,
    check_same_real_labels,
    class_folder_options,
    dataset_name,
    refuse_images_as_outputs,
)
from vil.command_line import errors_of_one_rank, file_origin
from vil.command_line.stored_model import StoredModel, read_stored, resolve_over_stored
from vil.config import EvalConfig
from vil.errors import COMMAND_LINE, UserError, errors_in_option, errors_in_section
from vil.evaluation import report
from vil.evaluation.accuracy import EvaluationDataset
from vil.evaluation.corruptions import add_corruption_summaries, list_datasets
from vil.evaluation.report import evaluate_model
from vil.models.timm_models import check_logits
from vil.runtime import consistency, console, distributed
from vil.runtime.class_names import match_classes
from vil.runtime.consistency import RankOptions
from vil.runtime.distributed import Process, call_on_all, call_on_main
from vil.runtime.files import check_outputs, check_writable
from vil.runtime.precision import choose_precision, set_deterministic
from vil.validation import as_tree, flatten

_logger = logging.getLogger("vil.eval")

OUTPUTS = {
    "json": report.write_json,
    "csv": report.write_csv,
    "per_class_csv": report.write_per_class_csv,
    "confusion_csv": report.write_confusion_csv,
}
"""Options that name an output file, and what writes it."""
CLASS_OUTPUTS = ("per_class_csv", "confusion_csv")
"""Those that need images."""
NO_IMAGES = "requires images; complexity evaluates none"
IMAGENET_CLASSES = 1000
"""Classes of a model if neither data nor weights nor configuration determine them."""


def evaluate(args: ParsedArguments[EvalConfig], command: ResolvedConfig[EvalConfig]) -> None:
    """Open all models and data sets, evaluate, print the table and write the output files.

    Everything is opened before the first evaluation, which finds unusable input early.

    Raises:
        UserError: a file or a combination of options cannot be used.
        LostRankError: another rank ended.
        SystemExit: after --print_config.
    """
    config = command.config
    try:
        with distributed.start(config.device, start_timeout=config.start_timeout) as process:
            for line in consistency.check_software(vil.__version__):
                _logger.warning("%s", line)
            options = flatten(as_tree(config))
            consistency.check_options(RankOptions(options, {}, is_stored=False))
            check_output_files(command)
            check_single_result(args, config)
            choose_precision(config.precision, process.device)
            set_deterministic(config.deterministic)
            paths: Sequence[str | None] = config.checkpoint or [None]
            evaluations = [open_evaluation(path, args, command, process) for path in paths]
            with errors_of_one_rank():
                results = [result for evaluation in evaluations for result in evaluation()]
            if process.is_main:
                report_results(add_corruption_summaries(results), config)
    except UserError as error:
        raise command.locate(error) from error


def check_output_files(command: ResolvedConfig[EvalConfig]) -> None:
    """Raise UserError if an output file cannot be written, or is an input or another output.

    Options that need images are refused with `complexity`.
    """
    outputs = output_files(command.config)
    for option in CLASS_OUTPUTS:
        if command.config.complexity and outputs[option] is not None:
            raise UserError(option, NO_IMAGES)
    call_on_main(partial(check_outputs, outputs, command.inputs()))
    for option in ("datasets", "match_classes", "data.real_labels", "tta", "tta_scales"):
        if command.config.complexity and command.origins.get(option) == COMMAND_LINE:
            raise UserError(option, NO_IMAGES)
    for option, output in outputs.items():
        if output is not None:
            call_on_main(partial(check_writable, Path(output), option))


def output_files(config: EvalConfig) -> dict[str, str | None]:
    """Return the output file of each option in `OUTPUTS`; None for one that is not requested."""
    return {option: getattr(config, option) for option in OUTPUTS}


def check_single_result(args: ParsedArguments[EvalConfig], config: EvalConfig) -> None:
    """Raise UserError if a confusion matrix is to be written and the command has several results."""
    if not config.confusion_csv:
        return
    count = len(config.checkpoint or [None]) * len(split_datasets(args, config.datasets))
    if count > 1:
        raise UserError(
            "confusion_csv", f"requires a single checkpoint and data set, got {count} combinations"
        )


def open_evaluation(
    path: str | None, args: ParsedArguments[EvalConfig], command: ResolvedConfig[EvalConfig], process: Process
) -> Callable[[], list[report.Result]]:
    """Open a checkpoint, or build an untrained model, and open the data sets; return their evaluation.

    With --print_config, print the configuration on the first data set instead. The checkpoint is None for
    weights of timm and untrained ones; `command` lacks the configuration of the checkpoint.
    """
    stored = read_stored(path, command)
    args_per_dataset = split_datasets(args, command.config.datasets)
    commands = [resolve_over_stored(dataset_args, stored) for dataset_args in args_per_dataset]
    args_per_dataset[0].finish(commands[0])
    config = commands[0].config
    outputs, roots = output_files(config), [command.config.data.root for command in commands]
    stored_inputs = [path for command in commands for path in command.inputs()]
    call_on_main(partial(check_outputs, outputs, stored_inputs))
    call_on_main(partial(refuse_images_as_outputs, outputs, roots))
    is_stored = path is not None and commands[0].origins.get("data.source") == file_origin(path)
    if is_stored and not config.complexity:
        _logger.info("evaluating on %s, the data of %s", dataset_name(config.data), path)
    validations = [] if config.complexity else call_on_all(lambda: open_datasets(commands, process))
    compare_images(validations, config, process)
    num_classes = len(validations[0].class_names) if validations else IMAGENET_CLASSES
    model = stored.build_model(config.model, num_classes, process.device)
    datasets = match_datasets(stored, config, validations, model)
    source = None
    if stored.weights is not None:
        source = stored.weights.path
        with errors_in_option("checkpoint"):
            stored.weights.load_into(model, config.model.size)
    if validations:
        with errors_in_section("model"):
            check_logits(model.to(process.device), config.model)
    consistency.check_weights("checkpoint" if source else "model", model)
    return partial(evaluate_model, model, datasets, config, process, checkpoint=source, weights=stored.kind)


def split_datasets(
    args: ParsedArguments[EvalConfig], datasets: Sequence[str] | None
) -> list[ParsedArguments[EvalConfig]]:
    """Return the arguments for each data set of --datasets.

    A YAML file overrides the one of --data, and is overridden by the options that follow it.
    """
    if datasets is None:
        return [args]
    args_per_dataset = []
    for name in datasets:
        if name.endswith((".yaml", ".yml")):
            args_per_dataset.append(args.with_file("data", name))
            continue
        with errors_in_option("datasets"):
            folders = list_datasets(name)
        args_per_dataset += [args.with_values(class_folder_options(folder)) for folder in folders]
    if not args_per_dataset:
        raise UserError("datasets", "expected at least one folder or YAML file")
    return args_per_dataset


def open_datasets(commands: Sequence[ResolvedConfig[EvalConfig]], process: Process) -> list[Validation]:
    """Open the images of every data set.

    Of several data sets, only those with ImageNet's validation images use `data.real_labels`.
    """
    validations, num_foreign = [], 0
    for command in commands:
        config = command.config
        try:
            validations.append(build_validation(config, process))
        except NotImageNetError:
            num_foreign += 1
            if num_foreign == len(commands):
                raise
            config = replace(config, data=replace(config.data, real_labels=None))
            validations.append(build_validation(config, process))
    return validations


def compare_images(validations: Sequence[Validation], config: EvalConfig, process: Process) -> None:
    """Raise UserError on every rank if a rank has read other images or ReaL labels than rank 0."""
    for number, validation in enumerate(validations, start=1):
        sources = {f"images in data set {number}": validation.source}
        check_same_images("data.root", sources, config.data.root, process)
    if validations:
        check_same_real_labels(config.data.real_labels, process)


def match_datasets(
    stored: StoredModel, config: EvalConfig, validations: Sequence[Validation], model: nn.Module
) -> list[EvaluationDataset]:
    """Return the data sets with the logits of their classes."""
    trained_names = stored.weights.class_names if stored.weights is not None else None
    if stored.kind == "untrained" and validations and config.model.num_classes is None:
        trained_names = validations[0].class_names
    num_logits = getattr(model, "num_classes", config.model.num_classes)
    by_position = config.match_classes == "position" or stored.kind == "untrained"
    datasets = []
    for validation in validations:
        try:
            indices = match_classes(validation.class_names, trained_names, num_logits, by_position)
        except UserError as error:
            raise UserError(error.location, f"{validation.name}: {error.reason}") from None
        datasets.append(
            EvaluationDataset(validation.name, validation.loader, validation.class_names, indices)
        )
    if config.match_classes == "position" and stored.weights is not None:
        _logger.info("classes with unknown names are matched by position: class k is row k of the head")
    return datasets


def report_results(results: Sequence[report.Result], config: EvalConfig) -> None:
    """Print the table, and write the output files."""
    for row in report.table(results, console.width()).splitlines():
        console.print_line(row)
    for option, write in OUTPUTS.items():
        if path := getattr(config, option):
            write(path, results)


def main(argv: Sequence[str]) -> None:
    """Resolve the arguments of a command line, and evaluate."""
    evaluate(*resolve_eval_command(argv))


if __name__ == "__main__":
    run_program(evaluate, *ARGUMENTS)
