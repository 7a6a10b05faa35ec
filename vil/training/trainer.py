"""The training loop.

`fit` reads from top to bottom: epochs, in them steps, in them the parts of gradient accumulation. A step is
numbered from 0 inside this file and counted from 1 in everything that is written; so are epochs. All random
draws of a forward pass are seeded by (seed, step, rank, part), so that the step number is all that a
continued run needs to know.
"""

from __future__ import annotations

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import nn

from vil.config import ConfigError, TrainConfig
from vil.training import checkpoint
from vil.training.distributed import Process, all_reduce_sum, data_parallel, from_main
from vil.training.input_wait import InputWait, input_bound_warning
from vil.training.logging import RunLog
from vil.training.loss import build_loss
from vil.training.optimizer import build_optimizer, build_scheduler, clipped_parameters
from vil.training.precision import autocast, check_precision, grad_scaler
from vil.training.run_folder import begin

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainLoader(Protocol):
    """Batches of training images for this rank."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Images (B, C, H, W) and targets (B,), `accumulation` batches for each step from `start` on."""


class Loaders(Protocol):
    """What training needs of a data set."""

    @property
    def train(self) -> TrainLoader:
        """The training set."""

    @property
    def validation(self) -> Any:
        """This rank's share of the validation set, an iterable of batches."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, by number."""


class TrainingError(RuntimeError):
    """Training cannot go on; the text is one line for the user. The last checkpoint stands."""


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        step: optimiser steps since the run began.
        best: `top1` in percent, `weights` (raw or ema) and `epoch` of the best evaluation.
        seconds: time that this call took.
    """

    step: int
    best: dict[str, Any]
    seconds: float


def fit(
    model: nn.Module,
    loaders: Loaders,
    config: TrainConfig,
    process: Process,
    *,
    evaluate: Callable[..., Any],
    mix: Callable[..., Batch] | None = None,
    state: dict[str, Any] | None = None,
) -> Summary:
    """Trains `model` as `config` says, from the beginning or from where a checkpoint stands.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); trained in place.
        loaders: training and validation images, normalised.
        config: the resolved configuration; `output` is the run's folder, which exists.
        process: this process among those that train together.
        evaluate: vil.evaluation.accuracy.evaluate.
        mix: mixup and cutmix, from images and targets to images and soft targets.
        state: the checkpoint to continue from (`vil.training.checkpoint`).

    Raises:
        ConfigError: before the first step, for an option that this model or device cannot follow.
        TrainingError: loss, gradient or weights are no longer finite, or a file cannot be written.
    """
    began = time.perf_counter()
    trainer = _Trainer(model, loaders, config, process, evaluate, mix, state)
    try:
        # Not before everything is known to fit: a folder with a config.yaml holds a run.
        from_main(lambda: begin(trainer.folder, config))
        while trainer.step < trainer.last_step:
            trainer.train_epoch()
            trainer.finish_epoch()
        if trainer.best is None:  # max_steps now ends the run at a step that was not evaluated
            trainer.evaluate_and_save()
    finally:
        trainer.log.close()
    assert trainer.best is not None
    return Summary(trainer.step, trainer.best, time.perf_counter() - began)


def seed_generators(seed: int, purpose: str, *key: int) -> None:
    """Seeds PyTorch's generators, of the CPU and all GPUs, for one purpose at one place of the run."""
    sequence = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *key))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class _Trainer:
    """The parts of a run and its position in it; `fit` is the door."""

    def __init__(
        self,
        model: nn.Module,
        loaders: Loaders,
        config: TrainConfig,
        process: Process,
        evaluate: Callable[..., Any],
        mix: Callable[..., Batch] | None,
        state: dict[str, Any] | None,
    ) -> None:
        schedule = config.schedule
        self.loaders, self.config, self.process = loaders, config, process
        self.compute_accuracy, self.mix = evaluate, mix
        self.folder = Path(config.output or ".")
        self.precision = check_precision(config.precision, process.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format

        self.model = model.to(process.device).to(memory_format=self.memory_format)
        if config.gradient_checkpointing:
            _checkpoint_gradients(model)
        self.steps_per_epoch = loaders.train.steps_per_epoch
        total = schedule.epochs * self.steps_per_epoch
        self.last_step = min(total, schedule.max_steps or total)
        self.optimizer = build_optimizer(model, schedule)
        self.scheduler = build_scheduler(self.optimizer, schedule, self.steps_per_epoch)
        self.scaler = grad_scaler(self.precision, process.device)
        self.loss = build_loss(schedule)
        self.clipped = clipped_parameters(model, schedule.clip_mode)
        self.has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        self.ema: ModelEmaV3 | None = None
        if schedule.ema_decay is not None:
            # Running statistics are averaged like weights; any other buffer (a random projection) is copied.
            self.ema = ModelEmaV3(
                model,
                decay=schedule.ema_decay,
                use_warmup=schedule.ema_warmup,
                exclude_buffers=not self.has_batch_norm,
            )
        self.step = 0
        self.best: dict[str, Any] | None = None
        if state is not None:
            self.restore(state)

        # What is called to train; weights, checkpoints and evaluation belong to the bare model.
        self.network: nn.Module = model
        if process.world_size > 1:
            size = config.model.image_size
            self.network = data_parallel(model, process, (config.model.in_chans, size, size))
        if config.compile:
            self.network = torch.compile(self.network)  # type: ignore[assignment]
        self.log = RunLog(self.folder if process.is_main else None, config, self.step)
        self.clock = _StepClock()
        self.has_warned = False

    def train_epoch(self) -> None:
        """Trains to the end of the epoch that `step` lies in, or to the last step of the run."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        end = min(self.step - start + self.steps_per_epoch, self.last_step)
        steps = end - self.step
        self.model.train()
        self.choose_neighbors(epoch)
        self.epoch_loss = torch.zeros((), device=self.process.device)
        self.epoch_began = time.perf_counter()
        self.bad_step = torch.full((), torch.inf, device=self.process.device)
        batches = iter(self.loaders.train.epoch(epoch, start))
        self.clock.reset()
        self.clock.epoch.begin()
        with self.log.bar(epoch + 1, start, self.steps_per_epoch) as bar:
            while self.step < end:
                self.scheduler.step_update(self.step)
                self.tell_progress(epoch)
                loss = torch.zeros((), device=self.process.device)
                for part in range(self.config.schedule.accumulation):
                    with self.clock.waiting():
                        images, targets = next(batches)
                    loss += self.accumulate(images, targets, epoch, part)
                # Nothing above or below waits for the device, except in a step that is logged.
                grad_norm = self.update_weights()
                self.step += 1
                self.watch(grad_norm)
                self.epoch_loss += loss / steps
                self.clock.step()
                bar.update()
                if self.is_logged(self.step):
                    bar.set_postfix(loss=f"{self.log_step(epoch, loss, grad_norm):.4f}")

    def accumulate(self, images: torch.Tensor, targets: torch.Tensor, epoch: int, part: int) -> torch.Tensor:
        """Adds one part's gradients; returns its share of the loss of this rank's images in the step."""
        place = {"step": self.step, "rank": self.process.rank, "part": part}
        images = images.to(self.process.device, non_blocking=True, memory_format=self.memory_format)
        targets = targets.to(self.process.device, non_blocking=True)
        if self.mix is not None:
            images, targets = self.mix(images, targets, epoch=epoch, **place)
        if self.step == part == 0:
            with self.writing("the log"):
                self.log.images(images)
        seed_generators(self.config.seed, "forward", *place.values())
        with self.synchronization(part):
            with autocast(self.precision, self.process.device):
                loss = self.loss(self.network(images), targets) / self.config.schedule.accumulation
            self.scaler.scale(loss).backward()
        return loss.detach()

    def synchronization(self, part: int) -> AbstractContextManager[Any]:
        """Gradients travel between ranks once per step, with its last part."""
        is_last = part == self.config.schedule.accumulation - 1
        return nullcontext() if is_last or self.process.world_size == 1 else self.network.no_sync()  # type: ignore[operator]

    def update_weights(self) -> torch.Tensor:
        """One step of the optimiser and of the average; returns the norm of the gradient before clipping."""
        schedule = self.config.schedule
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if schedule.clip_grad is not None and schedule.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(self.clipped, schedule.clip_grad, norm)
        elif schedule.clip_grad is not None:
            dispatch_clip_grad(self.clipped, schedule.clip_grad, schedule.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step + 1)
        return norm

    def watch(self, grad_norm: torch.Tensor) -> None:
        """Remembers, on the device, the first step whose gradient is not finite; `mean_over_ranks` looks.

        float16 is left out: its scaler skips such steps, and lowers the scale.
        """
        if not self.scaler.is_enabled():
            is_bad = ~grad_norm.isfinite() & self.bad_step.isinf()
            self.bad_step = self.bad_step.masked_fill(is_bad, self.step)

    def finish_epoch(self) -> None:
        """Evaluates, saves and says so."""
        epoch = self.epoch_in_progress()
        loss = self.mean_over_ranks(self.epoch_loss, "the mean loss of the epoch")
        seconds = time.perf_counter() - self.epoch_began
        warning = input_bound_warning(self.clock.epoch.share(), self.config.data)
        if warning and not self.has_warned:
            self.has_warned = True
            self.log.say(warning)
        if self.has_batch_norm and self.process.world_size > 1:
            for model in filter(None, (self.model, self.ema and self.ema.module)):
                distribute_bn(model, self.process.world_size, reduce=True)
        self.check_weights()
        line = f"epoch {epoch:3}/{self.config.schedule.epochs}   loss {loss:.4f}"
        if epoch % self.config.eval_every == 0 or self.step == self.last_step:
            results = self.evaluate_and_save()
            line += f"   Top-1 {results['top1']:.2f} %"
            if "ema_top1" in results:
                line += f"   EMA {results['ema_top1']:.2f} %"
        else:
            self.save(is_best=False)
        self.log.say(f"{line}   lr {self.learning_rate():.2e}   {seconds:.1f} s")

    def epoch_in_progress(self) -> int:
        """The epoch that the last step belongs to, counted from 1."""
        return math.ceil(self.step / self.steps_per_epoch)

    def evaluate_and_save(self) -> dict[str, Any]:
        """Evaluates and saves, as best.pt too where this is the best evaluation so far."""
        results = self.evaluate()
        raw, ema = results["top1"], results.get("ema_top1", -1.0)
        is_best = self.best is None or max(raw, ema) > self.best["top1"]
        if is_best:
            weights = "ema" if ema > raw else "raw"
            self.best = {"top1": max(raw, ema), "weights": weights, "epoch": self.epoch_in_progress()}
        self.save(is_best)
        return results

    def evaluate(self) -> dict[str, Any]:
        """Accuracy of the weights, and of their average under `ema_…`, over the whole validation set."""
        began = time.perf_counter()
        results: dict[str, Any] = {}
        for prefix, model in (("", self.model), ("ema_", self.ema and self.ema.module)):
            if model is None:
                continue
            accuracy = self.compute_accuracy(
                model,
                self.loaders.validation,
                device=self.process.device,
                precision=self.precision,
                progress=self.log.shows_bars,
            )
            if not math.isfinite(accuracy.loss):
                self.stop(self.step, f"the validation loss is {accuracy.loss}")
            results |= {
                f"{prefix}{name}": getattr(accuracy, name) for name in ("top1", "top5", "loss", "ece")
            }
            if accuracy.real_top1 is not None:
                results[f"{prefix}real_top1"] = accuracy.real_top1
            results |= {"images": accuracy.images, "unreadable": accuracy.unreadable}
        results["seconds"] = time.perf_counter() - began
        with self.writing("the log"):
            self.log.write("validation", self.step, self.epoch_in_progress(), **results)
        return results

    def save(self, is_best: bool) -> None:
        """Writes last.pt, before it best.pt: a crash between the two is repeated, not lost."""
        if not self.process.is_main:
            return
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "best": self.best,
            "config": dataclasses.asdict(self.config),
            "class_names": list(self.loaders.class_names),
            "versions": checkpoint.versions(),
        }
        with self.writing("the checkpoint"):
            if is_best:
                checkpoint.save(self.folder / checkpoint.BEST, state)
                checkpoint.link(self.folder / checkpoint.BEST, self.folder / checkpoint.LAST)
            else:
                checkpoint.save(self.folder / checkpoint.LAST, state)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Makes an OSError inside a TrainingError."""
        try:
            yield
        except OSError as error:
            reason = f"{what} cannot be written to {self.folder}: {error.strerror or error}"
            raise TrainingError(f"step {self.step}: {reason}; the last checkpoint stands") from error

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up where `state` stands; options of the optimiser are those of the configuration."""
        self.check_class_names(state["class_names"])
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"] or state["model"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError("output", f"the checkpoint in {self.folder} does not fit: {reason}") from error
        for group, own in zip(self.optimizer.param_groups, options):
            group.update(own)
        self.step, self.best = state["step"], state["best"]

    def check_class_names(self, before: list[str]) -> None:
        """Raises ConfigError where the classes are not those of the run, in the order of the head."""
        now = list(self.loaders.class_names)
        if now == before:
            return
        key = "data.root" if self.config.data.source == "folder" else "data.source"
        if len(now) != len(before):
            reason = f"{len(before)} classes, the data has {len(now)}"
        else:
            number = next(i for i, (name, other) in enumerate(zip(now, before)) if name != other)
            reason = f"{before[number]!r} as class {number}, the data has {now[number]!r}"
        raise ConfigError(key, f"other classes than the run in {self.folder}, which has {reason}")

    def choose_neighbors(self, epoch: int) -> None:
        """Random shift: one random neighbour until `random_shift_until` of the epochs, then all eight."""
        set_neighbors = getattr(self.model, "set_neighbors", None)
        if set_neighbors and self.config.model.neighbors == "random":
            is_random = epoch / self.config.schedule.epochs < self.config.schedule.random_shift_until
            set_neighbors("random" if is_random else "all")

    def tell_progress(self, epoch: int) -> None:
        """Lets a model that changes with time do so, from the same draws on every rank."""
        set_training_progress = getattr(self.model, "set_training_progress", None)
        if set_training_progress:
            seed_generators(self.config.seed, "progress", self.step)
            set_training_progress(self.step, epoch)

    def is_logged(self, count: int) -> bool:
        """Whether the step that makes `count` finished steps is logged."""
        return count % self.config.log_every == 0 or count in (1, self.last_step)

    def log_step(self, epoch: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> float:
        """Logs the step just finished; returns the mean loss of its global batch."""
        mean = self.mean_over_ranks(loss, "the loss")
        times = self.clock.averages()
        with self.writing("the log"):
            self.log.write(
                "train",
                self.step,
                epoch + 1,
                loss=mean,
                lr=self.learning_rate(),
                grad_norm=float(grad_norm),
                **times,
                images_per_second=self.config.schedule.batch_size / times["step_time"],
            )
        return mean

    def mean_over_ranks(self, loss: torch.Tensor, what: str) -> float:
        """The mean of a loss over all ranks.

        Raises:
            TrainingError: on every rank, when it is not finite, or a gradient of this epoch was not.
        """
        both = all_reduce_sum(torch.stack([loss, self.bad_step.isfinite().to(loss.dtype)]))
        total, bad_ranks = both.tolist()
        mean = total / self.process.world_size
        bad_step = int(min(float(self.bad_step), self.step)) if bad_ranks else self.step
        if not math.isfinite(mean) and bad_step == self.step:
            self.stop(self.step, f"{what} is {mean}")
        if bad_ranks:
            self.stop(bad_step, "the gradient is not finite")
        return mean

    def check_weights(self) -> None:
        """Raises TrainingError on every rank when weights are not finite, or too large for their squares."""
        for model in filter(None, (self.model, self.ema and self.ema.module)):
            values = [value.float() for value in model.state_dict().values() if value.is_floating_point()]
            if not math.isfinite(all_reduce_sum(nn.utils.get_total_norm(values))):
                self.stop(self.step, "the weights are not finite")

    def stop(self, step: int, problem: str) -> NoReturn:
        """Raises TrainingError for what went wrong in the step that made `step` finished steps."""
        saved = self.folder / checkpoint.LAST
        kept = f"{saved} holds the last epoch" if saved.exists() else "nothing was saved yet"
        self.scheduler.step_update(step - 1)  # the rate of that step, which may be an earlier one
        rate = self.learning_rate()
        raise TrainingError(f"step {step}: {problem}, at learning rate {rate:.2e}; {kept}")

    def learning_rate(self) -> float:
        """The rate of the step just taken, without layer decay."""
        return max(group["lr"] for group in self.optimizer.param_groups)


def _checkpoint_gradients(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        reason = f"{type(model).__name__} does not offer it"
        raise ConfigError("gradient_checkpointing", reason) from None


class _StepClock:
    """Seconds per step, and what of them was spent waiting for images."""

    def __init__(self) -> None:
        self.epoch = InputWait()
        self.reset()

    def reset(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.waited += seconds
        self.epoch.add(seconds)

    def step(self) -> None:
        self.steps += 1
        self.epoch.step()

    def averages(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        means = {
            "step_time": (time.perf_counter() - self.began) / self.steps,
            "data_wait": self.waited / self.steps,
        }
        self.reset()
        return means
