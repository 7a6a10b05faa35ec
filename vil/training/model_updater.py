"""Forward and backward passes, the optimizer step, and the moving average of the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn

from vil.checkpoints.training_state import State
from vil.config import TrainConfig
from vil.errors import UserError
from vil.runtime.compiler import check_compiler
from vil.runtime.distributed import Process, all_reduce_sum, average_over_ranks, data_parallel
from vil.runtime.epoch_steps import EpochSteps, phase_at, training_phases
from vil.runtime.precision import autocast, choose_precision, grad_scaler
from vil.training.compilation import check_compile_options, compile_network
from vil.training.distillation import DistillationLoss, Teacher, set_distilled_training
from vil.training.loss import build_loss, image_weights
from vil.training.non_finite import NonFiniteSkipper, batch_norm_buffers, loss_grad
from vil.training.optimizer import (
    build_optimizer,
    build_scheduler,
    clipped_parameters,
    learning_rate_factor,
    load_optimizer_state,
)
from vil.training.trainable import PartialTraining


class ModelUpdater:
    """Accumulate gradients and update the weights, in the precision and on the ranks of a run.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); moved to the device, set to train mode (but
            for what `schedule.trainable` freezes), trained in place.
        config: the resolved configuration.
        process: rank and device of this process.
        epoch_steps: optimizer steps of each epoch.
        class_weights: weight of each logit in the loss; None for equal weights.
        teacher: the teacher of `schedule.distillation`.

    Raises:
        UserError: an option does not fit the model or the device.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        process: Process,
        epoch_steps: EpochSteps,
        class_weights: list[float] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        schedule = config.schedule
        self._config, self._process = config, process
        check_compile_options(config)
        if config.compile:
            check_compiler(process.device, config.compile_backend)
        self.precision = choose_precision(config.precision, process.device)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(process.device).to(memory_format=memory_format)
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(model)
        self._part = PartialTraining(model, schedule.trainable)
        self._part.set_training_mode()
        self._optimizer = build_optimizer(model, schedule)
        self._scheduler = build_scheduler(self._optimizer, schedule, epoch_steps)
        self._epoch_steps = epoch_steps
        self._phases = training_phases(schedule, config.model.size)
        if schedule.scale_lr_with_batch_size and len({phase.batch_size for phase in self._phases}) == 1:
            reason = "needs different batch sizes in schedule.progressive_resizing"
            raise UserError("schedule.scale_lr_with_batch_size", reason)
        self._scaler = grad_scaler(self.precision, process.device)
        self._class_weights: torch.Tensor | None = None
        if class_weights is not None:
            self._class_weights = torch.tensor(class_weights, device=process.device)
        self._weight = torch.zeros((), device=process.device)  # mean weight of the images of this rank
        self._loss = build_loss(schedule, self._class_weights)
        self._teacher = teacher
        if teacher is not None:
            self._loss = DistillationLoss(self._loss, schedule, self._class_weights)
            set_distilled_training(model, True)
        elif schedule.distillation != "none":
            raise UserError("schedule.distillation", f"{schedule.distillation} needs a teacher")
        self._skipper = NonFiniteSkipper(self._optimizer, model)
        self._clipped_parameters = clipped_parameters(model, schedule.clip_mode)
        # Not those of frozen layers, which an average would round.
        self._running_averages = [
            x for x in batch_norm_buffers(model, training=True) if x.is_floating_point()
        ]
        self.ema: ModelEmaV3 | None = None
        if schedule.ema_decay is not None:
            # Average the running statistics like weights; copy any other buffer (a random projection).
            copies_buffers = not self._running_averages
            self.ema = ModelEmaV3(
                model, schedule.ema_decay, use_warmup=schedule.ema_warmup, exclude_buffers=copies_buffers
            )
        self._network: nn.Module = model

    def wrap_network(self) -> None:
        """Wrap the model for several ranks and compile it; call it after `load_state_dict`.

        Only forward passes of training use the wrapper: checkpoints and evaluation use the bare model.
        """
        config, process = self._config, self._process
        if process.world_size > 1:
            shape = (config.model.in_chans, *config.model.size)
            with autocast(self.precision, process.device):  # its passes compile kernels of this precision
                self._network = data_parallel(self.model, process, shape)
        if config.compile:
            if self._teacher is not None:
                self._teacher.compile(config)
            self._network = compile_network(self._network, config)

    def unfreeze(self) -> None:
        """Let the parameters that `schedule.trainable` froze require gradients again, after the run.

        A model with a distillation head returns the mean of its heads again.
        """
        self._part.restore()
        set_distilled_training(self.model, False)

    def begin_step(self, step: int, learning_rate: float | None = None) -> None:
        """Set the learning rate of `step`, counted from 0: that of the schedule, unless one is given."""
        self._set_learning_rates(step)
        if learning_rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._skipper.save_statistics()

    def _set_learning_rates(self, step: int) -> None:
        self._scheduler.step_update(self._epoch_steps.scheduled_time(step))  # type: ignore[arg-type]
        schedule = self._config.schedule
        if schedule.scale_lr_with_batch_size:
            batch_size = phase_at(self._phases, self._epoch_steps.locate(step)[0]).batch_size
            factor = learning_rate_factor(schedule, batch_size / schedule.batch_size)
            for group in self._optimizer.param_groups:
                group["lr"] *= factor

    def accumulate(self, images: torch.Tensor, targets: torch.Tensor, part: int) -> torch.Tensor:
        """Add the gradients of one micro-batch.

        Args:
            images: (B, C, H, W), on the device.
            targets: (B,) class indices, or (B, classes) probabilities.
            part: index of the micro-batch in the step.

        Returns:
            The share of the micro-batch in the loss of this rank, a scalar; `update` normalizes it.
        """
        parts = self._config.schedule.accumulation
        with self._gradient_sync(is_last=part == parts - 1):
            with autocast(self.precision, self._process.device):
                teacher_logits = () if self._teacher is None else (self._teacher(images),)
                loss = self._loss(self._network(images), targets, *teacher_logits) / parts
            self._scaler.scale(loss).backward(loss_grad(loss))
        if self._class_weights is not None:
            self._weight += image_weights(targets, self._class_weights).mean() / parts
        return loss.detach()

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """Return a context in which the gradients are all-reduced with the last micro-batch only."""
        if is_last or self._process.world_size == 1:
            return nullcontext()
        return self._network.no_sync()  # type: ignore[operator]

    def update(self, step: int, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clip the gradients, step the optimizer unless they are not finite, and average the weights.

        Args:
            step: of the run, counted from 0.
            loss: sum of the shares of the micro-batches of this rank, a scalar.

        Returns:
            The normalized loss of this rank, the norm of the gradient before clipping, and True if it is
            finite: scalars on the device. Norm and flag are equal on all ranks.
        """
        schedule = self._config.schedule
        self._scaler.unscale_(self._optimizer)
        if self._class_weights is not None:
            loss = self._normalize(loss)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        is_finite = norm.isfinite()
        if schedule.clip_grad is not None and schedule.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(self._clipped_parameters, schedule.clip_grad, norm)
        elif schedule.clip_grad is not None:
            dispatch_clip_grad(self._clipped_parameters, schedule.clip_grad, schedule.clip_mode)
        self._skipper.step(is_finite)
        average_over_ranks(self._running_averages)  # in every step: a checkpoint holds one set of them
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step=step + 1)
        return loss, norm, is_finite

    def _normalize(self, loss: torch.Tensor) -> torch.Tensor:
        """Divide the gradients and the loss by the mean weight of the images of the global batch."""
        mean_weight = all_reduce_sum(self._weight) / self._process.world_size
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(mean_weight)
        self._weight = torch.zeros_like(mean_weight)
        return loss / mean_weight

    def models(self) -> dict[str, nn.Module]:
        """Return the model and, if there is one, the model of the averaged weights, by kind: raw, ema."""
        return {"raw": self.model} | ({} if self.ema is None else {"ema": self.ema.module})

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> State:
        """Return the entries `model`, `ema`, `optimizer` and `scaler` of a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Load the entries that `state_dict` returned; the options of the optimizer are the configuration's.

        Raises:
            RuntimeError, ValueError, TypeError, AttributeError, LookupError: of PyTorch, if they do not fit.
        """
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self._optimizer, state["optimizer"])
        if state["step"]:
            self._set_learning_rates(state["step"] - 1)  # for a checkpoint that no further step precedes
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        reason = f"{type(model).__name__} does not support it"
        raise UserError("gradient_checkpointing", reason) from None
