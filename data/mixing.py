"""Mixup and CutMix on batches, drawn as a function of the step.

Mixup: https://arxiv.org/abs/1710.09412. CutMix: https://arxiv.org/abs/1905.04899. Both are timm's.
"""

from __future__ import annotations

import timm.data
from torch import Tensor

from data.randomness import seeded
from vil.config import AugmentConfig, ConfigError


class Mixing:
    """Mixes each image of a batch with its mirror place, the first with the last, and their targets alike.

    The draws are a function of (seed, step, rank, part). Without mixup and cutmix, and from epoch
    `mixup_until` on, a batch passes unchanged, and smoothing its labels is left to the loss.

    Args:
        augment: the options `mixup*` and `cutmix`.
        num_classes: number of classes.
        label_smoothing: probability mass spread over all classes in the soft targets.
        seed: the run's seed.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, label_smoothing: float, seed: int) -> None:
        for field in ("mixup", "cutmix"):
            alpha = getattr(augment, field)
            if alpha != 0 and not 1e-6 <= alpha <= 1e6:  # beyond, the Beta distribution draws nan
                raise ConfigError(f"schedule.augment.{field}", "expected 1e-6 to 1e6, or 0 for off")
        for field in ("mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(augment, field) <= 1:
                raise ConfigError(f"schedule.augment.{field}", "expected a probability in [0, 1]")
        if augment.mixup_until is not None and augment.mixup_until < 0:
            raise ConfigError("schedule.augment.mixup_until", "expected an epoch, at least 0, or null")
        self.enabled = mixes(augment)
        self.until = augment.mixup_until
        self.seed = seed
        self._mixup = timm.data.Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            prob=augment.mixup_prob,
            switch_prob=augment.mixup_switch_prob,
            mode=augment.mixup_mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(
        self, images: Tensor, targets: Tensor, *, step: int, rank: int, part: int, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Mixes one micro-batch, in place.

        Args:
            images: (B, C, H, W), on any device; B must be even.
            targets: (B,) class indices.
            step: the optimiser step of the run.
            rank: of this process.
            part: which micro-batch of the step.
            epoch: decides whether mixing is still on.

        Returns:
            The images, and the targets: (B, num_classes) probabilities where mixing is on, else as they came.
        """
        if not self.enabled or (self.until is not None and epoch >= self.until):
            return images, targets
        check_pairs(len(images))
        with seeded(self.seed, "mixing", step, rank, part):
            return self._mixup(images, targets)


def mixes(augment: AugmentConfig) -> bool:
    """Whether the recipe mixes images at all."""
    return augment.mixup > 0 or augment.cutmix > 0


def check_pairs(micro_batch_size: int) -> None:
    """Raises ConfigError where a micro-batch cannot be mixed in pairs."""
    if micro_batch_size % 2:
        raise ConfigError(
            "schedule.batch_size",
            f"mixup and cutmix mix pairs, but each process would get an odd number of images at a time, "
            f"{micro_batch_size}; change it, schedule.accumulation, or set both to 0",
        )
