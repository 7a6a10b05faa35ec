"""Loaders: samples from any number of processes, batches in one order, errors on one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.prefetch import Batch, to_device
from data.randomness import seeded
from data.samplers import Key, MicroBatches
from data.sources import Source
from data.transforms import Transform
from vil.config import ConfigError


@dataclass
class Unreadable:
    """Stands in a batch for an image that could not be decoded, on its way from a worker."""

    image: str
    reason: str


class TrainingViews(Dataset[Any]):
    """Augmented views of images. A view is a function of the seed and its key (epoch, index, view)."""

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | Unreadable:
        loaded = _load(self.source, key[1])
        if isinstance(loaded, Unreadable):
            return loaded
        image, target = loaded
        with seeded(self.seed, "augmentation", *key):
            return self.transform(image), target


class EvaluationImages(Dataset[Any]):
    """Images as they are evaluated."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        loaded = _load(self.source, index)
        return loaded if isinstance(loaded, Unreadable) else (self.transform(loaded[0]), loaded[1])


class TrainLoader:
    """Augmented micro-batches, epoch by epoch; the workers live on between epochs.

    Args:
        dataset: the views.
        micro_batches: their order.
        workers: processes that load images; the batches are the same for any number.
        device: where the batches are wanted.
        channels_last: lay the images out channels-last.
    """

    def __init__(
        self,
        dataset: TrainingViews,
        micro_batches: MicroBatches,
        workers: int,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self.steps_per_epoch = micro_batches.steps_per_epoch
        self._micro_batches = micro_batches
        self._loader = _loader(dataset, workers, device, batch_sampler=micro_batches)
        self._device = device
        self._channels_last = channels_last

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one epoch, `accumulation` per step, from step `start` on; none before it is read.

        Loading begins with the call. Only one epoch can be under way: the next call ends the one before.

        Returns:
            (images (B, C, H, W) float32, targets (B,) int64) of this rank.

        Raises:
            ConfigError: from the iterator, naming an image that cannot be decoded.
        """
        self._micro_batches.choose(epoch, start)
        return to_device(_readable(iter(self._loader)), self._device, self._channels_last)


class ValidationLoader:
    """This rank's share of the validation set, images rank::world_size, in order, without padding.

    Args:
        dataset: the images.
        batch_size: images per batch of this rank.
        workers: processes that load images.
        device: where the batches are wanted.
        channels_last: lay the images out channels-last.
        rank: of this process.
        world_size: number of processes.

    Attributes:
        num_images: size of the whole set, all ranks together.
    """

    def __init__(
        self,
        dataset: EvaluationImages,
        batch_size: int,
        workers: int,
        device: torch.device,
        channels_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.num_images = len(dataset.source)
        share = range(rank, self.num_images, world_size)
        self._loader = _loader(dataset, workers, device, batch_size=batch_size, sampler=share)
        self._device = device
        self._channels_last = channels_last

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return to_device(_readable(iter(self._loader)), self._device, self._channels_last)


def _loader(dataset: Dataset[Any], workers: int, device: torch.device, **order: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        # DataLoader draws a seed for its workers, which nothing here uses: not from the global generator.
        generator=torch.Generator(),
        **order,
    )


def _load(source: Source, index: int) -> Any:
    try:
        return source.load(index)
    except (
        Exception
    ) as error:  # decoders raise anything on damaged files: OSError, SyntaxError, struct.error ...
        reason = " ".join(str(error).split()) or type(error).__name__
        return Unreadable(source.describe(index), reason)


def _collate(samples: list[Any]) -> Any:
    damaged = [sample for sample in samples if isinstance(sample, Unreadable)]
    return damaged[0] if damaged else default_collate(samples)


def _readable(batches: Iterable[Any]) -> Iterator[Batch]:
    """Raises here, where it can be shown on one line, what a worker could not read."""
    for batch in batches:
        if isinstance(batch, Unreadable):
            raise ConfigError("data.root", f"{batch.image}: cannot be read: {batch.reason}")
        images, targets = batch
        yield images, targets
