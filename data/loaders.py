"""Loaders: samples from any number of processes, batches in one order, errors on one line."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.bad_images import BadImages
from data.decoding import UnreadableImageError, decoding
from data.prefetch import Batch, ErasingPlan, Finish, erasures, to_device
from data.randomness import seeded
from data.samplers import Key, MicroBatches, following
from data.sources import Source
from data.transforms import Transform
from vil.config import ConfigError

OnError = Literal["fail", "skip"]
_logger = logging.getLogger("vil.data")  # a child of vil, whose records are shown


@dataclass
class Unreadable:
    """Stands for an image that could not be decoded, on its way from a worker."""

    image: str
    reason: str


@dataclass
class Replaced:
    """A sample that took the place of others."""

    sample: tuple[Any, ...]
    unreadable: list[Unreadable]


class TrainingViews(Dataset[Any]):
    """Augmented views of images. A view is a function of the seed and its key (epoch, index, view).

    Args:
        source: the images.
        transform: their augmentation.
        seed: the run's seed.
        on_error: skip replaces an image that cannot be read by the next one in the order of the epoch; its
            augmentation is that of the place, so that it is not the same view twice.
        normalised: normalise and erase; else the views are bytes, (C, H, W) uint8, for `Transform.finish`.
        planned: beside bytes, a view has the plan of its erasing, for `data.prefetch.Finish`.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        seed: int,
        on_error: OnError = "fail",
        normalised: bool = True,
        planned: bool = False,
    ) -> None:
        self.source = source
        self.transform = transform
        self.planned = planned
        self.seed = seed
        self.on_error = on_error
        self.normalised = normalised

    def __getitem__(self, key: Key) -> tuple[Any, ...] | Replaced | Unreadable:
        epoch, index, _ = key
        sample = self._view(index, key)
        if not isinstance(sample, Unreadable) or self.on_error == "fail":
            return sample
        unreadable = [sample]
        for other in following(self.seed, epoch, len(self.source), index):
            sample = self._view(other, key)
            if not isinstance(sample, Unreadable):
                return Replaced(sample, unreadable)
            unreadable.append(sample)
        return unreadable[0]

    def _view(self, index: int, key: Key) -> tuple[Any, ...] | Unreadable:
        with seeded(self.seed, "augmentation", *key):
            transform = self.transform if self.normalised else self.transform.pixels
            sample = _sample(self.source, index, transform)
            if self.planned and not isinstance(sample, Unreadable):
                return *sample, ErasingPlan.draw(self.transform.erasing, sample[0].shape)
            return sample


class EvaluationImages(Dataset[Any]):
    """Images as they are evaluated."""

    def __init__(self, source: Source, transform: Transform, normalised: bool = True) -> None:
        self.source = source
        self.transform = transform
        self.normalised = normalised

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        return _sample(self.source, index, self.transform if self.normalised else self.transform.pixels)


class TrainLoader:
    """Augmented micro-batches, epoch by epoch; the workers live on between epochs.

    Args:
        dataset: the views.
        micro_batches: their order.
        workers: processes that load images; the batches are the same for any number.
        device: where the batches are wanted.
        channels_last: lay the images out channels-last.
        bad_images: where to note images that were replaced.
    """

    def __init__(
        self,
        dataset: TrainingViews,
        micro_batches: MicroBatches,
        workers: int,
        device: torch.device,
        channels_last: bool,
        bad_images: BadImages,
    ) -> None:
        self.steps_per_epoch = micro_batches.steps_per_epoch
        self.num_images = micro_batches.num_images
        self._views = dataset
        self._micro_batches = micro_batches
        self._loader = _loader(dataset, workers, device, batch_sampler=micro_batches)
        self._device = device
        self._channels_last = channels_last
        self._finish = _finish(dataset, device)
        self._bad_images = bad_images

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one epoch, `accumulation` per step, from step `start` on; none before it is read.

        Loading begins with the call. Only one epoch can be under way: the next call ends the one before.

        Returns:
            (images (B, C, H, W) float32, targets (B,) int64) of this rank.

        Raises:
            ConfigError: from the iterator, naming an image that cannot be decoded; or too many cannot.
        """
        self._micro_batches.choose(epoch, start)
        batches = self._readable(_started(self._loader))
        return to_device(batches, self._device, self._channels_last, self._finish)

    def samples(self, epoch: int, step: int) -> list[str]:
        """The images of one step's global batch, as they are called where one cannot be read."""
        return [self._views.source.describe(index) for index in self._micro_batches.images(epoch, step)]

    def _readable(self, collated: Iterable[Collated]) -> Iterator[tuple[Any, ...]]:
        for batch, unreadable in collated:
            if batch is None or len(batch[1]) < self._micro_batches.micro_batch_size:
                raise _error(unreadable[0])
            for image in unreadable:
                self._bad_images.add(image.image, image.reason)
            yield batch


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
        on_error: skip leaves out images that cannot be read, counts and names them.

    Attributes:
        num_images: size of the whole set, all ranks together.
        unreadable: how many of this rank's could not be read, in the last pass.
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
        on_error: OnError = "fail",
    ) -> None:
        self.num_images = len(dataset.source)
        self.unreadable = 0
        share = range(rank, self.num_images, world_size)
        self._loader = _loader(dataset, workers, device, batch_size=batch_size, sampler=share)
        self._device = device
        self._channels_last = channels_last
        self._finish = _finish(dataset, device)
        self._on_error = on_error

    def examples(self, count: int) -> Tensor:
        """Up to `count` images from all over the set, the same each time, as `__iter__` yields them."""
        places = torch.linspace(0, self.num_images - 1, min(count, self.num_images)).long().unique()
        samples = [self._loader.dataset[place] for place in places.tolist()]
        batch, unreadable = _collate(samples)
        if batch is None:
            raise _error(unreadable[0])
        images, _ = next(to_device([batch], self._device, self._channels_last, self._finish))
        return images

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._readable(_started(self._loader))
        return to_device(batches, self._device, self._channels_last, self._finish)

    def _readable(self, collated: Iterable[Collated]) -> Iterator[tuple[Any, ...]]:
        self.unreadable = 0
        for batch, unreadable in collated:
            if unreadable and self._on_error == "fail":
                raise _error(unreadable[0])
            self.unreadable += len(unreadable)
            for image in unreadable:
                _logger.warning("not evaluated: %s, which cannot be read: %s", image.image, image.reason)
            if batch is not None:
                yield batch


Collated = tuple["tuple[Any, ...] | None", list[Unreadable]]
"""A batch, in bytes with its `Erasures` where it is to be finished on the device, None where no image of it
could be read; and the images that could not."""


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the loader. Processes that it forks begin with the signals held back that end the trainer:
    until they know what to do with them, they would pass them off as its own."""
    if not hasattr(signal, "pthread_sigmask"):
        return explain_shared_memory(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return explain_shared_memory(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


SHARED_MEMORY = "/dev/shm"  # noqa: S108
_SHARED_MEMORY_ERRORS = re.compile(
    r"shared memory.*(No space left|Bus error)|Bus error.*shared memory|unable to write to file </torch_",
    re.DOTALL,
)


def explain_shared_memory(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a loader, which starts with the call; say in one line that shared memory is too small.

    Worker processes return their batches in shared memory, of which a Docker container has 64 MB unless it is
    given more.

    Raises:
        ConfigError: the workers, or the objects that they share, do not fit into shared memory.
    """

    def checked(batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except RuntimeError as error:
            if _SHARED_MEMORY_ERRORS.search(str(error)) is None:
                raise
            raise _shared_memory_error() from None

    try:
        return checked(iter(loader))
    except OSError as error:  # of a semaphore
        if error.errno != errno.ENOSPC:
            raise
        raise _shared_memory_error() from None


def _shared_memory_error() -> ConfigError:
    size = ""
    with suppress(OSError):
        size = f" ({os.statvfs(SHARED_MEMORY).f_frsize * os.statvfs(SHARED_MEMORY).f_blocks / 1e6:,.0f} MB)"
    reason = f"shared memory, {SHARED_MEMORY}{size}, is too small for the batches of the worker processes"
    advice = "docker run takes --shm-size=16g or --ipc=host; 0 workers need none"
    return ConfigError("data.workers", f"{reason}; {advice} (--data.workers 0)")


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and torchrun reach every process of a group: this one ends when its parent says so, which may
    need images for the step that it is in."""
    signal.set_wakeup_fd(-1)  # which is the trainer's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    end_with_parent(worker)


_PARENT_POLL_S = 1.0


def end_with_parent(worker: int = 0) -> None:
    """End this worker process with its parent, however that ends and whatever this process waits for.

    PyTorch's workers look for their parent between two batches only, and not while a file system does not
    answer. A blocked SIGTERM is obeyed where it comes from the parent.
    """
    threading.Thread(target=_watch_parent, args=(os.getppid(),), name="parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    trainer = multiprocessing.parent_process()  # not the parent where a fork server starts the workers
    obeyed = {parent, trainer.pid if trainer is not None else parent}
    while os.getppid() == parent:
        if hasattr(signal, "sigtimedwait"):
            received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_POLL_S)
            if received is not None and received.si_pid in obeyed:
                break
        else:
            time.sleep(_PARENT_POLL_S)
    os._exit(0)


def _loader(dataset: Dataset[Any], workers: int, device: torch.device, **order: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        # DataLoader draws a seed for its workers, which nothing here uses: not from the global generator.
        generator=torch.Generator(),
        **order,
    )


def _finish(dataset: TrainingViews | EvaluationImages, device: torch.device) -> Finish | None:
    if dataset.normalised:
        return None
    return Finish(dataset.transform.mean, dataset.transform.std, device)


def _sample(source: Source, index: int, transform: Any) -> tuple[Tensor, int] | Unreadable:
    try:
        with decoding():
            picture = source.picture(index)
        return transform(picture), int(source.targets[index])
    except UnreadableImageError as error:
        return Unreadable(source.describe(index), str(error))


def _collate(samples: list[Any]) -> Collated:
    """Batches what could be read; bytes stay in the order (B, H, W, C) in memory, which is faster."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    unreadable += chain.from_iterable(sample.unreadable for sample in samples if isinstance(sample, Replaced))
    pairs = [sample.sample if isinstance(sample, Replaced) else sample for sample in samples]
    pairs = [pair for pair in pairs if not isinstance(pair, Unreadable)]
    if not pairs:
        return None, unreadable
    if pairs[0][0].dtype != torch.uint8:
        images, targets = default_collate(pairs)
        return (images, targets), unreadable
    images, targets = default_collate([(image.permute(1, 2, 0), target) for image, target, *_ in pairs])
    plans = [plan for _, _, *of_one in pairs for plan in of_one]
    more = [erasures(plans)] if plans else []
    return (images.permute(0, 3, 1, 2), targets, *more), unreadable


def _error(unreadable: Unreadable) -> ConfigError:
    """What a worker could not read, here, where it can be shown on one line."""
    return ConfigError("data.root", f"{unreadable.image}: cannot be read: {unreadable.reason}")
