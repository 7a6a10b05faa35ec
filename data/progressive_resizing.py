"""Progressive resizing: training images whose size changes in the course of a run.

Source: Howard, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html; Tan and Le, EfficientNetV2,
https://arxiv.org/abs/2104.00298, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from data.loaders import MicroBatchLoader
from data.to_device import Batch
from vil.runtime.epoch_steps import Phase, phase_at


class ProgressiveResizingLoader:
    """A loader for one image size and batch size after the other; both are functions of the epoch.

    Args:
        build: builds the loader of a phase.
        phases: the phases of the run.
    """

    def __init__(self, build: Callable[[Phase], MicroBatchLoader], phases: Sequence[Phase]) -> None:
        self._phases = phases
        self._build = build
        # All are built to find errors early; worker processes start with the first epoch.
        loaders = [build(phase) for phase in phases]
        self._phase, self._loader = phases[0], loaders[0]
        self.steps_per_epoch, self.num_images = self._loader.steps_per_epoch, self._loader.num_images

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch from step `start` on."""
        phase = phase_at(self._phases, epoch)
        if phase != self._phase:
            del self._loader  # ends its worker processes before others start
            self._phase, self._loader = phase, self._build(phase)
        return self._loader.epoch(epoch, start)

    def samples(self, epoch: int, step: int) -> list[str]:
        """Return the names of the images of one step's global batch, in an epoch of the current phase."""
        return self._loader.samples(epoch, step)
