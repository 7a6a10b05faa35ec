"""The images of each optimizer step, and their division among ranks and micro-batches.

An epoch has `num_images // batch_size` steps; the incomplete last batch is dropped. Batch b of an epoch is
order[b·B : (b+1)·B] of an order that is a function of (seed, epoch) alone; ranks and gradient accumulation
only divide the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from vil.config import UserError
from vil.runtime.seeding import seed_sequence

Key = tuple[int, int, int]
"""(epoch, image index, view): with the seed, these determine a training sample."""


@dataclass(eq=False)
class MicroBatches(Sampler[list[Key]]):
    """The keys of one rank's micro-batches, `accumulation` per step, for the epoch chosen by `set_epoch`.

    A batch is divided round-robin: part p of P = world_size · accumulation takes its images p, p+P, p+2P,
    ...; part a·world_size + rank is micro-batch a of that rank.

    With repeated augmentation (Hoffer et al., https://arxiv.org/abs/1901.09335; as in DeiT) the views of an
    image follow each other in the order: they share a batch (or two, if `repeats` does not divide it) and
    spread over its parts. An epoch keeps its length and sees 1/repeats of the images.

    Attributes:
        num_images: size of the training set.
        batch_size: images per optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches per step and rank.
        seed: the run's seed.
        repeats: views of an image in a batch.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        UserError: the batch size is not divisible by the parts, or larger than the training set.
    """

    num_images: int
    batch_size: int
    accumulation: int
    seed: int
    repeats: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.num_parts = self.world_size * self.accumulation
        if self.batch_size % self.num_parts:
            nearest = max(round(self.batch_size / self.num_parts), 1) * self.num_parts
            parts = f"{self.world_size} (processes) × {self.accumulation} (accumulation)"
            reason = f"{self.batch_size} images are not divisible by {parts}; {nearest} are"
            raise UserError("schedule.batch_size", reason)
        if self.batch_size > self.num_images:
            reason = f"{self.batch_size} is more than the {self.num_images} images of the training set"
            raise UserError("schedule.batch_size", reason)
        self.set_epoch(0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.num_images // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of one micro-batch of one rank."""
        return self.batch_size // self.num_parts

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image indices and views of an epoch, each (num_images,), over all ranks."""
        images_seen = -(-self.num_images // self.repeats)
        indices = self.shuffled(epoch)[:images_seen].repeat(self.repeats)[: self.num_images]
        return indices, np.arange(self.num_images) % self.repeats

    def shuffled(self, epoch: int) -> np.ndarray:
        """Return all image indices, (num_images,), in the order of an epoch."""
        return shuffled_indices(self.seed, epoch, self.num_images)

    def images(self, epoch: int, step: int) -> list[int]:
        """Return the image indices of one step's global batch, over all ranks and micro-batches."""
        indices, _ = self.order(epoch)
        return indices[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration, which begins at step `start`."""
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"an epoch has {self.steps_per_epoch} steps, and no step {start} to start from")
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        return self._micro_batches(self.epoch, self.start)  # reads the attributes now, not at the first draw

    def _micro_batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        indices, views = self.order(epoch)
        for step in range(start, self.steps_per_epoch):
            for micro_batch in range(self.accumulation):
                first = step * self.batch_size + micro_batch * self.world_size + self.rank
                part = slice(first, (step + 1) * self.batch_size, self.num_parts)
                pairs = zip(indices[part].tolist(), views[part].tolist())
                yield [(epoch, index, view) for index, view in pairs]


class BalancedBatches(MicroBatches):
    """Micro-batches in which all classes that have images are equally frequent; an epoch keeps its length.

    The images of a class are drawn from one random permutation after the other, across epochs: none is
    repeated before all of its class were drawn. The order is a function of (seed, epoch).

    Args:
        targets: class index of each image, (num_images,).
        options: as for `MicroBatches`, without `num_images`.
    """

    def __init__(self, targets: np.ndarray, *options: int) -> None:
        super().__init__(len(targets), *options)
        self._classes = [np.flatnonzero(targets == label) for label in np.unique(targets)]

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return image indices and views of the images that an epoch uses, over all ranks."""
        images_seen = self.steps_per_epoch * self.batch_size
        count = -(-images_seen // self.repeats)
        classes = len(self._classes)
        drawn = []
        for number, images in enumerate(self._classes):
            # Class c has drawn ⌊(n + c) / classes⌋ of the first n images, which sum to n.
            first, last = ((count * e + number) // classes for e in (epoch, epoch + 1))
            if first == last:  # fewer draws than classes
                continue
            rounds = range(first // len(images), -(-last // len(images)))
            shuffled = [self._permutation(images, number, index) for index in rounds]
            drawn.append(np.concatenate(shuffled)[first - rounds.start * len(images) :][: last - first])
        rng = np.random.default_rng(seed_sequence(self.seed, "balanced order", epoch))
        indices = rng.permutation(np.concatenate(drawn)).repeat(self.repeats)[:images_seen]
        return indices, np.arange(images_seen) % self.repeats

    def _permutation(self, images: np.ndarray, number: int, index: int) -> np.ndarray:
        seed = seed_sequence(self.seed, "order of a class", number, index)
        return np.random.default_rng(seed).permutation(images)


def shuffled_indices(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return all image indices, (num_images,), in the order of an epoch."""
    return np.random.default_rng(seed_sequence(seed, "order", epoch)).permutation(num_images)


def replacement_indices(seed: int, epoch: int, num_images: int, index: int) -> Iterator[int]:
    """Yield every other index once: those after `index` in the order of an epoch, then those before it."""
    order = shuffled_indices(seed, epoch, num_images)
    position = int(np.flatnonzero(order == index)[0])
    yield from order[position + 1 :].tolist()
    yield from order[:position].tolist()
