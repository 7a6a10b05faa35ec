"""Progressive resizing: training images whose size changes in the course of a run.

Source: Howard, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html; Tan and Le, EfficientNetV2,
https://arxiv.org/abs/2104.00298, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from data.loaders import MicroBatchLoader
from data.to_device import Batch
from vil.config import Size


class ProgressiveResizingLoader:
    """A loader for one image size after the other; the size is a function of the epoch.

    Args:
        build: builds a loader of images of a size: (height, width) in pixels, or one number for both.
        plan: (fraction of the epochs, size) for each size: the first epoch that has it.
        epochs: length of the run.
    """

    def __init__(
        self,
        build: Callable[[int | Size], MicroBatchLoader],
        plan: Sequence[tuple[float, int | Size]],
        epochs: int,
    ) -> None:
        self._starts = start_epochs(plan, epochs)
        self._build = build
        # All sizes are built to find errors early; worker processes start with the first epoch.
        loaders = {size: build(size) for _, size in reversed(self._starts)}
        self._size = self._starts[0][1]
        self._loader = loaders[self._size]
        self.steps_per_epoch, self.num_images = self._loader.steps_per_epoch, self._loader.num_images

    def size(self, epoch: int) -> int | Size:
        """Return the size of the images of an epoch, as in the plan."""
        return next(size for first, size in reversed(self._starts) if epoch >= first)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch from step `start` on."""
        size = self.size(epoch)
        if size != self._size:
            del self._loader  # ends its worker processes before others start
            self._size, self._loader = size, self._build(size)
        return self._loader.epoch(epoch, start)

    def samples(self, epoch: int, step: int) -> list[str]:
        """Return the names of the images of one step's global batch."""
        return self._loader.samples(epoch, step)


def start_epochs(plan: Sequence[tuple[float, int | Size]], epochs: int) -> list[tuple[int, int | Size]]:
    """Return (first epoch, size) of every size; epochs count from 0."""
    return [(math.ceil(fraction * epochs - 1e-9), size) for fraction, size in plan]
