"""Trains a model: alone, or as one of the processes that torchrun starts.

    python train.py                                                    a small ViL on the bundled digits
    python train.py --model … --schedule … --data … --output runs/x    one YAML file per section
    python train.py --output runs/x                                    continues the run in that folder

Every option of vil/config.py can be given as --section.name value; --help lists them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data import Loaders, Mixing, build_loaders
from vil import command_line
from vil.command_line import CommandLine
from vil.config import ConfigError, DataConfig, TrainConfig, in_section
from vil.evaluation.accuracy import evaluate
from vil.evaluation.report import evaluate_model, write_json
from vil.evaluation.weights import choose_weights, load_weights
from vil.models.zoo import model_from_config
from vil.training import checkpoint, distributed, run_folder
from vil.training.distributed import Process, from_main
from vil.training.limits import check_limits
from vil.training.precision import check_precision
from vil.training.trainer import Summary, TrainingError, fit, seed_generators

CONFIGS = Path(__file__).parent / "configs"
DEMO = {
    "model": CONFIGS / "models" / "vil_32.yaml",
    "schedule": CONFIGS / "schedules" / "digits.yaml",
    "data": CONFIGS / "data" / "digits.yaml",
}
"""What a section is where the command line names no file for it."""


def configure(words: Sequence[str]) -> CommandLine[TrainConfig]:
    """The command line over the demo's files, or over the configuration of the run that it continues."""
    given = {word.partition("=")[0] for word in words}
    command = command_line.parse(TrainConfig, words, DEMO, prog="train.py")
    folder = Path(command.config.output or default_output(command.config.data))
    stored = folder / run_folder.CONFIG
    if stored.exists() and not given & {"--model", "--schedule", "--data", "--config"}:
        command = command_line.parse(TrainConfig, ["--config", str(stored), *words], prog="train.py")
    command.config.output = str(folder)
    return command


def default_output(data: DataConfig) -> Path:
    """runs/digits, runs/cifar10 for torch/cifar10, runs/imagenet for a folder …/imagenet."""
    name = data.root if data.source == "folder" and data.root else data.source
    return Path("runs") / Path(name).name


def train(words: Sequence[str]) -> None:
    """Parses, builds, fits, and reports the best model."""
    command = configure(words)
    config = command.config
    folder = Path(config.output or "")
    try:
        check_limits(config)
        with distributed.start(config.device) as process:
            config.precision = check_precision(config.precision, process.device)
            state = from_main(lambda: run_folder.open_run(folder, config))
            if state is not None:
                top1 = from_main(lambda: run_folder.finished_top1(folder, state, config))
                if top1 is not None:
                    return say(process, f"{folder} is finished: Top-1 {top1:.2f} %")
                announce(process, state, config)
            loaders, model, mix = build(config, process)
            summary = fit(model, loaders, config, process, evaluate=evaluate, mix=mix, state=state)
            report(model, loaders, summary, config, process)
    except ConfigError as error:
        raise command.locate(error) from error


def build(config: TrainConfig, process: Process) -> tuple[Loaders, torch.nn.Module, Mixing]:
    """Images, the model with its first weights, and the mixing; fills in the number of classes."""
    schedule = config.schedule
    loaders = build_loaders(
        config.data,
        schedule.augment,
        image_size=config.model.image_size,
        in_chans=config.model.in_chans,
        batch_size=schedule.batch_size,
        accumulation=schedule.accumulation,
        seed=config.seed,
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
        channels_last=config.channels_last,
    )
    if config.model.num_classes is None:
        config.model.num_classes = loaders.num_classes
    if config.model.num_classes < loaders.num_classes:
        reason = f"the data has {loaders.num_classes} classes, got {config.model.num_classes}"
        raise ConfigError("model.num_classes", reason)
    seed_generators(config.seed, "weights")
    with in_section("model"):
        model = model_from_config(config.model)
    mix = Mixing(schedule.augment, config.model.num_classes, schedule.label_smoothing, config.seed)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    where = f"{process.world_size} × {process.device.type}, {config.precision}"
    length = f"{schedule.epochs} epochs of {loaders.train.steps_per_epoch} × {schedule.batch_size} images"
    say(process, f"{config.model.name}, {parameters:.2f} M parameters · {where} · {length}")
    return loaders, model, mix


def report(
    model: torch.nn.Module, loaders: Loaders, summary: Summary, config: TrainConfig, process: Process
) -> None:
    """Evaluates the best weights as eval.py does, in float32, and writes summary.json."""
    folder = Path(config.output or "")
    path = folder / checkpoint.BEST
    state = from_main(lambda: checkpoint.load(path))
    weights, kind = choose_weights(state, "auto")
    load_weights(model, weights, path)
    result = evaluate_model(
        model,
        loaders.validation,
        image_size=config.model.image_size,
        in_chans=config.model.in_chans,
        device=process.device,
        precision="float32",
        checkpoint=str(path),
        model_name=config.model.name,
        weights=kind,
        data=config.data.source,
    )
    from_main(lambda: write_json(folder / run_folder.SUMMARY, [result]))
    minutes, seconds = divmod(round(summary.seconds), 60)
    say(
        process,
        f"Top-1 {result['top1']:.2f} % of {result['images']:,} images (best epoch {state['best']['epoch']}, "
        f"{'EMA' if kind == 'ema' else 'raw'} weights) · {minutes} min {seconds} s · {folder}",
    )


def announce(process: Process, state: dict[str, Any], config: TrainConfig) -> None:
    """Says where the run goes on, and what is asked for otherwise than before."""
    say(process, f"continuing {config.output} after step {state['step']}, epoch {state['epoch']}")
    for key, before, now in run_folder.differences(state["config"], config):
        say(process, f"  {key}: {before} → {now}")


def say(process: Process, line: str) -> None:
    """One line on standard output, from rank 0."""
    if process.is_main:
        print(line, flush=True)


def main(words: Sequence[str]) -> None:
    """`train`; exit status 1 and one line where the training itself cannot go on."""
    try:
        train(words)
    except TrainingError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    command_line.main(main)
