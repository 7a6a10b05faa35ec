"""Find a learning rate: train some steps while the rate rises exponentially (learning-rate range test).

    python tools/find_lr.py --data.source folder --data.root photos --data.val_fraction 0.2 --curve lr.png
    python tools/find_lr.py --data configs/data/digits.yaml --steps 200 --max-lr 0.1 --json lr.json

All other arguments are those of train.py. The rates are values of schedule.lr; warm-up, schedule and moving
average are off. The test ends early when the smoothed loss is four times its minimum or not finite. In
float16, steps that the scaling of the loss skips do not end it, up to max_skipped_steps in a row. The
suggested rate is the one at which the smoothed loss falls fastest, if it falls by more than its noise; rates
shortly before the minimum work for many models, too. The folder of the run is neither created nor touched.

Source: Smith, Cyclical Learning Rates for Training Neural Networks, https://arxiv.org/abs/1506.01186,
section 3.3.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data import Mixing, build_loaders, check_same_images, refuse_images_as_outputs
from tools.png import as_png
from vil.checkpoints.initialization import build_random_model, initialize_model
from vil.command_line import ToolParser, bounded_int, resolve_train_command
from vil.config import TrainConfig
from vil.errors import COMMAND_LINE, UserError
from vil.runtime import distributed
from vil.runtime.console import print_line, progress_bar
from vil.runtime.distributed import Process, all_reduce_sum, call_on_all
from vil.runtime.epoch_steps import EpochSteps
from vil.runtime.files import check_outputs, check_writable, write_output
from vil.runtime.precision import choose_precision, set_deterministic
from vil.runtime.seeding import seed_generators
from vil.training.distillation import build_teacher
from vil.training.loss import class_weights
from vil.training.model_updater import ModelUpdater
from vil.training.optimizer import peak_learning_rate

SMOOTHING = 0.9
"""Decay of the moving average of the loss."""
DIVERGENCE = 4.0
"""The test ends when the smoothed loss is this multiple of its minimum."""
NOISE = 2.0
"""A smoothed loss that falls by at most this many standard deviations of single losses does not fall."""
MIN_STEPS = 10


@dataclass(frozen=True)
class Point:
    """The loss of one step, and the smoothed loss, at a learning rate."""

    lr: float
    loss: float
    smoothed: float


def main(argv: Sequence[str]) -> None:
    """Run the test, print the suggested learning rate and write the files."""
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if arguments.min_lr >= arguments.max_lr:
        reason = f"expected less than --max-lr {arguments.max_lr:g}, got {arguments.min_lr:g}"
        raise UserError("--min-lr", reason, COMMAND_LINE)
    command = resolve_train_command(others)
    outputs = {"--curve": arguments.curve, "--json": arguments.json}
    check_outputs(outputs, command.inputs())
    refuse_images_as_outputs(outputs, [command.config.data.root])
    for option, path in outputs.items():
        if path is not None:
            check_writable(path, option)
    try:
        with distributed.start(command.config.device) as process:
            rates = np.geomspace(arguments.min_lr, arguments.max_lr, arguments.steps).tolist()
            points = range_test(command.config, process, rates)
            if not process.is_main:
                return
    except UserError as error:
        raise command.locate(error) from error
    suggestion, has_diverged = suggest(points), len(points) < len(rates)
    if arguments.json:
        result = {"suggestion": suggestion, "diverged": has_diverged, "points": list(map(asdict, points))}
        write_output(arguments.json, json.dumps(result, indent=2) + "\n", "--json")
    if arguments.curve:
        write_output(arguments.curve, draw(points, suggestion), "--curve")
    end = f"diverged at {points[-1].lr:.1e}" if has_diverged else f"no divergence up to {rates[-1]:.1e}"
    if suggestion is None:
        reason = "the loss does not fall by more than its noise"
        print_line(f"no suggestion: {reason}; {end}; try more --steps or a larger batch")
    else:
        print_line(f"suggested: --schedule.lr {suggestion:.1e}; {end}")


def range_test(config: TrainConfig, process: Process, rates: Sequence[float]) -> list[Point]:
    """Train one step at each learning rate; return a point for each until the loss diverges.

    Args:
        config: of train.py; changed.
        process: this process.
        rates: values of `schedule.lr`, rising.

    Raises:
        UserError: an option, a file or the data cannot be used.
    """
    config.output, schedule = None, config.schedule
    schedule.ema_decay = None
    config.precision = choose_precision(config.precision, process.device)
    set_deterministic(config.deterministic)
    loaders = call_on_all(lambda: build_loaders(config, process))
    sources, class_names = {"training images": loaders.train_source}, loaders.class_names
    check_same_images("data.root", sources, config.data.root, process)
    model = build_random_model(config.model, class_names, config.seed, process.device)
    initialize_model(model, config.model, class_names)
    num_logits = config.model.num_classes or len(class_names)
    mix = Mixing(schedule.augment, num_logits, schedule.label_smoothing, config.seed)
    weights = class_weights(schedule.class_weights, loaders.class_counts, num_logits)
    teacher = build_teacher(config, class_names, process)
    steps = EpochSteps.constant(loaders.train.steps_per_epoch)
    updater = ModelUpdater(model, config, process, steps, weights, teacher)
    updater.wrap_network()
    factor = peak_learning_rate(schedule) / schedule.lr
    batches = ((epoch, batch) for epoch in itertools.count() for batch in loaders.train.epoch(epoch))
    points: list[Point] = []
    average = 0.0
    skipped, max_skipped = 0, config.max_skipped_steps if config.precision == "float16" else 0
    is_hidden = not (config.progress and process.is_main)
    bar = progress_bar(rates, desc="learning rates", unit="step", is_hidden=is_hidden)
    for step, rate in enumerate(bar):
        updater.begin_step(step, rate * factor)
        share = torch.zeros((), device=process.device)
        for part in range(schedule.accumulation):
            epoch, (images, targets) = next(batches)
            images, targets = mix(images, targets, step=step, rank=process.rank, part=part, epoch=epoch)
            seed_generators(config.seed, "forward", step, process.rank, part)
            share += updater.accumulate(images, targets, part)
        share, _, is_finite = updater.update(step, share)
        loss = float(all_reduce_sum(share)) / process.world_size
        skipped = 0 if is_finite else skipped + 1
        if not math.isfinite(loss) or skipped > max_skipped:
            del points[step + 1 - skipped :]  # the skipped steps before this one had already diverged
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        points.append(Point(rate, loss, average / (1 - SMOOTHING ** (step + 1))))
        best = min(point.smoothed for point in points)
        if step >= MIN_STEPS and points[-1].smoothed > DIVERGENCE * best:
            break
    if not points:
        raise UserError("--min-lr", "the loss or the gradient of the first steps is not finite", COMMAND_LINE)
    return points


def suggest(points: Sequence[Point]) -> float | None:
    """Return the learning rate at which the smoothed loss falls fastest; None if it does not fall.

    A fall by up to NOISE standard deviations of single losses around the average is noise. The first tenth,
    where the average is over few losses, is left out.
    """
    first = len(points) // 10
    smoothed = np.array([point.smoothed for point in points[first:]])
    falling = smoothed[: int(smoothed.argmin()) + 1]
    noise = np.std([point.loss - point.smoothed for point in points[first : first + len(falling)]])
    if len(falling) < 2 or falling[0] - falling[-1] <= NOISE * noise:
        return None
    return points[first + int(np.gradient(falling).argmin())].lr


def draw(points: Sequence[Point], suggestion: float | None) -> bytes:
    """Return the curve of the losses as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rates = [point.lr for point in points]
    axes.plot(rates, [point.loss for point in points], color="0.75", label="loss of the step")
    axes.plot(rates, [point.smoothed for point in points], color="C0", label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color="C1", linestyle="--", label=f"suggested: {suggestion:.1e}")
    axes.set(xscale="log", xlabel="schedule.lr", ylabel="training loss")
    smoothed = [point.smoothed for point in points]
    axes.set_ylim(0, 1.1 * max(smoothed[0], min(max(smoothed), 2 * smoothed[0])))
    axes.grid(alpha=0.3)
    axes.legend()
    return as_png(figure)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return rate


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="find_lr.py",
        usage="%(prog)s [OPTION ...] [OPTION OF train.py ...]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=bounded_int(MIN_STEPS, 1_000_000), default=100, help="default: 100")
    parser.add_argument("--min-lr", type=_rate, default=1e-6, help="first learning rate (default: 1e-6)")
    parser.add_argument("--max-lr", type=_rate, default=1.0, help="last learning rate (default: 1)")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="draw the losses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the losses and the suggestion")
    return parser
