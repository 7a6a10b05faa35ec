"""Mixup and CutMix on batches, drawn as a function of the step.

Mixup: https://arxiv.org/abs/1710.09412. CutMix: https://arxiv.org/abs/1905.04899. Both are timm's.
"""

from __future__ import annotations

import timm.data
from torch import Tensor

from vil.config import AugmentConfig
from vil.errors import UserError
from vil.runtime.seeding import seeded


class Mixing:
    """Mix each image of a batch with the image at the mirrored index, and their targets with the same weight.

    The draws are a function of (seed, step, rank, micro-batch). Without mixup and CutMix, and from epoch
    `mixup_until` on, a batch is returned unchanged, and label smoothing is left to the loss.

    Args:
        augment: the options `mixup*` and `cutmix`.
        num_classes: number of classes.
        label_smoothing: probability mass spread over all classes in the soft targets.
        seed: the run's seed.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, label_smoothing: float, seed: int) -> None:
        self.enabled = is_mixing_enabled(augment)
        self.until = augment.mixup_until
        self.seed = seed
        self._mixup = timm.data.Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            cutmix_minmax=augment.cutmix_minmax,
            prob=augment.mixup_prob,
            switch_prob=augment.mixup_switch_prob,
            mode=augment.mixup_mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, targets: Tensor, *, step: int, rank: int, part: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Mix micro-batch `part` of a step in place.

        Args:
            images: (B, C, H, W), on any device; B must be even.
            targets: (B,) class indices.
            step: optimizer step of the run.
            rank: rank of this process.
            part: index of the micro-batch in the step.
            epoch: current epoch, to be compared with `mixup_until`.

        Returns:
            The images and the targets: (B, num_classes) probabilities if mixing is on, else unchanged.
        """
        if not self.enabled or (self.until is not None and epoch >= self.until):
            return images, targets
        check_even_batch(len(images))
        with seeded(self.seed, "mixing", step, rank, part):
            return self._mixup(images, targets)


def is_mixing_enabled(augment: AugmentConfig) -> bool:
    """Return True if mixup or CutMix is on."""
    return augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None


def check_even_batch(micro_batch_size: int) -> None:
    """Raise UserError if a micro-batch cannot be mixed in pairs."""
    if micro_batch_size % 2:
        reason = f"mixup and cutmix mix pairs, but micro-batches would have {micro_batch_size} images"
        advice = "change schedule.batch_size or schedule.accumulation, or switch them off"
        raise UserError("schedule.batch_size", f"{reason}; {advice}")
