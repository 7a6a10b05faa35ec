"""Losses of image classification, for class indices and for the soft targets of mixup and cutmix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy
from torch import nn
from torch.nn import functional as F

from vil.config import ScheduleConfig
from vil.errors import UserError

JSD_ALPHA = 12
"""Weight of the Jensen-Shannon divergence (Hendrycks et al., AugMix, 2020, section 3)."""


class CrossEntropy(nn.Module):
    """Mean cross-entropy with label smoothing (Szegedy et al., Rethinking the Inception Architecture, 2016).

    Soft targets are not smoothed: mixup smooths them. `class_weights`, (classes,), weight the terms of the
    sum over classes as in `torch.nn.CrossEntropyLoss`, but the sum over images is divided by their number,
    not by their weights: see `image_weights`.
    """

    def __init__(self, label_smoothing: float, class_weights: torch.Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (B, classes) for targets (B,) int64 or (B, classes) float, a scalar."""
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing
        if self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        losses = F.cross_entropy(  # in float32: the weights would be rounded to the type of the logits
            logits.float(), targets, self.class_weights, label_smoothing=smoothing, reduction="none"
        )
        return losses.mean()


class WeightedBinaryCrossEntropy(nn.Module):
    """timm's binary cross-entropy, with the loss of an image multiplied by its weight; see `image_weights`.

    The sum over images is divided by their number, not by their weights.
    """

    def __init__(self, smoothing: float, target_threshold: float | None, class_weights: torch.Tensor) -> None:
        super().__init__()
        self.loss = BinaryCrossEntropy(smoothing, target_threshold, reduction="none")
        self.class_weights = class_weights

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (B, classes) for targets (B,) int64 or (B, classes) float, a scalar."""
        losses = self.loss(logits, targets).mean(dim=1)  # (B, classes) -> (B,)
        return (losses * image_weights(targets, self.class_weights)).mean()


def build_loss(schedule: ScheduleConfig, class_weights: torch.Tensor | None = None) -> nn.Module:
    """Build the loss of `schedule`, with weights of the classes, (classes,), on the device of the logits.

    bce without label smoothing sets the target of every class of a mixed image to 1, as DeiT III (Touvron et
    al., 2022, section 4); with smoothing, soft targets stay. `bce_threshold` replaces both rules.

    With `augment.aug_splits` above 1, the loss is the cross-entropy of the first views plus `JSD_ALPHA` times
    the Jensen-Shannon divergence of all S views, for logits (S·B, classes), view by view, and targets (B,).

    Raises:
        UserError: options that do not go together.
    """
    smoothing = schedule.label_smoothing
    threshold = schedule.bce_threshold
    if threshold is not None and schedule.loss != "bce":
        raise UserError("schedule.bce_threshold", "needs schedule.loss bce")
    if schedule.augment.aug_splits > 1:
        if schedule.loss != "cross_entropy":
            raise UserError("schedule.loss", "schedule.augment.aug_splits needs cross_entropy")
        if class_weights is not None:
            raise UserError("schedule.class_weights", "cannot be combined with schedule.augment.aug_splits")
        if schedule.distillation != "none":
            raise UserError("schedule.distillation", "cannot be combined with schedule.augment.aug_splits")
        return JsdCrossEntropy(schedule.augment.aug_splits, JSD_ALPHA, smoothing)
    match schedule.loss:
        case "cross_entropy":
            return CrossEntropy(smoothing, class_weights)
        case "bce":
            if threshold is None and not smoothing:
                threshold = 0.0
            if class_weights is None:
                return BinaryCrossEntropy(smoothing, target_threshold=threshold)
            return WeightedBinaryCrossEntropy(smoothing, threshold, class_weights)


def image_weights(targets: torch.Tensor, class_weights: torch.Tensor) -> torch.Tensor:
    """Return the weight of each image, (B,): of its class, or the mean under its soft target.

    A weighted loss is normalized by the sum of these weights over the global batch;
    `vil.training.model_updater` divides by it once all micro-batches are known. `torch.nn.CrossEntropyLoss`
    does so for class indices only, and divides by the number of images for soft targets.

    Args:
        targets: (B,) class indices, or (B, classes) probabilities.
        class_weights: (classes,), float32.
    """
    if not targets.is_floating_point():
        return class_weights[targets]
    return (targets.float() * class_weights).sum(dim=1)  # autocast computes `@` in 16 bits


def class_weights(
    weights: str | Sequence[float], class_counts: Sequence[int], num_logits: int
) -> list[float] | None:
    """Return the weight of each logit, or None if all are equal.

    balanced is n / (classes · count), over the classes that have training images: the mean over the training
    images is 1. Classes without training images, and logits beyond the classes of the data, have weight 1.

    Args:
        weights: `schedule.class_weights`.
        class_counts: training images of each class.
        num_logits: outputs of the model.

    Raises:
        UserError: a list of another length than the number of classes.
    """
    if weights == "none":
        return None
    if weights == "balanced":
        num_present = sum(count > 0 for count in class_counts)
        found = [sum(class_counts) / (num_present * count) if count else 1.0 for count in class_counts]
    elif len(weights) != len(class_counts):
        reason = f"{len(weights)} weights, the data has {len(class_counts)} classes"
        raise UserError("schedule.class_weights", reason)
    else:
        found = list(map(float, weights))
    return found + [1.0] * (num_logits - len(found))
