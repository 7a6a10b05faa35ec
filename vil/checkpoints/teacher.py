"""The teacher of a distillation: a trained model from any file that `open_weights` reads, or from timm."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import read_published_config
from vil.checkpoints.weights import Weights, timm_weights
from vil.config import ModelConfig, ScheduleConfig, Size
from vil.errors import UserError, errors_in_option
from vil.models.timm_models import pretrained_classes, pretrained_image_size
from vil.runtime.consistency import model_digest
from vil.validation import PRETRAINED, TIMM_PREFIX


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher, and how its images were prepared.

    Attributes:
        model: maps images (B, in_chans, H, W) to logits (B, classes); in eval mode, without gradients.
        name: `schedule.teacher`, with the name of its model.
        image_size: (H, W) of its images, in pixels.
        in_chans: channels of its images.
        mean, std: of each channel, for values in 0..1.
        class_names: names of the classes in the order of the logits; None if unknown.
        num_classes: number of logits.
        digest: SHA-256 of the weights and of how images are prepared.
    """

    model: nn.Module
    name: str
    image_size: Size
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None
    num_classes: int
    digest: str


def load_teacher(schedule: ScheduleConfig) -> TrainedTeacher:
    """Load the teacher that `schedule.teacher` names.

    Raises:
        UserError: there is none, it cannot be read, does not describe its model, or options do not go
            together.
    """
    name = schedule.teacher
    if name is None:
        raise UserError("schedule.teacher", f"is needed for schedule.distillation {schedule.distillation}")
    if name.startswith(TIMM_PREFIX):
        weights, config = _timm_weights(name, schedule)
    else:
        weights, config = _stored_weights(name, schedule)
    with errors_in_option("schedule.teacher"):
        model = weights.empty_model(config)
        weights.load_into(model, config.size)
        weights.describe(model, config.size, config.in_chans)
    cfg = model.pretrained_cfg
    mean, std = (tuple(map(float, cfg[key])) for key in ("mean", "std"))  # type: ignore[index]
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    return TrainedTeacher(
        model.eval().requires_grad_(False),
        name if name == config.name else f"{name} ({config.name})",
        config.size,
        config.in_chans,
        mean,
        std,
        weights.class_names,
        num_classes,
        model_digest(model, f"{config.size} {mean} {std}"),
    )


def _stored_weights(name: str, schedule: ScheduleConfig) -> tuple[Weights, ModelConfig]:
    """Return the weights of a file or a run, and the model that they describe."""
    if schedule.teacher_weights is not None:
        raise UserError("schedule.teacher_weights", f"is for a teacher {TIMM_PREFIX}<name>, not for {name}")
    published = None
    if schedule.teacher_released_config is not None:
        with errors_in_option("schedule.teacher_released_config"):
            published = read_published_config(schedule.teacher_released_config)
    with errors_in_option("schedule.teacher"):
        weights = open_weights(name, published)
        return weights, weights.require_model("schedule.teacher_released_config, or timm/<name>")


def _timm_weights(name: str, schedule: ScheduleConfig) -> tuple[Weights, ModelConfig]:
    """Return weights of a model of timm, from a file or downloaded, and the model."""
    source = schedule.teacher_weights
    if source is None:
        reason = f"is needed for {name}: a file, or {PRETRAINED} on the command line"
        raise UserError("schedule.teacher_weights", reason)
    if schedule.teacher_released_config is not None:
        raise UserError("schedule.teacher_released_config", f"is not for a teacher {TIMM_PREFIX}<name>")
    with errors_in_option("schedule.teacher"):
        config = ModelConfig(name=name, image_size=pretrained_image_size(name))
        if source == PRETRAINED:
            start = replace(config, num_classes=pretrained_classes(name), timm_options={"pretrained": True})
            weights = timm_weights(start)
            assert weights is not None
            return weights, replace(config, num_classes=start.num_classes)
    with errors_in_option("schedule.teacher_weights"):
        weights = open_weights(source)
        if weights.model is not None and weights.model.name != name:
            raise UserError(weights.path, f"holds a model {weights.model.name}, not {name}")
    return weights, weights.model or config
