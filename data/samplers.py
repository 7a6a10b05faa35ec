"""The images of each optimizer step, and their division among ranks and micro-batches.

An epoch has `num_images // batch_size` steps; the incomplete last batch is dropped. Batch b of an epoch is
order[b·B : (b+1)·B] of an order that is a function of (seed, epoch) alone (`data.order`); ranks and gradient
accumulation only divide the batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from data.order import ORDER_VERSION, EpochOrder, permute, splitmix64
from vil.errors import UserError
from vil.runtime.seeding import seed_sequence

Key = tuple[int, int, int]
"""(epoch, image index, view): with the seed, these determine a training sample."""

_KEYS_PER_BLOCK = 4096
"""Keys of a rank that are drawn together, which is faster than one micro-batch at a time."""


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
        order_version: `data.order.ORDER_VERSION`, or that of the run to continue.

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
    order_version: int = ORDER_VERSION

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

    def draw(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the image indices and the views at positions of an epoch; all of one shape, int64."""
        return self.shuffled(epoch, positions // self.repeats), positions % self.repeats

    def shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the image indices at positions of an order of all images."""
        return EpochOrder(self.seed, self.num_images, self.order_version).indices(epoch, positions)

    def images(self, epoch: int, step: int) -> list[int]:
        """Return the image indices of one step's global batch, over all ranks and micro-batches."""
        indices, _ = self.draw(epoch, np.arange(step * self.batch_size, (step + 1) * self.batch_size))
        return indices.tolist()

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
        steps_per_block = max(1, _KEYS_PER_BLOCK * self.num_parts // self.batch_size // self.accumulation)
        for block in range(start, self.steps_per_epoch, steps_per_block):
            steps = np.arange(block, min(block + steps_per_block, self.steps_per_epoch))
            parts = np.arange(self.accumulation) * self.world_size + self.rank
            images = np.arange(self.micro_batch_size) * self.num_parts
            # (steps, accumulation, micro-batch size)
            positions = (steps * self.batch_size)[:, None, None] + parts[:, None] + images
            indices, views = self.draw(epoch, positions.reshape(-1, self.micro_batch_size))
            for pairs in zip(indices.tolist(), views.tolist()):
                yield [(epoch, index, view) for index, view in zip(*pairs)]


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
        self._by_class = np.argsort(targets, kind="stable")
        sizes = np.bincount(targets)
        self._sizes = sizes[sizes > 0]  # of the classes that have images
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._cached_order_v1: tuple[int, np.ndarray] | None = None

    def shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the image indices at positions of the images that an epoch draws."""
        draws = -(-self.steps_per_epoch * self.batch_size // self.repeats)  # in an epoch
        if self.order_version == 1:
            if self._cached_order_v1 is None or self._cached_order_v1[0] != epoch:
                self._cached_order_v1 = epoch, self._shuffled_v1(epoch, draws)
            return self._cached_order_v1[1][positions]
        # Draw n of the run, over all epochs, is draw n // classes of class n % classes.
        key = seed_sequence(self.seed, "balanced order", epoch).generate_state(1, np.uint64)
        number = epoch * draws + permute(positions, np.array(draws), key)
        label, number = number % len(self._sizes), number // len(self._sizes)
        sizes = self._sizes[label]
        key = seed_sequence(self.seed, "order of a class").generate_state(1, np.uint64)
        keys = splitmix64(splitmix64(key + label.astype(np.uint64)) + (number // sizes).astype(np.uint64))
        return self._by_class[self._starts[label] + permute(number % sizes, sizes, keys)]

    def _shuffled_v1(self, epoch: int, draws: int) -> np.ndarray:
        """Return the images of an epoch in order version 1."""
        drawn = []
        for number, images in enumerate(np.split(self._by_class, self._starts[1:])):
            # Class c has drawn ⌊(n + c) / classes⌋ of the first n images, which sum to n.
            first, last = ((draws * e + number) // len(self._sizes) for e in (epoch, epoch + 1))
            if first == last:  # fewer draws than classes
                continue
            rounds = range(first // len(images), -(-last // len(images)))
            shuffled = [self._permutation_v1(images, number, index) for index in rounds]
            drawn.append(np.concatenate(shuffled)[first - rounds.start * len(images) :][: last - first])
        rng = np.random.default_rng(seed_sequence(self.seed, "balanced order", epoch))
        return rng.permutation(np.concatenate(drawn))

    def _permutation_v1(self, images: np.ndarray, number: int, index: int) -> np.ndarray:
        seed = seed_sequence(self.seed, "order of a class", number, index)
        return np.random.default_rng(seed).permutation(images)


def replacement_indices(
    seed: int, epoch: int, num_images: int, index: int, order_version: int = ORDER_VERSION
) -> Iterator[int]:
    """Yield every other index once: those after `index` in the order of an epoch, then those before it."""
    order = EpochOrder(seed, num_images, order_version)
    position = int(order.positions(epoch, np.array([index]))[0])
    for start, stop in ((position + 1, num_images), (0, position)):
        for first in range(start, stop, 64):
            yield from order.indices(epoch, np.arange(first, min(first + 64, stop))).tolist()
