"""The training loop: epochs, steps of the optimizer, and micro-batches of gradient accumulation.

Steps and epochs are counted from 0 in this file, and from 1 in logs and messages. The random draws of a
forward pass are a function of (seed, step, rank, part): a run continues from its step number alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from torch import nn

from vil.checkpoints.checkpoint_files import describe_last
from vil.checkpoints.run_folder import (
    begin_run,
    check_class_names,
    check_epoch,
    check_teacher,
    check_train_images,
    differences,
)
from vil.checkpoints.training_state import State, evaluations_since_best, library_versions
from vil.checkpoints.writer import CheckpointWriter, check_disk_space
from vil.config import TrainConfig, Tree
from vil.errors import UserError, errors_in_option, one_line
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.evaluation.metrics import METRICS
from vil.runtime.distributed import Process, all_reduce_sum, call_on_main, lost_rank_reason
from vil.runtime.epoch_steps import EpochSteps, count_epoch_steps, phase_at, training_phases
from vil.runtime.seeding import seed_generators
from vil.runtime.signals import InterruptedEvaluation, InterruptedRun, SignalHandler
from vil.runtime.watchdog import Watchdog
from vil.training.distillation import Teacher
from vil.training.loss import class_weights
from vil.training.loss_monitor import LossMonitor, StepReport
from vil.training.model_updater import ModelUpdater
from vil.training.optimizer import find_reordering_option
from vil.training.position import RunPosition
from vil.training.run_log import RunLog
from vil.training.step_timer import StepTimer, input_bound_warning
from vil.validation import stored_tree

Batch = tuple[torch.Tensor, torch.Tensor]
PREFIXES = {"raw": "", "ema": "ema_"}
"""Kind of weights -> what precedes the names of its metrics."""


class TrainLoader(Protocol):
    """Batches of training images for this rank."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the first epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield images (B, C, H, W) and targets (B,), `accumulation` batches per step from `start` on."""

    def samples(self, epoch: int, step: int) -> list[str]:
        """Return the names of the images in the global batch of one step."""


class Loaders(Protocol):
    """The data of a run."""

    @property
    def train(self) -> TrainLoader:
        """The training set."""

    @property
    def validation(self) -> Iterable[Batch]:
        """Batches of this rank's share of the validation set."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, in the order of the logits."""

    @property
    def class_counts(self) -> Sequence[int]:
        """Number of training images of each class, over all ranks."""

    @property
    def train_images(self) -> int:
        """Number of training images."""

    @property
    def order_version(self) -> int:
        """Version of the order of the training images, for the checkpoint."""

    def write_split(self, folder: Path) -> None:
        """Write the names of the images that are held out for validation, if there are any."""


class Mix(Protocol):
    """Mixup and cutmix."""

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, *, step: int, rank: int, part: int, epoch: int
    ) -> Batch:
        """Return mixed images (B, C, H, W) and soft targets (B, classes)."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line for the user. The last checkpoint is intact."""

    exit_status = 1


@dataclass(frozen=True)
class Summary:
    """The end of a run: its steps, `RunPosition.best`, and the seconds of the call of `fit`."""

    step: int
    best: Tree
    seconds: float


@dataclass(frozen=True)
class Monitoring:
    """Sources of further log entries, which do not change the training.

    Attributes:
        draw_attention: returns an image of attention maps, (3, H, W) uint8; None for no images.
        eval_sets: further data sets with unique names, which every evaluation logs.
    """

    draw_attention: Callable[[], torch.Tensor] | None = None
    eval_sets: Sequence[EvaluationDataset] = ()


def fit(
    model: nn.Module,
    loaders: Loaders,
    config: TrainConfig,
    process: Process,
    *,
    mix: Mix | None = None,
    state: State | None = None,
    teacher: Teacher | None = None,
    monitoring: Monitoring | None = None,
) -> Summary:
    """Train `model` from the beginning or from a checkpoint.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); trained in place.
        loaders: normalized training and validation images.
        config: the resolved configuration; its `output` is the folder of the run, which exists.
        process: rank and device of this process.
        mix: mixup and cutmix.
        state: the checkpoint to continue from (`vil.checkpoints.training_state`); emptied.
        teacher: the teacher of `schedule.distillation`.
        monitoring: sources of further log entries.

    Raises:
        UserError: before the first step, for an option that does not fit the model or the device.
        InterruptedRun: a signal ended the run, which is saved.
        TrainingError: losses, gradients or weights are not finite, another rank ended, or files cannot be
            written.
    """
    start = time.perf_counter()
    trainer = Trainer(model, loaders, config, process, mix, state, teacher, monitoring or Monitoring())
    try:
        # Only now that everything fits: a folder with a config.yaml holds a run.
        if state is None:
            call_on_main(lambda: loaders.write_split(trainer.folder))
        call_on_main(lambda: begin_run(trainer.folder, config))
        with trainer.signals.installed(), trainer.watchdog.running():
            try:
                trainer.run()
                trainer.handle_late_signal()
            except InterruptedRun:
                trainer.finish_files()
                raise
            trainer.finish_files()
    except Exception as error:
        reason = lost_rank_reason(error) or lost_worker_reason(error)
        if reason is None:
            raise
        message = f"step {trainer.position.step + 1}: {reason}; {describe_last(trainer.folder)}"
        raise TrainingError(message) from error
    finally:
        trainer.writer.close()
        trainer.log.close(trainer.position.is_finished)
        trainer.updater.unfreeze()
    best = trainer.position.best
    assert best is not None
    return Summary(trainer.position.step, best, time.perf_counter() - start)


def best_metric_key(name: str) -> str:
    """Return the key in `METRICS` of `schedule.best_metric`."""
    return {"f1": "macro_f1"}.get(name, name)


def check_patience(config: TrainConfig, epoch_steps: EpochSteps, last_step: int) -> None:
    """Raise UserError if `schedule.patience` is set and no evaluation precedes the end of the run."""
    first = epoch_steps.first_step(config.eval_every)
    if config.schedule.patience is not None and first >= last_step:
        epoch = min(config.eval_every, epoch_steps.locate(last_step - 1)[0] + 1)
        reason = f"the first evaluation, after epoch {epoch}, would be the last one"
        advice = "evaluate more often by eval_every" if epoch > 1 else "train longer"
        raise UserError("schedule.patience", f"{reason}; {advice}")


def check_best_metric(config: TrainConfig, num_logits: int) -> None:
    """Raise UserError if `schedule.best_metric` is equal for all weights of a model."""
    if config.schedule.best_metric == "top5" and num_logits <= 5:
        raise UserError("schedule.best_metric", f"top5 is always 100 % with {num_logits} classes; use top1")


def lost_worker_reason(error: BaseException) -> str | None:
    """Return one line if PyTorch raised `error` because a data worker was killed; else None.

    PyTorch raises it from a signal handler, anywhere in the program.
    """
    match = re.search(r"DataLoader worker \(pid.*?\) (.*)", " ".join(str(error).split()))
    if not isinstance(error, RuntimeError) or match is None:
        return None
    return f"a data worker {match[1][:100]} Fewer data.workers need less memory"


class Trainer:
    """The components of a run and its position; see `fit`."""

    def __init__(
        self,
        model: nn.Module,
        loaders: Loaders,
        config: TrainConfig,
        process: Process,
        mix: Mix | None,
        state: State | None,
        teacher: Teacher | None,
        monitoring: Monitoring,
    ) -> None:
        self.model, self.loaders, self.config, self.process = model, loaders, config, process
        self.mix, self.teacher, self.monitoring = mix, teacher, monitoring
        self.folder = Path(config.output or ".")
        self.phases = training_phases(config.schedule, config.model.size)
        steps = count_epoch_steps(self.phases, loaders.train.steps_per_epoch, loaders.train_images)
        num_logits = config.model.num_classes or len(loaders.class_names)
        total_steps = steps.first_step(config.schedule.total_epochs)
        last_step = min(total_steps, config.schedule.max_steps or total_steps)
        self.best_key = best_metric_key(config.schedule.best_metric)
        check_patience(config, steps, last_step)
        check_best_metric(config, num_logits)
        self.position = RunPosition(
            steps, last_step, eval_every=config.eval_every, patience=config.schedule.patience
        )
        weights = class_weights(config.schedule.class_weights, loaders.class_counts, num_logits)
        self.updater = ModelUpdater(model, config, process, steps, weights, teacher)
        limits = (config.max_skipped_steps, config.spike_threshold)
        self.loss_monitor = LossMonitor(process.device, process.world_size, *limits)
        changed_options: list[tuple[str, object, object]] = []
        if state is not None:
            changed_options = differences(state["config"], config)
            self.restore(state)
        has_ema = self.updater.ema is not None
        keep = config.keep_checkpoints
        call_on_main(lambda: check_disk_space(self.folder, model.state_dict(), has_ema, keep))
        self.updater.wrap_network()
        self.log = RunLog(None, config, 0, True)
        call_on_main(self.open_log)
        for changed in changed_options:
            self.log.write_changed_option(self.position.step, self.position.epoch_number, *changed)
        self.writer = CheckpointWriter(self.folder, keep, prepare=self.log.flush)
        self.signals = SignalHandler()
        timeouts = (config.hang_timeout, config.grace_period, config.hang_action == "exit")
        stop, folder = self.signals.pending_stop, self.folder
        self.watchdog = Watchdog(
            process.rank, *timeouts, stop_signal=stop, last_checkpoint=lambda: describe_last(folder)
        )
        self.timer = StepTimer()
        options = (process.device, self.updater.precision, config.progress and process.is_main)
        self.evaluation_options = EvaluationOptions(*options, should_stop=self.must_stop_evaluation)
        self.epoch_losses: list[float] = []
        self.epoch_start = time.perf_counter()
        self.has_warned_input_bound = False

    def open_log(self) -> None:
        """Open the files of the log, on rank 0."""
        self.log = RunLog(self.folder, self.config, self.position.step, self.position.is_evaluated)

    # --- Training -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train the remaining epochs."""
        while not self.position.is_finished:
            if not self.position.is_epoch_trained:
                self.train_epoch()
            self.finish_epoch()
        if self.position.needs_final_evaluation:
            self.evaluate_and_save()

    def train_epoch(self) -> None:
        """Train to the end of the current epoch, or to the last step of the run."""
        epoch, start = self.position.epoch, self.position.epoch_step
        self.set_neighbors(epoch)
        self.epoch_losses, self.epoch_start = [], time.perf_counter()
        batches = iter(self.loaders.train.epoch(epoch, start))
        self.timer.begin_epoch()
        epochs = self.config.schedule.total_epochs
        steps = self.position.epoch_steps.steps(epoch)
        with self.log.progress_bar(epoch + 1, epochs, start, steps) as bar:
            while not self.position.is_epoch_trained:
                loss = self.train_step(batches)
                bar.update()
                if loss is not None:
                    bar.set_postfix(loss=f"{loss:.4f}")
                self.handle_signals()

    def train_step(self, batches: Iterator[Batch]) -> float | None:
        """Train one step; return the mean loss of its global batch if the step is logged."""
        step = self.position.step
        self.updater.begin_step(step)
        self.set_training_progress()
        loss = torch.zeros((), device=self.process.device)
        for part in range(self.config.schedule.accumulation):
            self.watchdog.report_progress(f"waiting for the images of step {step + 1}")
            with self.timer.waiting():
                images, targets = next(batches)
            self.watchdog.report_progress(f"computing step {step + 1}")
            loss += self.accumulate(images, targets, part)
        # Nothing in a step waits for the device, unless it is logged.
        loss, grad_norm, is_finite = self.updater.update(step, loss)
        self.position = self.position.after_step()
        is_full = self.loss_monitor.add(self.position.step, loss, is_finite)
        self.timer.end_step()
        step = self.position.step
        if step % self.config.log_every == 0 or step in (1, self.position.last_step):
            return self.log_step(grad_norm)
        if is_full:
            self.check_losses()
        return None

    def accumulate(self, images: torch.Tensor, targets: torch.Tensor, part: int) -> torch.Tensor:
        """Mix one micro-batch and add its gradients; return its share of the loss of this rank."""
        step, rank = self.position.step, self.process.rank
        device, epoch = self.process.device, self.position.epoch
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(device, non_blocking=True)
        if self.mix is not None:
            images, targets = self.mix(images, targets, step=step, rank=rank, part=part, epoch=epoch)
        if step == part == 0:
            self.log.tensorboard.add_batch(images, self.config.data.mean, self.config.data.std)
        seed_generators(self.config.seed, "forward", step, rank, part)
        return self.updater.accumulate(images, targets, part)

    def set_neighbors(self, epoch: int) -> None:
        """Random shift: train with one random neighbor until `random_shift_until`, then with all eight."""
        set_neighbors = getattr(self.model, "set_neighbors", None)
        if set_neighbors and self.config.model.neighbors == "random":
            schedule = self.config.schedule
            is_random = epoch / schedule.epochs < schedule.random_shift_until
            set_neighbors("random" if is_random else "all")

    def set_training_progress(self) -> None:
        """Notify a model that changes in the course of training; its draws are equal on all ranks."""
        set_training_progress = getattr(self.model, "set_training_progress", None)
        if set_training_progress:
            seed_generators(self.config.seed, "progress", self.position.step)
            set_training_progress(self.position.step, self.position.epoch)

    # --- Signals --------------------------------------------------------------------------------------------

    def handle_signals(self) -> None:
        """Save after SIGUSR1 and every `save_every` steps; end the run after SIGTERM or SIGINT.

        Raises:
            InterruptedRun: on every rank, after the run is saved.
        """
        request = self.signals.synchronize()
        if request.stop:
            self.interrupt(request.stop)
        every = self.config.save_every
        is_due = every is not None and self.position.step % every == 0 and not self.position.is_epoch_trained
        if request.save or is_due:
            self.save(is_best=False)

    def handle_late_signal(self) -> None:
        """Raise InterruptedRun if a signal arrived after the last epoch."""
        stop = call_on_main(lambda: self.signals.stop)
        if stop:
            raise InterruptedRun(stop, "training is complete; run the same command to evaluate it")

    def interrupt(self, signum: int) -> NoReturn:
        """Save, and raise InterruptedRun."""
        self.save(is_best=False)
        reason = f"saved after step {self.position.step}; run the same command to continue"
        raise InterruptedRun(signum, reason)

    # --- End of an epoch ------------------------------------------------------------------------------------

    def finish_epoch(self) -> None:
        """Check, evaluate if that is due, save, and print a line."""
        epoch, is_last = self.position.epoch_number, self.position.step == self.position.last_step
        line = self.epoch_title()
        self.check_losses()
        if self.epoch_losses:  # empty if the run was interrupted after the last step of the epoch
            line += f"   loss {math.fsum(self.epoch_losses) / len(self.epoch_losses):.4f}"
        seconds = time.perf_counter() - self.epoch_start
        self.warn_if_input_bound()
        self.check_weights()
        every = self.config.attention_every
        if every is not None and (epoch % every == 0 or is_last):
            self.draw_attention_maps()
        if epoch % self.config.eval_every == 0 or is_last:
            results = self.evaluate_and_save()
            line += f"   Top-1 {results['top1']:.2f} %"
            if "ema_top1" in results:
                line += f"   EMA {results['ema_top1']:.2f} %"
            for name, values in results["eval_sets"].items():
                line += f"   {name} {values['top1']:.2f} %"
                if "ema_top1" in values:
                    line += f", EMA {values['ema_top1']:.2f} %"
        else:
            self.position = self.position.after_epoch()
            self.save(is_best=False)
        self.log.print_line(f"{line}   lr {self.learning_rate():.2e}   {seconds:.1f} s")
        if self.position.is_stopped_early:
            metric, patience = self.config.schedule.best_metric, self.config.schedule.patience
            self.log.print_line(f"early stopping: no better {metric} in {patience} evaluations")
            if every is not None and epoch % every and not is_last:
                self.draw_attention_maps()

    def draw_attention_maps(self) -> None:
        """Add an image of attention maps to the log."""
        if self.monitoring.draw_attention is not None:
            self.log.tensorboard.add_image("attention", self.monitoring.draw_attention, self.position.step)

    def evaluate_and_save(self) -> Tree:
        """Evaluate and save, as best.pt too if no earlier evaluation is as good."""
        results = self.evaluate()
        key, sign = self.best_key, 1 if METRICS[self.best_key].higher_is_better else -1
        # The first of equal ones: raw weights, an earlier epoch.
        weights = max(self.updater.models(), key=lambda kind: sign * results[f"{PREFIXES[kind]}{key}"])
        value, top1 = (results[f"{PREFIXES[weights]}{name}"] for name in (key, "top1"))
        best = self.position.best
        is_best = best is None or sign * value > sign * best["value" if "value" in best else "top1"]
        if best is None or is_best:
            best = {"top1": top1, "weights": weights, "epoch": self.position.epoch_number}
            if key != "top1":
                best["value"] = value
        self.log.tensorboard.add_best(self.position.step, best["top1"])
        self.position = self.position.after_epoch(best)
        self.save(is_best)
        return results

    def evaluate(self) -> Tree:
        """Evaluate all data sets, log them, and return the metrics of the validation set.

        Those of averaged weights have the prefix `ema_`; `eval_sets` has the metrics of the other sets.
        """
        start, step, epoch = time.perf_counter(), self.position.step, self.position.epoch_number
        validation = EvaluationDataset("validation", self.loaders.validation, self.loaders.class_names)
        results = self.evaluate_set(validation)
        for key in ("loss", "ema_loss"):
            if not math.isfinite(results.get(key, 0.0)):
                self.fail(step, f"the validation loss is {results[key]}")
        results["seconds"] = time.perf_counter() - start
        per_set = {}
        for dataset in self.monitoring.eval_sets:
            with errors_in_option("eval_sets"):
                per_set[dataset.name] = self.evaluate_set(dataset)
        for name, values in per_set.items():
            self.log.write(f"validation/{name}", step, epoch, **values)
        self.log.write("validation", step, epoch, **results)  # the last record of an evaluation
        return {**results, "eval_sets": per_set}

    def evaluate_set(self, dataset: EvaluationDataset) -> Tree:
        """Return metrics of the weights, and of their average as `ema_...`, over one data set."""
        found: Tree = {}
        for kind, model in self.updater.models().items():
            try:
                result = evaluate(model, dataset, self.evaluation_options)
            except InterruptedEvaluation:
                self.interrupt(self.signals.stop or signal.SIGTERM)
            counts = {"images": result.images, "unreadable": result.unreadable}
            found |= result.logged(PREFIXES[kind]) | counts
        return found

    def must_stop_evaluation(self) -> bool:
        """Report progress after a batch; return True if this process received a signal."""
        self.watchdog.report_progress(f"evaluating after step {self.position.step}")
        return self.signals.stop > 0

    # --- Logs and checks ------------------------------------------------------------------------------------

    def log_step(self, grad_norm: torch.Tensor) -> float:
        """Log the last step; return the mean loss of its global batch."""
        step, report, times = self.position.step, self.check_losses(), self.timer.averages()
        batch_size = phase_at(self.phases, self.position.epoch_number - 1).batch_size
        loss, lr, images_per_second = report.losses[-1], self.learning_rate(), batch_size / times["step_time"]
        self.log.tensorboard.add_learning_rates(step, self.updater.learning_rates())
        self.log.write(
            "train",
            step,
            self.position.epoch_number,
            loss=loss,
            lr=lr,
            grad_norm=float(grad_norm),
            skipped_steps=report.skipped_steps,
            **times,
            images_per_second=images_per_second,
        )
        if not self.position.is_epoch_trained:
            steps = self.position.epoch_steps.steps(self.position.epoch)
            line = f"{self.epoch_title()}   step {self.position.epoch_step}/{steps}   loss {loss:.4f}"
            self.log.print_progress(f"{line}   lr {lr:.2e}   {images_per_second:,.0f} images/s")
        return loss

    def epoch_title(self) -> str:
        """Return the beginning of a line about the current epoch."""
        return f"epoch {self.position.epoch_number:3}/{self.config.schedule.total_epochs}"

    def learning_rate(self) -> float:
        """Return the learning rate of the last step, without layer decay."""
        return max(self.updater.learning_rates())

    def check_losses(self) -> StepReport:
        """Read the losses of all ranks since the last call, and log loss spikes.

        Raises:
            TrainingError: on every rank, if more than `max_skipped_steps` steps in a row were skipped.
        """
        report = self.loss_monitor.report()
        for spike in report.spikes:
            epoch, step = self.position.epoch_steps.locate(spike.step - 1)
            before = f"{spike.mean:.4f} ± {spike.deviation:.4f} before"
            self.log.print_line(f"loss spike at step {spike.step}: {spike.loss:.4f}, {before}")
            samples = self.loaders.train.samples(epoch, step)
            self.log.write("spike", epoch=epoch + 1, samples=samples, **dataclasses.asdict(spike))
        if report.failed_step is not None:
            limit = self.config.max_skipped_steps
            self.fail(report.failed_step, f"loss or gradient not finite in more than {limit} steps in a row")
        self.epoch_losses += filter(math.isfinite, report.losses)
        return report

    def check_weights(self) -> None:
        """Raise TrainingError on every rank if weights, or the sum of their squares, are not finite."""
        for model in self.updater.models().values():
            values = [value.float() for value in model.state_dict().values() if value.is_floating_point()]
            if not math.isfinite(all_reduce_sum(nn.utils.get_total_norm(values))):
                self.fail(self.position.step, "the weights are not finite")

    def warn_if_input_bound(self) -> None:
        """Print one warning per run if the epoch was spent waiting for images."""
        warning = input_bound_warning(self.timer.waiting_share(), self.config.data.workers)
        if warning and not self.has_warned_input_bound:
            self.has_warned_input_bound = True
            self.log.print_line(warning)

    def fail(self, step: int, problem: str) -> NoReturn:
        """Raise TrainingError for a problem in a step, counted from 1, which may be an earlier one."""
        self.updater.begin_step(step - 1)  # sets its learning rate
        problem += f", at learning rate {self.learning_rate():.2e}"
        self.writer.wait()
        raise TrainingError(f"step {step}: {problem}; {describe_last(self.folder)}")

    # --- Checkpoints ----------------------------------------------------------------------------------------

    def save(self, is_best: bool) -> None:
        """Start to write a checkpoint, and best.pt if `is_best`; every rank calls this."""
        self.check_losses()
        self.watchdog.report_progress(f"saving after step {self.position.step}")
        if self.process.is_main:
            self.writer.save(self.state_dict(), is_best)

    def state_dict(self) -> State:
        """Return the content of a checkpoint: see `vil.checkpoints.training_state`."""
        position = self.position
        return {
            **self.updater.state_dict(),
            "step": position.step,
            "finished_step": position.finished_step,
            "epoch": position.epoch,
            "epoch_step": position.epoch_step,
            "watched": self.loss_monitor.state_dict(),
            "best": position.best,
            "evaluations_since_best": position.evaluations_since_best,
            "order_version": self.loaders.order_version,
            "config": stored_tree(self.config),
            "class_names": list(self.loaders.class_names),
            "teacher_digest": self.teacher_digest(),
            "train_images": self.loaders.train_images,
            "steps_per_epoch": position.epoch_steps.steps(0),
            "versions": library_versions(),
        }

    def teacher_digest(self) -> str | None:
        """Return the digest of the teacher, None without one."""
        return None if self.teacher is None else self.teacher.trained.digest

    def restore(self, state: State) -> None:
        """Continue from a checkpoint, and empty `state`: its tensors are copied.

        Raises:
            UserError: it does not fit the model or the data.
        """
        check_class_names(self.folder, self.config, state["class_names"], self.loaders.class_names)
        steps_per_epoch = self.position.epoch_steps.steps(0)
        check_train_images(self.folder, self.config, state, self.loaders.train_images, steps_per_epoch)
        check_teacher(self.folder, state, self.teacher_digest())
        try:
            schedule, stored_schedule = self.config.schedule, state["config"]["schedule"]
            reordering = find_reordering_option(self.updater.model, schedule, stored_schedule)
            if reordering is None:
                self.updater.load_state_dict(state)
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            reason = one_line(error)
            raise UserError("output", f"the checkpoint in {self.folder} does not fit: {reason}") from error
        if reordering is not None:
            reason = (
                f"the run in {self.folder} has another value, and its optimizer another order of parameters"
            )
            raise UserError(reordering, f"{reason}; name another output or keep the value")
        self.loss_monitor.load_state_dict(state["watched"])
        stored = {key: state[key] for key in ("step", "finished_step", "best")}
        sizes = {"steps_per_epoch": steps_per_epoch}  # version 0.1.0 stores none
        evaluations = evaluations_since_best({**sizes, **state}, self.config.eval_every)
        self.position = dataclasses.replace(self.position, evaluations_since_best=evaluations, **stored)
        check_epoch(self.folder, state, self.position.epoch, self.position.epoch_step)
        state.clear()

    def finish_files(self) -> None:
        """Wait until all files are written, and retry those that could not be written.

        Raises:
            TrainingError: on every rank, if one cannot be written.
        """
        self.watchdog.report_progress("writing the last checkpoint")
        problem = call_on_main(lambda: self.writer.finish() or self.log.finish())
        if problem is not None:
            raise TrainingError(f"step {self.position.step}: {problem}; {describe_last(self.folder)}")
