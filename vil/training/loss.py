"""Losses of image classification, for class indices and for the soft targets of mixup and cutmix."""

from __future__ import annotations

import torch
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F

from vil.config import ScheduleConfig


class CrossEntropy(nn.Module):
    """Mean cross-entropy with label smoothing (Szegedy et al., Rethinking the Inception Architecture, 2016).

    Soft targets are not smoothed: mixup smooths them.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (B, classes) for targets (B,) int64 or (B, classes) float, a scalar."""
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def build_loss(schedule: ScheduleConfig) -> nn.Module:
    """Build the loss of `schedule`.

    bce without label smoothing sets the target of every class of a mixed image to 1, as DeiT III (Touvron et
    al., 2022, section 4); with smoothing, soft targets stay.
    """
    smoothing = schedule.label_smoothing
    if schedule.loss == "bce":
        return BinaryCrossEntropy(smoothing, target_threshold=None if smoothing else 0.0)
    return CrossEntropy(smoothing)
