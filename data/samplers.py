"""Which images an optimiser step sees, and which of them a rank loads.

An epoch has `num_images // batch_size` steps; the incomplete last batch is dropped. Batch b of an epoch is
order[b·B : (b+1)·B] of an order that is a function of (seed, epoch) alone; ranks and accumulation only
divide it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from vil.config import ConfigError
from vil.randomness import seed_sequence

Key = tuple[int, int, int]
"""(epoch, index of the image, view): all that a sample of a run is a function of, besides the seed."""


class MicroBatches(Sampler[list[Key]]):
    """The keys of one rank's micro-batches, `accumulation` of them per step, for the chosen epoch.

    A batch is dealt out like cards: part p of P = world_size · accumulation takes its images p, p+P, p+2P,
    ...; part a·world_size + rank is micro-batch a of that rank.

    With repeated augmentation (Hoffer et al., https://arxiv.org/abs/1901.09335; as in DeiT) the views of an
    image follow each other in the order, so that they share a batch (or two, where `repeats` does not divide
    it) and spread over its parts. An epoch keeps its length, and sees 1/repeats of the images.

    Args:
        num_images: size of the training set.
        batch_size: images per optimiser step, over all ranks and micro-batches.
        accumulation: micro-batches per step and rank.
        seed: the run's seed.
        repeats: views of an image in a batch.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the batch cannot be divided so, or the training set is smaller than a batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for key, value in (("accumulation", accumulation), ("augment.repeats", repeats)):
            if value < 1:
                raise ConfigError(f"schedule.{key}", f"expected at least 1, got {value}")
        self.parts = world_size * accumulation
        if batch_size < 1 or batch_size % self.parts:
            nearest = max(round(batch_size / self.parts), 1) * self.parts
            raise ConfigError(
                "schedule.batch_size",
                f"{batch_size} images are not divisible by {world_size} (processes) × {accumulation} "
                f"(accumulation); {nearest} are",
            )
        if batch_size > num_images:
            raise ConfigError(
                "schedule.batch_size",
                f"{batch_size} is more than the {num_images} images of the training set",
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.repeats = repeats
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self.num_images // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of one micro-batch of one rank."""
        return self.batch_size // self.parts

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and views of an epoch, each (num_images,), over all ranks."""
        return epoch_order(self.seed, epoch, self.num_images, self.repeats)

    def images(self, epoch: int, step: int) -> list[int]:
        """Indices of the images of one step's global batch, of all ranks and parts."""
        indices, _ = self.order(epoch)
        return indices[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def choose(self, epoch: int, start: int = 0) -> None:
        """Sets what the next iteration yields: `epoch`, from its step `start` on."""
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"start must be one of the {self.steps_per_epoch} steps of an epoch, got {start}"
            )
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        return self._micro_batches(self.epoch, self.start)  # reads the choice now, not at the first draw

    def _micro_batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        indices, views = self.order(epoch)
        for step in range(start, self.steps_per_epoch):
            for micro_batch in range(self.accumulation):
                first = step * self.batch_size + micro_batch * self.world_size + self.rank
                part = slice(first, (step + 1) * self.batch_size, self.parts)
                yield [
                    (epoch, index, view) for index, view in zip(indices[part].tolist(), views[part].tolist())
                ]


def epoch_order(seed: int, epoch: int, num_images: int, repeats: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Indices and views of an epoch, each (num_images,), in the order in which steps take them."""
    images_seen = -(-num_images // repeats)
    indices = shuffled(seed, epoch, num_images)[:images_seen].repeat(repeats)[:num_images]
    return indices, np.arange(num_images) % repeats


def shuffled(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """All indices, (num_images,), in the order of an epoch."""
    return np.random.default_rng(seed_sequence(seed, "order", epoch)).permutation(num_images)


def following(seed: int, epoch: int, num_images: int, index: int) -> Iterator[int]:
    """The indices after `index` in the order of an epoch, around its end, each of the others once."""
    order = shuffled(seed, epoch, num_images)
    place = int(np.flatnonzero(order == index)[0])
    yield from order[place + 1 :].tolist()
    yield from order[:place].tolist()
