"""Trains a model: alone, or as one of the processes that torchrun starts.

    python train.py                                                    a small ViL on the bundled digits
    python train.py --model … --schedule … --data … --output runs/x    one YAML file per section
    python train.py --output runs/x                                    continues the run in that folder
    python train.py --model.init_from runs/x --model.image_size 384 …  fine-tunes the model of that run

Every option of vil/config.py can be given as --section.name value; --help lists them.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and hasattr(signal, "SIGUSR1"):
    # It asks for a checkpoint, and would end a process that is not training yet, or no longer.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

# Threads that wait for one another sleep instead of spinning: they share their cores with the processes that
# load images. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data import Loaders, Mixing, build_loaders
from vil import checkpoint_files, command_line, console
from vil.command_line import COMMAND_LINE, CommandLine, Line
from vil.config import ConfigError, DataConfig, ModelConfig, TrainConfig, in_section, of_option
from vil.evaluation.accuracy import evaluate
from vil.evaluation.report import evaluate_model, write_json
from vil.models.attention_sheet import attention_sheet
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.released import read_config, read_weights
from vil.models.weights import load_file, load_weights
from vil.models.zoo import check_device, model_from_config
from vil.modes import mode
from vil.randomness import seed_generators
from vil.schema import as_tree, without_timm_start_options
from vil.training import checkpoint, distributed, run_folder
from vil.training.distributed import LostRankError, Process, from_main
from vil.training.limits import check_limits
from vil.training.precision import check_precision, set_deterministic
from vil.training.signals import InterruptedRun
from vil.training.trainer import Summary, TrainingError, fit
from vil.weight_files import NO_MODEL, WeightsFile, choose_weights
from vil.yaml_files import read_yaml

CONFIGS = Path(__file__).parent / "configs"
DEMO = {
    "model": CONFIGS / "models" / "vil_32.yaml",
    "schedule": CONFIGS / "schedules" / "digits.yaml",
    "data": CONFIGS / "data" / "digits.yaml",
}
"""What a section is where the command line names no file for it."""


def configure(argv: Sequence[str]) -> CommandLine[TrainConfig]:
    """Resolve the command line over the demo's files, or over the configuration of the run that it continues.

    Where it says what to start from and names no model, the model is the one that is started from.

    Raises:
        ConfigError: the line, or a file that it names, cannot be used.
        SystemExit: after --help or --print_config.
    """
    line = Line(TrainConfig, argv, prog="train.py")
    files = demo_files(line.resolve())
    command = line.resolve(files)
    folder = Path(command.config.output or default_output(command.config.data))
    stored = folder / run_folder.CONFIG
    try:
        if stored.exists() and not line.assigns("", "model", "schedule", "data"):
            command = line.resolve(base_values=stored_config(stored), base_origin=str(stored))
        elif command.config.model.init_from or command.config.model.init_released_config:
            files.pop("model", None)
            command = line.resolve(files)
            if not command.origins.keys() & {"model.name", "model.stages"}:
                model = stored_model(stored) if stored.exists() else initial_model(command)
                command = line.resolve(files, {"model": model})
    except ConfigError as error:
        raise command.locate(error) from error
    line.finish(command)
    command.config.output = str(folder)
    return command


def check_output(argv: Sequence[str], config: TrainConfig) -> None:
    """Refuse a line that names a folder and nothing to train, if that holds no run: it is mistyped.

    Raises:
        ConfigError: as said. A folder that cannot be read now is left to who opens it.
    """
    assigned = {a.key for a in Line(TrainConfig, argv).assignments}
    names_what = any(key.partition(".")[0] in ("", "model", "schedule", "data") for key in assigned)
    if "output" not in assigned or names_what or config.resume == "never":
        return
    try:
        is_run = run_folder.holds_run(Path(config.output or ""))
    except ConfigError:
        is_run = True
    if not is_run:
        reason = f"{config.output} holds no run to continue; to start one there, name what to train, "
        reason += "for example with --data configs/data/digits.yaml"
        raise ConfigError("output", reason, COMMAND_LINE)


def demo_files(command: CommandLine[TrainConfig]) -> dict[str, Path]:
    """Return the demo's files that may lie under a line that names no other model and no other images."""
    files = dict(DEMO)
    if "model.name" in command.origins:
        del files["model"]
    if command.config.data.source != DataConfig.source:
        del files["data"]
    return files


def stored_config(path: Path) -> dict[str, Any]:
    """Return what a run's config.yaml holds."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(str(path), "expected a mapping of keys to values")
    if isinstance(content.get("model"), dict):  # runs of version 0.1.0 stored all of timm's options
        content["model"] = without_timm_start_options(content["model"])
    return content


def stored_model(path: Path) -> dict[str, Any]:
    """Return the model section of a run's config.yaml: whatever it was started from, it goes on with this."""
    return as_tree(Line(TrainConfig, []).resolve(base_values=stored_config(path)).config.model)


def initial_model(command: CommandLine[TrainConfig]) -> dict[str, Any]:
    """Return the model section that belongs to init_from; its number of classes is left to the data."""
    file = initial_weights(command.config.model)
    if file.model is None:
        reason = f"{file.path}: {NO_MODEL}: model.init_released_config"
        raise ConfigError("model.init_from", reason)
    changes = {"num_classes": None, "init_from": None, "init_released_config": None}
    return {**as_tree(file.model), **changes}


def initial_weights(model: ModelConfig) -> WeightsFile:
    """The weights that a model section starts from."""
    released = None
    if model.init_released_config is not None:
        with of_option("model.init_released_config"):
            released = read_config(model.init_released_config)
    if model.init_from is None:
        raise ConfigError("model.init_released_config", "goes with model.init_from, the published checkpoint")
    with of_option("model.init_from"):
        return read_weights(model.init_from, released)


def default_output(data: DataConfig) -> Path:
    """runs/digits, runs/cifar10 for torch/cifar10, runs/imagenet for a folder …/imagenet."""
    name = data.root if data.source == "folder" and data.root else data.source
    # Not resolve(), which would name the run after what a link points to.
    return Path("runs") / (os.path.basename(os.path.abspath(name)) or "data")


def train(words: Sequence[str]) -> None:
    """Parses, builds, fits, and reports the best model."""
    command = configure(words)
    try:
        check_limits(command.config)
        with distributed.start(command.config.device, collective_timeout(command.config)) as process:
            # Machines without a common disk may hold other runs, or none: rank 0's is the one that goes on.
            config = from_main(lambda: command.config)
            from_main(lambda: check_output(words, config))
            config.precision = check_precision(config.precision, process.device)
            set_deterministic(config.deterministic)
            with run_folder.occupied(Path(config.output or "")):
                run(config, process)
    except ConfigError as error:
        raise command.locate(error) from error


def run(config: TrainConfig, process: Process) -> None:
    """Run the remaining epochs of the run in the folder `config.output`, and report the best model."""
    folder = Path(config.output or "")
    state = from_main(lambda: run_folder.open_run(folder, config))
    if state is not None:
        # The weights are those of the checkpoint: nothing that a new run starts from is opened again.
        config.model.timm_options = without_timm_start_options(as_tree(config.model))["timm_options"]
        top1 = from_main(lambda: run_folder.finished_top1(folder, state, config))
        if top1 is not None:
            line = f"{folder} is finished: Top-1 {top1:.2f} %; name another --output to train again"
            say(process, line)
            return
        announce(process, state, config)
    loaders, model, mix = build(config, process, new=state is None)
    with command_line.reading_images():
        picture = attention_picture(model, loaders, config)
        summary = fit(
            model, loaders, config, process, evaluate=evaluate, mix=mix, state=state, picture=picture
        )
        report(model, loaders, summary, config, process)


def attention_picture(
    model: torch.nn.Module, loaders: Loaders, config: TrainConfig
) -> Callable[[], torch.Tensor] | None:
    """Draws what the model attends to in four validation images; None for a model that does not tell."""
    if not isinstance(model, MultiScaleViT):
        return None
    mean, std = config.data.mean, config.data.std
    return lambda: attention_sheet(model, loaders.validation.examples(4), mean, std)


def collective_timeout(config: TrainConfig) -> float:
    """Seconds that ranks wait for one another: long enough for each to have said where it hangs."""
    return max(1800.0, 3 * config.hang_timeout)


def build(config: TrainConfig, process: Process, new: bool) -> tuple[Loaders, torch.nn.Module, Mixing]:
    """Images, the model, in a new run with its first weights, and the mixing; fills in the classes."""
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
        folder=Path(config.output or ""),
        sizes=schedule.sizes,
        epochs=schedule.epochs,
    )
    if config.model.num_classes is None:
        config.model.num_classes = loaders.num_classes
    if config.model.num_classes < loaders.num_classes:
        reason = f"the data has {loaders.num_classes} classes, got {config.model.num_classes}"
        raise ConfigError("model.num_classes", reason)
    seed_generators(config.seed, "weights")
    with in_section("model"):
        model = model_from_config(config.model)
        check_device(model, process.device)
    model.to(process.device)  # a backend that is asked for by name may run nowhere else
    check_sizes(model, schedule.sizes or [], config.model.in_chans, process.device)
    if new and (config.model.init_from or config.model.init_released_config):
        file = initial_weights(config.model)
        with of_option("model.init_from"):
            load_file(model, file, config.model.image_size, new_head=True)
        say(process, f"starting from {file.path}, {file.kind} weights")
    mix = Mixing(schedule.augment, config.model.num_classes, schedule.label_smoothing, config.seed)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    where = f"{process.world_size} × {process.device.type}, {config.precision}"
    length = f"{schedule.epochs} epochs of {loaders.train.steps_per_epoch} × {schedule.batch_size} images"
    say(process, f"{config.model.name}, {parameters:.2f} M parameters · {where} · {length}")
    return loaders, model, mix


def check_sizes(
    model: torch.nn.Module, sizes: Sequence[tuple[float, int]], in_chans: int, device: torch.device
) -> None:
    """Raises ConfigError where the model, which is on `device`, cannot take images of one of the sizes."""
    side = 0
    try:
        with torch.no_grad(), mode(model, training=False):
            for _, side in sizes:
                model(torch.zeros(1, in_chans, side, side, device=device))
    except Exception as error:  # models of timm raise of any kind
        reason = f"{type(model).__name__} takes no images of {side}×{side}: {' '.join(str(error).split())}"
        raise ConfigError("schedule.sizes", reason) from error


def report(
    model: torch.nn.Module, loaders: Loaders, summary: Summary, config: TrainConfig, process: Process
) -> None:
    """Evaluates the best weights as eval.py does, in float32, and writes summary.json."""
    folder = Path(config.output or "")
    path = folder / checkpoint_files.BEST
    state = from_main(lambda: checkpoint.load(path))
    weights, kind = choose_weights(state, "auto")
    load_weights(model, weights, str(path))
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
        console.say(line)


def main(words: Sequence[str]) -> None:
    """`train`; exit status 1 and one line where the training itself cannot go on, 128 + the number of the
    signal that ended it."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        train(words)
    except (TrainingError, LostRankError) as error:
        if speaks:
            console.say(f"error: {error}", sys.stderr)
        raise SystemExit(1) from None
    except InterruptedRun as ended:
        if speaks:
            console.say(str(ended), sys.stderr)
        raise SystemExit(128 + ended.signum) from None


if __name__ == "__main__":
    command_line.main(main)
