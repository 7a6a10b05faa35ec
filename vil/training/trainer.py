"""The training loop.

`fit` reads from top to bottom: epochs, in them steps, in them the parts of gradient accumulation. A step is
numbered from 0 inside this file and counted from 1 in everything that is written; so are epochs. All random
draws of a forward pass are seeded by (seed, step, rank, part), so that the step number is all that a
continued run needs to know. What may go wrong is the business of `guards`, `signals` and
`checkpoint_writer`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn

from vil import checkpoint_files
from vil.config import ConfigError, TrainConfig
from vil.randomness import seed_generators
from vil.schema import stored_tree
from vil.training import checkpoint
from vil.training.checkpoint_writer import CheckpointWriter, check_room
from vil.training.distributed import (
    Process,
    all_reduce_sum,
    average_over_ranks,
    data_parallel,
    from_main,
    lost_rank,
)
from vil.training.guards import FiniteSteps, Look, StepWatch, Watchdog, spreading
from vil.training.input_wait import StepClock, input_bound_warning
from vil.training.logging import RunLog
from vil.training.loss import build_loss
from vil.training.optimizer import (
    build_optimizer,
    build_scheduler,
    check_state,
    clipped_parameters,
    state_of_group,
)
from vil.training.precision import autocast, check_precision, grad_scaler
from vil.training.run_folder import begin, check_class_names, check_train_images
from vil.training.signals import InterruptedEvaluation, InterruptedRun, Signals

Batch = tuple[torch.Tensor, torch.Tensor]


class TrainLoader(Protocol):
    """Batches of training images for this rank."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Images (B, C, H, W) and targets (B,), `accumulation` batches for each step from `start` on."""

    def samples(self, epoch: int, step: int) -> list[str]:
        """The images of one step's global batch."""


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

    @property
    def train_images(self) -> int:
        """Number of training images."""


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
    picture: Callable[[], torch.Tensor] | None = None,
) -> Summary:
    """Trains `model` as `config` says, from the beginning or from where a checkpoint stands.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); trained in place.
        loaders: training and validation images, normalised.
        config: the resolved configuration; `output` is the run's folder, which exists.
        process: this process among those that train together.
        evaluate: vil.evaluation.accuracy.evaluate.
        mix: mixup and cutmix, from images and targets to images and soft targets.
        state: the checkpoint to continue from (`vil.training.checkpoint`); emptied once it was taken up.
        picture: of what a model attends to, (3, H, W) uint8, for the log.

    Raises:
        ConfigError: before the first step, for an option that this model or device cannot follow.
        InterruptedRun: a signal ended the run, which is saved.
        TrainingError: losses, gradients or weights are no longer finite, another rank is gone, or what was to
            be written never could be.
    """
    began = time.perf_counter()
    trainer = _Trainer(model, loaders, config, process, evaluate, mix, state, picture)
    try:
        # Not before everything is known to fit: a folder with a config.yaml holds a run.
        from_main(lambda: begin(trainer.folder, config))
        with trainer.signals.received(), trainer.watchdog.watching():
            try:
                trainer.run()
                trainer.heed_late_signal()
            except InterruptedRun:
                trainer.end_writing()
                raise
            trainer.end_writing()
    except Exception as error:
        lost = lost_rank(error) or lost_worker(error)
        if lost is None:
            raise
        raise TrainingError(f"step {trainer.step + 1}: {lost}; {trainer.last_checkpoint()}") from error
    finally:
        trainer.writer.close()
        trainer.log.close()
    assert trainer.best is not None
    return Summary(trainer.step, trainer.best, time.perf_counter() - began)


def lost_worker(error: BaseException) -> str | None:
    """What `error`, which PyTorch raises wherever the program is, says about a process that loaded images."""
    found = re.search(r"DataLoader worker \(pid.*?\) (.*)", " ".join(str(error).split()))
    if not isinstance(error, RuntimeError) or found is None:
        return None
    return f"a process that loads images {found[1][:100]} Fewer data.workers need less memory"


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
        picture: Callable[[], torch.Tensor] | None,
    ) -> None:
        schedule = config.schedule
        self.loaders, self.config, self.process = loaders, config, process
        self.compute_accuracy, self.mix, self.picture = evaluate, mix, picture
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
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
        self.ema: ModelEmaV3 | None = None
        if schedule.ema_decay is not None:
            # Running statistics are averaged like weights; any other buffer (a random projection) is copied.
            self.ema = ModelEmaV3(
                model,
                decay=schedule.ema_decay,
                use_warmup=schedule.ema_warmup,
                exclude_buffers=not self.statistics,
            )
        self.finite_steps = FiniteSteps(self.optimizer, model)
        self.step_watch = StepWatch(
            process.device, process.world_size, config.max_skipped_steps, config.spike_threshold
        )
        self.step, self.finished_step = 0, 0
        self.best: dict[str, Any] | None = None
        if state is not None:
            self.restore(state)
        kept = config.keep_checkpoints
        from_main(lambda: check_room(self.folder, self.model.state_dict(), self.ema is not None, kept))

        # What is called to train; weights, checkpoints and evaluation belong to the bare model.
        self.network: nn.Module = model
        if process.world_size > 1:
            size = config.model.image_size
            with autocast(self.precision, process.device):  # its passes compile the kernels of this precision
                self.network = data_parallel(model, process, (config.model.in_chans, size, size))
        if config.compile:
            # One graph for each size of the images, before and after random shift: none with dynamic shapes,
            # and none given up because there are too many.
            graphs = 2 * (1 + len(schedule.sizes or []))
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, graphs)
            self.network = torch.compile(self.network, dynamic=False)  # type: ignore[assignment]
        # Without a best one, the run's last evaluation is made again.
        is_repeated = self.best is None and self.finished_step >= self.last_step
        known = self.finished_step - is_repeated
        self.log = RunLog(self.folder if process.is_main else None, config, self.step, known)
        self.writer = CheckpointWriter(self.folder, config.keep_checkpoints, prepare=self.log.sync)
        self.signals = Signals()
        self.watchdog = Watchdog(
            process.rank, config.hang_timeout, config.grace_period, stop=self.signals.seen
        )
        self.clock = StepClock()
        self.epoch_losses: list[float] = []
        self.epoch_began = time.perf_counter()
        self.has_warned = False

    def run(self) -> None:
        """All epochs that are left."""
        while self.finished_step < self.last_step:
            if not self.is_epoch_over():
                self.train_epoch()
            self.finish_epoch()
        if self.best is None:  # max_steps now ends the run at a step that was not evaluated
            self.evaluate_and_save()

    def is_epoch_over(self) -> bool:
        """Whether nothing is left of an epoch but to evaluate it."""
        at_end = self.step % self.steps_per_epoch == 0 or self.step >= self.last_step
        return at_end and self.step > self.finished_step

    def train_epoch(self) -> None:
        """Trains to the end of the epoch that `step` lies in, or to the last step of the run."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        self.model.train()
        self.choose_neighbors(epoch)
        self.epoch_losses, self.epoch_began = [], time.perf_counter()
        batches = iter(self.loaders.train.epoch(epoch, start))
        self.clock.reset()
        self.clock.epoch.begin()
        with self.log.bar(epoch + 1, start, self.steps_per_epoch) as bar:
            while not self.is_epoch_over():
                loss = self.train_step(epoch, batches)
                bar.update()
                if loss is not None:
                    bar.set_postfix(loss=f"{loss:.4f}")
                self.heed_signals()

    def train_step(self, epoch: int, batches: Iterator[Batch]) -> float | None:
        """One step of the optimiser; returns the mean loss of its global batch, if the step is logged."""
        self.scheduler.step_update(self.step)
        self.tell_progress(epoch)
        self.finite_steps.begin()
        loss = torch.zeros((), device=self.process.device)
        for part in range(self.config.schedule.accumulation):
            self.watchdog.at(f"waiting for the images of step {self.step + 1}")
            with self.clock.waiting():
                images, targets = next(batches)
            self.watchdog.at(f"computing step {self.step + 1}")
            loss += self.accumulate(images, targets, epoch, part)
        # Nothing above or below waits for the device, except in a step that is logged.
        grad_norm, is_finite = self.update_weights()
        self.step += 1
        is_full = self.step_watch.add(self.step, loss, is_finite)
        self.clock.step()
        if self.is_logged(self.step):
            return self.log_step(epoch, grad_norm)
        if is_full:
            self.look()
        return None

    def accumulate(self, images: torch.Tensor, targets: torch.Tensor, epoch: int, part: int) -> torch.Tensor:
        """Adds one part's gradients; returns its share of the loss of this rank's images in the step."""
        place = {"step": self.step, "rank": self.process.rank, "part": part}
        images = images.to(self.process.device, non_blocking=True, memory_format=self.memory_format)
        targets = targets.to(self.process.device, non_blocking=True)
        if self.mix is not None:
            images, targets = self.mix(images, targets, epoch=epoch, **place)
        if self.step == part == 0:
            self.log.images(images)
        seed_generators(self.config.seed, "forward", *place.values())
        with self.synchronization(part):
            with autocast(self.precision, self.process.device):
                loss = self.loss(self.network(images), targets) / self.config.schedule.accumulation
            self.scaler.scale(loss).backward(spreading(loss))
        return loss.detach()

    def synchronization(self, part: int) -> AbstractContextManager[Any]:
        """Gradients travel between ranks once per step, with its last part."""
        is_last = part == self.config.schedule.accumulation - 1
        return nullcontext() if is_last or self.process.world_size == 1 else self.network.no_sync()  # type: ignore[operator]

    def update_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the optimiser, unless the gradient is not finite, and of the average.

        Returns:
            The norm of the gradient before clipping, and whether it is finite, on every rank the same.
        """
        schedule = self.config.schedule
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        is_finite = norm.isfinite()
        if schedule.clip_grad is not None and schedule.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(self.clipped, schedule.clip_grad, norm)
        elif schedule.clip_grad is not None:
            dispatch_clip_grad(self.clipped, schedule.clip_grad, schedule.clip_mode)
        self.finite_steps.take(is_finite)
        average_over_ranks(self.statistics)  # in every step: a checkpoint has one set
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step + 1)
        return norm, is_finite

    def look(self) -> Look:
        """What happened in the steps since the last look, on all ranks.

        Raises:
            TrainingError: on every rank, when more steps in a row were skipped than may be.
        """
        look = self.step_watch.look()
        for spike in look.spikes:
            epoch, step = divmod(spike.step - 1, self.steps_per_epoch)
            before = f"{spike.mean:.4f} ± {spike.deviation:.4f} before"
            self.log.say(f"loss spike at step {spike.step}: {spike.loss:.4f}, {before}")
            names = self.loaders.train.samples(epoch, step)
            self.log.write("spike", epoch=epoch + 1, samples=names, **dataclasses.asdict(spike))
        if look.too_many is not None:
            most = self.config.max_skipped_steps
            self.stop(look.too_many, f"loss or gradient are not finite in more than {most} steps in a row")
        self.epoch_losses += filter(math.isfinite, look.losses)
        return look

    def heed_signals(self) -> None:
        """Saves where a signal or save_every says so; ends the run where a signal does, on every rank.

        Raises:
            InterruptedRun: after the run was saved.
        """
        request = self.signals.agree()
        if request.stop:
            self.interrupt(request.stop)
        every = self.config.save_every
        is_due = every is not None and self.step % every == 0 and not self.is_epoch_over()
        if request.save or is_due:
            self.save(is_best=False)

    def heed_late_signal(self) -> None:
        """Raises InterruptedRun where a signal came when nothing was left but to report."""
        stop = from_main(lambda: self.signals.stop)
        if stop:
            name = signal.Signals(stop).name
            raise InterruptedRun(stop, f"{name}: trained to the end; the same command reports")

    def interrupt(self, signum: int) -> NoReturn:
        """Saves, and raises InterruptedRun."""
        self.save(is_best=False)
        reason = f"saved after step {self.step}; the same command goes on from there"
        raise InterruptedRun(signum, f"{signal.Signals(signum).name}: {reason}")

    def finish_epoch(self) -> None:
        """Evaluates, saves and says so."""
        epoch = self.epoch_in_progress()
        line = f"epoch {epoch:3}/{self.config.schedule.epochs}"
        self.look()
        if self.epoch_losses:  # none of an epoch that was over when the run was interrupted
            line += f"   loss {math.fsum(self.epoch_losses) / len(self.epoch_losses):.4f}"
        seconds = time.perf_counter() - self.epoch_began
        warning = input_bound_warning(self.clock.epoch.share(), self.config.data)
        if warning and not self.has_warned:
            self.has_warned = True
            self.log.say(warning)
        self.check_weights()
        is_last = self.step == self.last_step
        every = self.config.attention_every
        if self.picture is not None and every is not None and (epoch % every == 0 or is_last):
            self.log.picture("attention", self.picture, self.step)
        if epoch % self.config.eval_every == 0 or is_last:
            results = self.evaluate_and_save()
            line += f"   Top-1 {results['top1']:.2f} %"
            if "ema_top1" in results:
                line += f"   EMA {results['ema_top1']:.2f} %"
        else:
            self.finished_step = self.step
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
        assert self.best is not None
        self.log.write_best(self.step, self.best["top1"])
        self.finished_step = self.step
        self.save(is_best)
        return results

    def evaluate(self) -> dict[str, Any]:
        """Accuracy of the weights, and of their average under `ema_…`, over the whole validation set."""
        began = time.perf_counter()
        results: dict[str, Any] = {}
        for prefix, model in (("", self.model), ("ema_", self.ema and self.ema.module)):
            if model is None:
                continue
            try:
                accuracy = self.compute_accuracy(
                    model,
                    self.loaders.validation,
                    device=self.process.device,
                    precision=self.precision,
                    progress=self.log.shows_bars,
                    is_told_to_end=self.evaluated_batch,
                )
            except InterruptedEvaluation:
                self.interrupt(self.signals.stop or signal.SIGTERM)
            if not math.isfinite(accuracy.loss):
                self.stop(self.step, f"the validation loss is {accuracy.loss}")
            results |= {
                f"{prefix}{name}": getattr(accuracy, name) for name in ("top1", "top5", "loss", "ece")
            }
            if accuracy.real_top1 is not None:
                results[f"{prefix}real_top1"] = accuracy.real_top1
            results |= {"images": accuracy.images, "unreadable": accuracy.unreadable}
        results["seconds"] = time.perf_counter() - began
        self.log.write("validation", self.step, self.epoch_in_progress(), **results)
        return results

    def evaluated_batch(self) -> bool:
        """Tells the watchdog of a batch; whether this process was told to end."""
        self.watchdog.at(f"evaluating after step {self.step}")
        return self.signals.stop > 0

    def save(self, is_best: bool) -> None:
        """Begins to write a checkpoint, as best.pt too where it is the best; every rank calls this."""
        self.look()
        self.watchdog.at(f"saving after step {self.step}")
        if self.process.is_main:
            self.writer.save(self.state(), is_best)

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on from here, as `vil.training.checkpoint` describes it."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "finished_step": self.finished_step,
            "epoch": self.step // self.steps_per_epoch,
            "watched": self.step_watch.state(),
            "best": self.best,
            "config": stored_tree(self.config),
            "class_names": list(self.loaders.class_names),
            "train_images": self.loaders.train_images,
            "steps_per_epoch": self.steps_per_epoch,
            "versions": checkpoint.versions(),
        }

    def end_writing(self) -> None:
        """Waits until everything is on the disk, and tries again what could not be written.

        Raises:
            TrainingError: it still cannot.
        """
        self.watchdog.at("writing the last checkpoint")
        problem = from_main(lambda: self.writer.finish() or self.log.finish())
        if problem is not None:
            raise TrainingError(f"step {self.step}: {problem}; {self.last_checkpoint()}")

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; options of the optimiser are those of the configuration."""
        check_class_names(self.folder, self.config, state["class_names"], self.loaders.class_names)
        check_train_images(self.folder, self.config, state, self.loaders.train_images, self.steps_per_epoch)
        built = [dict(group) for group in self.optimizer.param_groups]
        try:
            check_state(self.optimizer, state["optimizer"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"] or state["model"])
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError("output", f"the checkpoint in {self.folder} does not fit: {reason}") from error
        for group, own in zip(self.optimizer.param_groups, built):
            group.update(state_of_group(group, own))
        self.step_watch.restore(state["watched"])
        self.step, self.finished_step, self.best = state["step"], state["finished_step"], state["best"]
        state.clear()  # its weights are held here now, or by nobody

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

    def log_step(self, epoch: int, grad_norm: torch.Tensor) -> float:
        """Logs the step just finished; returns the mean loss of its global batch."""
        look = self.look()
        times = self.clock.averages()
        groups = enumerate(self.optimizer.param_groups)
        self.log.rates(self.step, {f"group_{number:02}": group["lr"] for number, group in groups})
        self.log.write(
            "train",
            self.step,
            epoch + 1,
            loss=look.losses[-1],
            lr=self.learning_rate(),
            grad_norm=float(grad_norm),
            skipped_steps=look.skipped,
            **times,
            images_per_second=self.config.schedule.batch_size / times["step_time"],
        )
        return look.losses[-1]

    def check_weights(self) -> None:
        """Raises TrainingError on every rank when weights are not finite, or too large for their squares."""
        for model in filter(None, (self.model, self.ema and self.ema.module)):
            values = [value.float() for value in model.state_dict().values() if value.is_floating_point()]
            if not math.isfinite(all_reduce_sum(nn.utils.get_total_norm(values))):
                self.stop(self.step, "the weights are not finite")

    def stop(self, step: int, problem: str) -> NoReturn:
        """Raises TrainingError for what went wrong in the step that made `step` finished steps."""
        self.scheduler.step_update(step - 1)  # the rate of that step, which may be an earlier one
        rate = self.learning_rate()
        self.writer.wait()
        raise TrainingError(f"step {step}: {problem}, at learning rate {rate:.2e}; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        """Where the run can go on, in words."""
        if not (self.folder / checkpoint_files.FOLDER).exists():
            return f"{self.folder} is gone"
        try:
            files = checkpoint_files.step_files(self.folder)
        except ConfigError as error:
            return str(error)
        return f"the last checkpoint is {files[0][1]}" if files else "nothing was saved yet"

    def learning_rate(self) -> float:
        """The rate of the step just taken, without layer decay."""
        return max(group["lr"] for group in self.optimizer.param_groups)


def _checkpoint_gradients(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        reason = f"{type(model).__name__} does not offer it"
        raise ConfigError("gradient_checkpointing", reason) from None
