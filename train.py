"""Train a model on one process, or on the processes that torchrun starts.

    python train.py                                                    a small ViL on the bundled digits
    python train.py --model … --schedule … --data … --output runs/x    one YAML file per section
    python train.py --output runs/x                                    continue the run in that folder
    python train.py --model.init_from runs/x --model.image_size 384 …  fine-tune the model of that run

Every option of vil/config.py can be given as --section.name value; --help lists them.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # SIGUSR1 requests a checkpoint; by default it kills a process that is not training yet, or no longer.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

from vil.command_line import (
    ResolvedConfig,
    errors_of_one_rank,
    file_origin,
    resolve_train_command,
    run_program,
)
from vil.runtime.launch import set_ranks, set_torch_environment

set_torch_environment()
if __name__ == "__main__":  # before the slow import of PyTorch, for a fast --help
    run_program(set_ranks)
    COMMAND = run_program(resolve_train_command, sys.argv[1:])

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import vil
from data import (
    Loaders,
    Mixing,
    build_loaders,
    check_same_images,
    check_same_real_labels,
    dataset_name,
    open_eval_sets,
)
from data.order import ORDER_VERSION
from vil.checkpoints import checkpoint_files, run_folder
from vil.checkpoints.adaptation import load_state_dict
from vil.checkpoints.initialization import build_random_model, initialize_model
from vil.checkpoints.training_state import State, read_training_state, select_weights
from vil.config import EvalConfig, Size, TrainConfig, as_size, format_size
from vil.errors import COMMAND_LINE, UserError, errors_in_option, one_line
from vil.evaluation.accuracy import EvaluationDataset
from vil.evaluation.report import evaluate_model, write_json
from vil.models.attention_image import attention_sheet
from vil.models.multiscale_vit import MultiScaleViT
from vil.runtime import consistency, console, distributed
from vil.runtime.consistency import RankOptions
from vil.runtime.distributed import Process, call_on_all, call_on_main
from vil.runtime.epoch_steps import count_epoch_steps, training_phases
from vil.runtime.modes import mode
from vil.runtime.precision import choose_precision, set_deterministic
from vil.runtime.run_files import CONFIG
from vil.training.distillation import build_teacher, describe_teacher
from vil.training.experiment_trackers import check_loggers
from vil.training.trainer import Monitoring, Summary, fit
from vil.validation import STORED, as_tree, flatten, without_timm_start_options


def train(command: ResolvedConfig[TrainConfig]) -> None:
    """Build the run, train, and report the best model; return at once if the run is finished.

    Raises:
        UserError: an option, a file or the data cannot be used.
        TrainingError, LostRankError, InterruptedRun: as `vil.training.trainer.fit`.
    """
    try:
        given = command.config
        timeout = max(1800.0, 3 * given.hang_timeout)  # every rank's watchdog has reported by then
        with distributed.start(given.device, timeout, given.start_timeout) as process:
            for line in consistency.check_software(vil.__version__):
                print_on_main(process, line)
            config = synchronize_config(command)
            call_on_main(lambda: check_output(command))
            call_on_main(lambda: check_loggers(config.loggers))  # only rank 0 writes logs
            config.precision = choose_precision(config.precision, process.device)
            set_deterministic(config.deterministic)
            with run_folder.lock_run_folder(Path(config.output or "")):
                run(config, process, command)
    except UserError as error:
        raise command.locate(error) from error


def synchronize_config(command: ResolvedConfig[TrainConfig]) -> TrainConfig:
    """Return rank 0's configuration, with `MACHINE_OPTIONS` of this rank.

    Rank 0's folder is used: other machines may not see it, or have another run under this name. If it
    contains a run to continue, only the command line sets options of this rank.

    Raises:
        InconsistentRanksError: the command lines or their files differ in other options.
    """
    config = command.config
    options = flatten(as_tree(config))
    for key in [key for key, origin in command.origins.items() if origin == file_origin(STORED)]:
        options.pop(key, None)  # the model of initial weights: a continued run has the stored one on rank 0
    is_stored = file_origin(str(Path(config.output or "", CONFIG))) in command.origins.values()
    assigned = {key: options[key] for key in command.assigned if key in options}
    if "output" not in assigned:
        del options["output"]  # by data.root
    consistency.check_options(RankOptions(options, assigned, is_stored))
    agreed, is_continued = call_on_main(lambda: (config, is_stored))
    kept = {key for key in consistency.MACHINE_OPTIONS if key in assigned or not (is_stored or is_continued)}
    if "device" in kept:
        agreed.device = config.device
    for name in ("root", "workers", "index"):
        if f"data.{name}" in kept:
            setattr(agreed.data, name, getattr(config.data, name))
    return agreed


def run(config: TrainConfig, process: Process, command: ResolvedConfig[TrainConfig]) -> None:
    """Run the remaining epochs of the run in the folder `config.output`, and report the best model.

    Args:
        config: the configuration of rank 0.
        process: this process.
        command: the command line, for the origins of the options.
    """
    folder = Path(config.output or "")
    state = call_on_main(lambda: run_folder.open_run(folder, config))
    if state is not None:
        # The weights are in the checkpoint: initial weights are not opened again.
        config.model.timm_options = without_timm_start_options(as_tree(config.model))["timm_options"]
        top1 = call_on_main(lambda: run_folder.finished_top1(folder, state, config))
        if top1 is not None:
            message = f"{folder} is finished: Top-1 {top1:.2f} %; name another --output to train again"
            print_on_main(process, message)
            return
        announce(process, state, config)
    order_version = ORDER_VERSION if state is None else state.get("order_version", 1)
    loaders, model, mix = build(config, process, state is None, order_version)
    teacher = build_teacher(config, loaders.class_names, process)
    opened = call_on_all(lambda: open_eval_sets(config, loaders.class_names, process))
    for found, _ in opened:
        check_same_images("eval_sets", {f"images of {found.name}": found.source}, None, process)
    eval_sets = [
        EvaluationDataset(found.name, found.loader, found.class_names, indices) for found, indices in opened
    ]
    for line in describe_run(config, loaders, model, process, command):
        print_on_main(process, line)
    if teacher is not None:
        print_on_main(process, describe_teacher(teacher, config.schedule))
    with errors_of_one_rank():
        monitoring = Monitoring(attention_drawer(model, loaders, config), eval_sets)
        summary = fit(
            model, loaders, config, process, mix=mix, state=state, teacher=teacher, monitoring=monitoring
        )
        report(model, loaders, summary, config, process)


def check_output(command: ResolvedConfig[TrainConfig]) -> None:
    """Raise UserError if the command line names an output folder and nothing else, and it contains no run.

    Such a folder is probably misspelled. A folder that cannot be read is reported when it is opened.
    """
    config = command.config
    has_training = any(key.partition(".")[0] in ("", "model", "schedule", "data") for key in command.assigned)
    if "output" not in command.assigned or has_training or config.resume == "never":
        return
    try:
        is_run = run_folder.contains_run(Path(config.output or ""))
    except UserError:
        return
    if not is_run:
        hint = "to start one there, name what to train, for example with --data configs/data/digits.yaml"
        raise UserError("output", f"{config.output} contains no run to continue; {hint}", COMMAND_LINE)


def build(
    config: TrainConfig, process: Process, is_new: bool, order_version: int = ORDER_VERSION
) -> tuple[Loaders, torch.nn.Module, Mixing]:
    """Return the images, the model and mixup/cutmix; set `model.num_classes` from the data.

    A new run loads its initial weights, if the configuration has any; a run that continues keeps the order of
    its training images.
    """
    schedule = config.schedule
    loaders = call_on_all(lambda: build_loaders(config, process, is_new, order_version))
    sources = {"training images": loaders.train_source, "validation images": loaders.validation_source}
    root = config.data.root
    check_same_images("data.source" if root is None else "data.root", sources, root, process)
    check_same_real_labels(config.data.real_labels, process)
    model = build_random_model(config.model, loaders.class_names, config.seed, process.device)
    sizes = {
        "schedule.progressive_resizing": [size for _, size, *_ in schedule.progressive_resizing or []],
        "schedule.random_sizes": schedule.random_sizes or [],
    }
    for option, option_sizes in sizes.items():
        check_sizes(model, option, option_sizes, config.model.in_chans, process.device)
    if is_new:
        for line in initialize_model(model, config.model, loaders.class_names):
            print_on_main(process, line)
    assert config.model.num_classes is not None
    mix = Mixing(schedule.augment, config.model.num_classes, schedule.label_smoothing, config.seed)
    return loaders, model, mix


def describe_run(
    config: TrainConfig,
    loaders: Loaders,
    model: torch.nn.Module,
    process: Process,
    command: ResolvedConfig[TrainConfig],
) -> list[str]:
    """Return lines with the data, the model and the recipe of a run, and the origin of each."""
    schedule = config.schedule
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    phases = training_phases(schedule, config.model.size)
    steps = count_epoch_steps(phases, loaders.train.steps_per_epoch, loaders.train_images)
    batches = [f"{steps.steps(phase.first_epoch)} × {phase.batch_size}" for phase in phases]
    epochs = "1 epoch" if schedule.total_epochs == 1 else f"{schedule.total_epochs} epochs"
    length = f"{epochs} of {', then '.join(dict.fromkeys(batches))} images"
    if schedule.max_steps is not None:
        length += f", at most {schedule.max_steps} steps"
    devices = f"{process.world_size} × {process.device.type}, {config.precision}"
    lines = [
        f"data: {len(loaders.class_names)} classes, {loaders.train_images:,} training and "
        f"{loaders.validation.num_images:,} validation images ({dataset_name(config.data)})",
        f"model: {config.model.name}, {format_size(config.model.size)} pixels, {parameters:.2f} M parameters "
        f"({command.describe_origin('model')})",
        f"recipe: {length}, {schedule.optimizer}, learning rate {schedule.lr:g} "
        f"({command.describe_origin('schedule')}) · {devices}",
    ]
    if schedule.warmup_epochs >= schedule.epochs:
        reason = f"schedule.warmup_epochs {schedule.warmup_epochs:g} is not below epochs {schedule.epochs}"
        lines.append(f"warning: {reason}: the learning rate does not reach {schedule.lr:g}")
    return lines


def check_sizes(
    model: torch.nn.Module, option: str, sizes: Sequence[int | Size], in_chans: int, device: torch.device
) -> None:
    """Raise UserError if the model, which is on `device`, fails for one of the training sizes of `option`."""
    size: int | Size = 0
    try:
        with torch.no_grad(), mode(model, training=False):
            for size in sizes:
                model(torch.zeros(1, in_chans, *as_size(size), device=device))
    except Exception as error:  # timm's models raise any type
        reason = f"{type(model).__name__} does not support images of {format_size(size)}: {one_line(error)}"
        raise UserError(option, reason) from error


def attention_drawer(
    model: torch.nn.Module, loaders: Loaders, config: TrainConfig
) -> Callable[[], torch.Tensor] | None:
    """Return a function that draws the attention in four validation images; None for models of timm."""
    if not isinstance(model, MultiScaleViT):
        return None
    mean, std = config.data.mean, config.data.std
    return lambda: attention_sheet(model, loaders.validation.examples(4), mean, std)


def report(
    model: torch.nn.Module, loaders: Loaders, summary: Summary, config: TrainConfig, process: Process
) -> None:
    """Evaluate the best weights in float32, as eval.py does, and write summary.json."""
    folder = Path(config.output or "")
    path = folder / checkpoint_files.BEST
    with errors_in_option("checkpoint"):
        state = call_on_main(lambda: read_training_state(path))
    state_dict, kind = select_weights(state)
    load_state_dict(model, state_dict, str(path))
    options = EvalConfig(model=config.model, data=config.data, progress=False)
    dataset = EvaluationDataset(config.data.source, loaders.validation, loaders.class_names)
    (result,) = evaluate_model(model, [dataset], options, process, checkpoint=str(path), weights=kind)
    call_on_main(lambda: write_json(folder / run_folder.SUMMARY, [result]))
    minutes, seconds = divmod(round(summary.seconds), 60)
    best = f"best epoch {state['best']['epoch']}, {'EMA' if kind == 'ema' else 'raw'} weights"
    accuracy = f"Top-1 {result['top1']:.2f} % of {result['images']:,} images ({best})"
    print_on_main(process, f"{accuracy} · {minutes} min {seconds} s · {folder}")


def announce(process: Process, state: State, config: TrainConfig) -> None:
    """Print the step from which the run continues, and the options that have changed since."""
    print_on_main(process, f"continuing {config.output} after step {state['step']}, epoch {state['epoch']}")
    for key, old, new in run_folder.differences(state["config"], config):
        print_on_main(process, f"  {key}: {old} → {new}")


def print_on_main(process: Process, line: str) -> None:
    """Print one line on rank 0."""
    if process.is_main:
        console.print_line(line)


def main(argv: Sequence[str]) -> None:
    """Resolve the arguments of a command line, and train."""
    train(resolve_train_command(argv))


if __name__ == "__main__":
    run_program(train, COMMAND)
