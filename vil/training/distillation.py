"""Distillation from a teacher (DeiT: Touvron et al., Training data-efficient image transformers, 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.checkpoints.teacher import TrainedTeacher, load_teacher
from vil.config import ScheduleConfig, TrainConfig, format_size
from vil.errors import UserError
from vil.runtime.class_names import match_classes
from vil.runtime.distributed import Process, all_reduce_sum, broadcast_object, call_on_all
from vil.training.compilation import compile_network
from vil.training.loss import image_weights


class Teacher:
    """Compute the logits of a teacher for the images of its student.

    The images are renormalized with the teacher's mean and standard deviation, and resized to its image size
    (bicubic, antialiased).

    Args:
        trained: the teacher; its model is on `device`.
        mean, std: of the student's images, one per channel.
        class_names: classes of the student, matched by name with those of the teacher.
        device: of the images.

    Raises:
        UserError: the teacher expects another number of channels, or lacks a class.
    """

    def __init__(
        self,
        trained: TrainedTeacher,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str],
        device: torch.device,
    ) -> None:
        if trained.in_chans != len(mean):
            reason = f"is for images of {trained.in_chans} channels, the data has {len(mean)}"
            raise UserError("schedule.teacher", reason)
        are_numbers = all(name.isdecimal() for name in class_names)
        if trained.class_names is None and are_numbers and len(class_names) < trained.num_classes:
            reason = f"has {trained.num_classes} classes without names, which cannot be matched with numbers"
            raise UserError("schedule.teacher", reason)
        try:
            indices = match_classes(class_names, trained.class_names, trained.num_classes, hint="")
        except UserError as error:
            raise UserError("schedule.teacher", error.reason) from None
        if indices is None:
            indices = list(range(len(class_names)))  # without logits beyond the classes
        self.trained = trained
        self._network: nn.Module = trained.model
        self._logit_indices = torch.tensor(indices, device=device)
        self._has_same_normalization = (tuple(mean), tuple(std)) == (trained.mean, trained.std)
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(values, device=device)[:, None, None]  # (C, 1, 1)
            for values in (mean, std, trained.mean, trained.std)
        )
        self._scale, self._shift = old_std / new_std, (old_mean - new_mean) / new_std

    def compile(self, config: TrainConfig) -> None:
        """Compile the teacher as the student, in one graph: its images have one size."""
        self._network = compile_network(self._network, config)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes of the student) of the student's images (B, C, H, W)."""
        logits: Tensor = self._network(self.preprocess(images))
        return logits[:, self._logit_indices]

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalize and resize the student's images (B, C, H, W) for the teacher: (B, C, H', W')."""
        if not self._has_same_normalization:
            images = images * self._scale + self._shift
        size = self.trained.image_size
        if images.shape[2:] == size:
            return images
        return F.interpolate(images, size, mode="bicubic", antialias=True)


def build_teacher(config: TrainConfig, class_names: Sequence[str], process: Process) -> Teacher | None:
    """Load the teacher of a run on every rank; return None without distillation.

    Raises:
        UserError: on every rank, if the ranks loaded different weights; or as `load_teacher` and
            `Teacher`, or options that do not go together.
    """
    schedule, data = config.schedule, config.data
    if schedule.distillation == "none":
        for option in ("teacher", "teacher_weights", "teacher_released_config"):
            if getattr(schedule, option) is not None:
                raise UserError(f"schedule.{option}", "requires schedule.distillation soft or hard")
        if schedule.distillation_alpha != ScheduleConfig.distillation_alpha:
            reason = "requires schedule.distillation soft or hard"
            raise UserError("schedule.distillation_alpha", reason)
    default = ScheduleConfig.distillation_temperature
    if schedule.distillation != "soft" and schedule.distillation_temperature != default:
        raise UserError("schedule.distillation_temperature", "requires schedule.distillation soft")
    if schedule.distillation == "none":
        return None
    trained = call_on_all(lambda: load_teacher(schedule))
    differs = torch.tensor(float(trained.digest != broadcast_object(trained.digest)))
    if all_reduce_sum(differs):
        raise UserError(
            "schedule.teacher", "the ranks loaded different weights; copy the same file to all machines"
        )
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    trained.model.to(process.device).to(memory_format=memory_format)
    mean, std = data.mean, data.std
    if config.model.in_chans == 1:  # as images are normalized
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)  # type: ignore[assignment]
    return Teacher(trained, mean, std, class_names, process.device)


def describe_teacher(teacher: Teacher, schedule: ScheduleConfig) -> str:
    """Return the line about the teacher that is printed at the start of a run."""
    trained = teacher.trained
    parameters = sum(p.numel() for p in trained.model.parameters()) / 1e6
    line = f"teacher: {trained.name}, {format_size(trained.image_size)} pixels, {parameters:.2f} M parameters"
    line += f", {schedule.distillation}, alpha {schedule.distillation_alpha:g}"
    is_soft = schedule.distillation == "soft"
    return f"{line}, temperature {schedule.distillation_temperature:g}" if is_soft else line


def set_distilled_training(model: nn.Module, enable: bool) -> None:
    """Let a model with a distillation head return the logits of both heads in train mode, as in timm."""
    set_mode = getattr(model, "set_distilled_training", None)
    if set_mode is not None and getattr(model, "head_dist", True) is not None:
        set_mode(enable)


class DistillationLoss(nn.Module):
    """Sum of the loss of the labels and of the teacher's, weighted 1 - alpha and alpha (DeiT, section 4).

    The teacher's loss of an image is, for `hard`, the cross-entropy with its most probable class, and for
    `soft` τ² KL(teacher ‖ student), both at temperature τ (Hinton et al., 2015). The mean is over images;
    DeiT's code divides the soft loss by the number of classes too. Labels of the teacher are not smoothed.
    With a distillation head, the teacher's loss is that of its logits. Class weights multiply both losses of
    an image; see `vil.training.loss.image_weights`.

    Args:
        label_loss: the loss of the labels.
        schedule: the options `distillation...`.
        class_weights: (classes,) on the device of the logits; None for equal weights.
    """

    def __init__(
        self, label_loss: nn.Module, schedule: ScheduleConfig, class_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.label_loss = label_loss
        self.is_soft = schedule.distillation == "soft"
        self.alpha, self.temperature = schedule.distillation_alpha, schedule.distillation_temperature
        self.class_weights = class_weights

    def forward(
        self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor, teacher_logits: Tensor
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            outputs: the student's logits (B, classes), or those of its head and of its distillation head.
            targets: (B,) class indices, or (B, classes) probabilities.
            teacher_logits: (B, K); further classes of the student have probability 0 for the teacher.
        """
        logits, student = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        losses = self._teacher_losses(_at_least_float32(student), _at_least_float32(teacher_logits))  # (B,)
        if self.class_weights is not None:
            losses = losses * image_weights(targets, self.class_weights)
        loss: Tensor = (1 - self.alpha) * self.label_loss(logits, targets) + self.alpha * losses.mean()
        return loss

    def _teacher_losses(self, student: Tensor, teacher: Tensor) -> Tensor:
        if not self.is_soft:
            return F.cross_entropy(student, teacher.argmax(dim=1), reduction="none")
        teacher_log_probs = F.log_softmax(teacher / self.temperature, dim=1)
        student_log_probs = F.log_softmax(student / self.temperature, dim=1)
        student_log_probs = student_log_probs[:, : teacher_log_probs.shape[1]]  # (B, K)
        divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
        return self.temperature**2 * divergence.sum(dim=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
