"""Training images whose size is drawn anew for each step.

Source: Redmon and Farhadi, YOLO9000 (2017), section 2, multi-scale training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from data.loaders import (
    CollatedBatch,
    LoaderOptions,
    Sample,
    TrainingViews,
    TrainLoader,
    TrainSample,
    data_loader,
)
from data.samplers import Key, MicroBatches
from data.unreadable_images import UnreadableImages
from vil.runtime.seeding import seed_sequence

SizedKey = tuple[int, int, int, int]
"""A key of a view, and the index of its size."""


class RandomSizesLoader(TrainLoader):
    """Micro-batches whose image size is a function of (seed, epoch, step), equal on all ranks.

    Args:
        views: the views of each size.
        micro_batches, options, unreadable_images: as for `TrainLoader`.
    """

    def __init__(
        self,
        views: Sequence[TrainingViews],
        micro_batches: MicroBatches,
        options: LoaderOptions,
        unreadable_images: UnreadableImages,
    ) -> None:
        super().__init__(views[0], micro_batches, options, unreadable_images)
        self._sized_views = views

    @functools.cached_property
    def _loader(self) -> DataLoader[CollatedBatch]:
        batches = _SizedBatches(self.micro_batches, len(self._sized_views))
        return data_loader(_SizedViews(self._sized_views), self.options, batch_sampler=batches)


class _SizedViews(Dataset[object]):
    """The views of all sizes, by `SizedKey`."""

    def __init__(self, views: Sequence[TrainingViews]) -> None:
        self._views = views

    def __getitem__(self, key: SizedKey) -> Sample[TrainSample]:
        epoch, index, view, size = key
        return self._views[size][epoch, index, view]


class _SizedBatches(Sampler[list[SizedKey]]):
    """Micro-batches whose keys have the index of a size, the same one for all micro-batches of a step."""

    def __init__(self, micro_batches: MicroBatches, num_sizes: int) -> None:
        self._micro_batches, self._num_sizes = micro_batches, num_sizes

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[list[SizedKey]]:
        batches = self._micro_batches
        return self._with_sizes(iter(batches), batches.epoch, batches.start)

    def _with_sizes(self, keys: Iterator[list[Key]], epoch: int, start: int) -> Iterator[list[SizedKey]]:
        for index, micro_batch in enumerate(keys):
            step = start + index // self._micro_batches.accumulation
            seed = seed_sequence(self._micro_batches.seed, "image size", epoch, step)
            size = int(np.random.default_rng(seed).integers(self._num_sizes))
            yield [(*key, size) for key in micro_batch]
