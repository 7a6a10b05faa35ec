"""The command line of train.py, whose defaults are the demo's files or a stored configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vil.command_line.arguments import CONFIGS
from vil.command_line.resolution import ParsedArguments, ResolvedConfig
from vil.config import DataConfig, ModelConfig, TrainConfig, Tree
from vil.errors import UserError, errors_in_option
from vil.runtime.run_files import CONFIG
from vil.runtime.yaml_files import read_yaml
from vil.validation import as_tree, without_start_options, without_timm_start_options

DEMO_FILES = {
    "model": CONFIGS / "models" / "vil_32.yaml",
    "schedule": CONFIGS / "schedules" / "digits.yaml",
    "data": CONFIGS / "data" / "digits.yaml",
}
"""The file of a section for the bundled digits, unless the command line names one."""
OTHER_FILES = {
    "model": CONFIGS / "models" / "vil_tiny.yaml",
    "schedule": CONFIGS / "schedules" / "small_data.yaml",
}
"""The file of a section for other images, unless the command line names one."""
FINETUNE_SCHEDULE = CONFIGS / "schedules" / "finetune.yaml"
"""The schedule for other images with `model.init_from`, unless the command line names one."""


def resolve_train_command(argv: Sequence[str]) -> ResolvedConfig[TrainConfig]:
    """Return the configuration of a training run; `output` is always set.

    If the output folder contains a run and the command line names no model, schedule or data file: the
    configuration of that run. If `model.init_from` is set and no model: the model of these weights. Otherwise
    the files of `default_files`. After --help or --print_config, SystemExit is raised.
    """
    args = ParsedArguments(TrainConfig, argv, prog="train.py")
    files = default_files(args.resolve())
    command = args.resolve(files)
    output = command.config.output or default_output(command.config.data)
    stored = Path(output, CONFIG)
    try:
        if os.path.exists(stored) and not args.assigns("", "model", "schedule", "data"):
            command = args.resolve(base_values=stored_config(stored), base_origin=str(stored))
        elif command.config.model.init_from or command.config.model.init_released_config:
            files.pop("model", None)
            command = args.resolve(files)
            if not command.sets("model.name") and not command.sets("model.stages"):
                is_continued, start = os.path.exists(stored), command.config.model
                model = stored_config(stored)["model"] if is_continued else initial_model(start)
                command = args.resolve(files, {"model": model})
    except UserError as error:
        raise command.locate(error) from error
    args.finish(command)
    command.config.output = output
    return command


def default_files(command: ResolvedConfig[TrainConfig]) -> dict[str, Path]:
    """Return the file of each section: the demo's, or for other images those of `OTHER_FILES`."""
    is_demo = command.config.data.source == DataConfig.source
    files = dict(DEMO_FILES if is_demo else OTHER_FILES)
    if command.config.model.init_from and not is_demo:
        files["schedule"] = FINETUNE_SCHEDULE
    if command.sets("model.name"):
        del files["model"]
    return files


def stored_config(path: Path) -> Tree:
    """Return the content of a run's config.yaml."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict):
        raise UserError(str(path), "expected a mapping of keys to values")
    # Runs of version 0.1.0 stored all of timm's options.
    return {**content, "model": without_timm_start_options(content.get("model", {}))}


def initial_model(model: ModelConfig) -> Tree:
    """Return the model section of the weights in `init_from`; the number of classes is set from the data."""
    from vil.checkpoints.initialization import initial_weights

    weights = initial_weights(model)
    with errors_in_option("model.init_from"):
        stored = weights.require_model("model.init_released_config")
    return without_start_options({**as_tree(stored), "num_classes": None})


def default_output(data: DataConfig) -> str:
    """Return runs/digits, runs/cifar10 for torch/cifar10, runs/imagenet for a folder …/imagenet."""
    name = data.root if data.source == "folder" and data.root else data.source
    # Not resolve(), which would name the run after the target of a link.
    return os.path.join("runs", os.path.basename(os.path.abspath(name)) or "data")
