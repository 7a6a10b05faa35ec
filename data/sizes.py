"""Training images whose size changes in the course of a run: small ones first are cheaper to learn from.

Source: Howard, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html; Tan and Le, EfficientNetV2,
https://arxiv.org/abs/2104.00298, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

from data.prefetch import Batch
from vil.config import ConfigError


class EpochLoader(Protocol):
    """Micro-batches, epoch by epoch, as `data.loaders.TrainLoader`."""

    steps_per_epoch: int
    num_images: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one epoch from step `start` on."""

    def samples(self, epoch: int, step: int) -> list[str]:
        """The images of one step's global batch."""


class SizedLoader:
    """A loader for each size in turn. Which one is a function of the epoch, as everything else is.

    Args:
        build: a loader of images of that side, in pixels.
        sizes: (fraction of the epochs, side): from where on each side holds; the first from 0.
        epochs: length of the run.

    Raises:
        ConfigError: the fractions do not rise from 0 to below 1, or what `build` raises, for any size.
    """

    def __init__(
        self, build: Callable[[int], EpochLoader], sizes: Sequence[tuple[float, int]], epochs: int
    ) -> None:
        self._firsts = first_epochs(sizes, epochs)
        self._build = build
        loaders = {side: build(side) for _, side in reversed(self._firsts)}  # processes start with an epoch
        self._side = self._firsts[0][1]
        self._loader = loaders[self._side]
        self.steps_per_epoch, self.num_images = self._loader.steps_per_epoch, self._loader.num_images

    def side(self, epoch: int) -> int:
        """The side of the images of an epoch, in pixels."""
        return next(side for first, side in reversed(self._firsts) if epoch >= first)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one epoch from step `start` on, of this epoch's size."""
        side = self.side(epoch)
        if side != self._side:
            del self._loader  # and its processes, before there are others
            self._side, self._loader = side, self._build(side)
        return self._loader.epoch(epoch, start)

    def samples(self, epoch: int, step: int) -> list[str]:
        """The images of one step's global batch, which do not depend on their size."""
        return self._loader.samples(epoch, step)


def first_epochs(sizes: Sequence[tuple[float, int]], epochs: int) -> list[tuple[int, int]]:
    """(First epoch, side) of every size, epochs counted from 0. Raises ConfigError as `SizedLoader`."""
    fractions = [fraction for fraction, _ in sizes]
    rising = all(one < next_one for one, next_one in pairwise(fractions))
    if not fractions or fractions[0] != 0 or not rising or not fractions[-1] < 1:
        reason = f"expected fractions of the epochs that rise from 0 to below 1, got {fractions}"
        raise ConfigError("schedule.sizes", reason)
    for _, side in sizes:
        if side < 1:
            raise ConfigError("schedule.sizes", f"expected sides of at least 1 pixel, got {side}")
    return [(math.ceil(fraction * epochs - 1e-9), side) for fraction, side in sizes]
