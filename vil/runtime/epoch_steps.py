"""The epochs of a run and their steps, whose number changes with the batch size.

Steps and epochs are counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vil.config import ScheduleConfig, Size


@dataclass(frozen=True)
class Phase:
    """Epochs with the same training images and batches, from `first_epoch` on.

    Attributes:
        first_epoch: index of the first epoch.
        image_size: height and width in pixels, or one number for both.
        batch_size: global batch size.
    """

    first_epoch: int
    image_size: int | Size
    batch_size: int


def training_phases(schedule: ScheduleConfig, image_size: int | Size) -> list[Phase]:
    """Return the phases of `schedule.progressive_resizing`, or one with `image_size`.

    The fractions are those of `schedule.epochs`. A batch size counts from its phase on.
    """
    phases: dict[int, Phase] = {}
    batch_size = schedule.batch_size
    for fraction, size, *batch_sizes in schedule.progressive_resizing or [(0.0, image_size)]:
        batch_size = batch_sizes[0] if batch_sizes else batch_size
        first = math.ceil(fraction * schedule.epochs - 1e-9)
        phases[first] = Phase(first, size, batch_size)  # replaces one that would have no epoch
    return list(phases.values())


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """Return the phase of an epoch."""
    return next(phase for phase in reversed(phases) if epoch >= phase.first_epoch)


@dataclass(frozen=True)
class EpochSteps:
    """Number of optimizer steps of each epoch.

    Attributes:
        parts: (first epoch, steps per epoch), in the order of the epochs; the first begins with epoch 0.
    """

    parts: tuple[tuple[int, int], ...]

    @classmethod
    def constant(cls, steps: int) -> EpochSteps:
        """Return epochs that all have this number of steps."""
        return cls(((0, steps),))

    def steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch."""
        return next(steps for first, steps in reversed(self.parts) if epoch >= first)

    def first_step(self, epoch: int) -> int:
        """Return the first step of an epoch, which is the number of steps before it."""
        ends = [first for first, _ in self.parts[1:]] + [epoch]
        return sum(steps * max(0, min(end, epoch) - first) for (first, steps), end in zip(self.parts, ends))

    def locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the index of the step in it."""
        first, steps = next(part for part in reversed(self.parts) if step >= self.first_step(part[0]))
        epochs, index = divmod(step - self.first_step(first), steps)
        return first + epochs, index

    def scheduled_time(self, step: int) -> float:
        """Return the time of a step in units of the first epoch's steps: `step`, if all epochs are equal.

        It rises linearly within each epoch, and by the same amount in each.
        """
        if len(self.parts) == 1:
            return step
        epoch, index = self.locate(step)
        return self.steps(0) * (epoch + index / self.steps(epoch))


def count_epoch_steps(phases: Sequence[Phase], steps_per_epoch: int, train_images: int) -> EpochSteps:
    """Return the steps of the epochs of a run.

    Args:
        phases: of `training_phases`.
        steps_per_epoch: steps of the first epoch.
        train_images: number of training images.
    """
    if len({phase.batch_size for phase in phases}) == 1:
        return EpochSteps.constant(steps_per_epoch)
    return EpochSteps(tuple((phase.first_epoch, train_images // phase.batch_size) for phase in phases))
