"""Loaders of training and validation batches, loaded by worker processes in a fixed order."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from data.decoding import UnreadableImageError, decoding_errors
from data.order import ORDER_VERSION
from data.samplers import Key, MicroBatches, replacement_indices
from data.sources import Source
from data.to_device import Batch, ErasedRegions, ErasingPlan, NormalizeAndErase, collate_erasing, to_device
from data.transforms import Transform
from data.unreadable_images import UnreadableImages
from data.workers import init_worker, iterate
from vil.errors import UserError
from vil.runtime.distributed import Process
from vil.runtime.seeding import seed_cpu_generators, seeded

UnreadableImagePolicy = Literal["fail", "skip"]
_logger = logging.getLogger("vil.data")


@dataclass
class UnreadableImage:
    """An image that cannot be decoded, and the reason."""

    image: str
    reason: str

    def error(self) -> UserError:
        """Return the error that ends the program."""
        return UserError("data.root", f"{self.image}: cannot be read: {self.reason}")


TrainSample = tuple[Tensor, int, list[ErasingPlan]]
"""Pixels (C, H, W), or (S, C, H, W) of S views, uint8; target; and the erasing of each normalized view."""
Content = TypeVar("Content", covariant=True)


@dataclass(frozen=True)
class Sample(Generic[Content]):
    """Pixels and target of an image, None if it cannot be read, and the images that cannot be read."""

    content: Content | None
    unreadable: list[UnreadableImage] = field(default_factory=list)


@dataclass(eq=False)
class TrainingViews(Dataset[object]):
    """Augmented views of images: functions of the seed and of a key (epoch, index, view).

    With `unreadable_images` skip, the next image in the order of the epoch replaces an unreadable one, with
    the augmentation of the unreadable one, so that the same view does not occur twice.
    """

    source: Source
    transform: Transform
    seed: int
    unreadable_images: UnreadableImagePolicy = "fail"
    order_version: int = ORDER_VERSION

    def __getitem__(self, key: Key) -> Sample[TrainSample]:
        epoch, index, _ = key
        sample = self._view(index, key)
        if sample.content is not None or self.unreadable_images == "fail":
            return sample
        unreadable = sample.unreadable
        for other in replacement_indices(self.seed, epoch, len(self.source), index, self.order_version):
            sample = self._view(other, key)
            if sample.content is not None:
                return Sample(sample.content, unreadable)
            unreadable += sample.unreadable
        return Sample(None, unreadable[:1])

    def _view(self, index: int, key: Key) -> Sample[TrainSample]:
        if get_worker_info() is not None:  # which draws nothing else: no state to restore
            seed_cpu_generators(self.seed, "augmentation", *key)
            return self._draw_view(index)
        with seeded(self.seed, "augmentation", *key):
            return self._draw_view(index)

    def _draw_view(self, index: int) -> Sample[TrainSample]:
        sample = _load(self.source, index, self.transform)
        if sample.content is None:
            return Sample(None, sample.unreadable)
        pixels, target = sample.content
        return Sample((pixels, target, self.transform.draw_erasing(pixels.shape)))


@dataclass(eq=False)
class EvaluationImages(Dataset[object]):
    """Images resized and cropped for evaluation: pixels (C, H, W) uint8, and target."""

    source: Source
    transform: Transform

    def __getitem__(self, index: int) -> Sample[tuple[Tensor, int | Tensor]]:
        return _load(self.source, index, self.transform)


@dataclass(frozen=True)
class LoaderOptions:
    """Options of a loader that do not change the images in its batches.

    Attributes:
        workers: number of processes, or of threads for FFCV's files, that load images.
        device: device of the batches.
        channels_last: convert the images to channels-last order.
        persistent_workers: keep the processes for the next pass.
    """

    workers: int
    device: torch.device
    channels_last: bool = False
    persistent_workers: bool = True


@dataclass(eq=False)
class MicroBatchLoader(ABC):
    """Augmented micro-batches by epoch: the views of the keys in `micro_batches`.

    Images that were replaced are recorded in `unreadable_images`.
    """

    views: TrainingViews
    micro_batches: MicroBatches
    options: LoaderOptions
    unreadable_images: UnreadableImages

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.micro_batches.steps_per_epoch
        self.num_images = self.micro_batches.num_images
        transform = self.views.transform
        self._normalize_and_erase = NormalizeAndErase(transform.mean, transform.std, self.options.device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch, `accumulation` per step, from step `start` on.

        Loading starts with the call. A call ends the iteration over another epoch.

        Returns:
            (images (B, C, H, W) float32, targets (B,) int64) of this rank. With S views of an image, the
            images are (S·B, C, H, W): the first views of all images, then the second ones, ...

        Raises:
            UserError: by the iterator: an image cannot be decoded, or too many cannot.
        """
        self.micro_batches.set_epoch(epoch, start)
        return to_device(self._load_epoch(), self.options.device, self._finish, self.options.channels_last)

    def samples(self, epoch: int, step: int) -> list[str]:
        """Return the descriptions of the images of one step's global batch."""
        return [self.views.source.describe(index) for index in self.micro_batches.images(epoch, step)]

    @abstractmethod
    def _load_epoch(self) -> Iterator[tuple[object, ...]]:
        """Start loading, and return batches on the CPU: images uint8, targets, arguments of `_finish`."""

    def _finish(self, images: Tensor, *arguments: Any) -> Tensor:
        return self._normalize_and_erase(images, *arguments)

    def _record(self, unreadable: Sequence[UnreadableImage]) -> None:
        for image in unreadable:
            self.unreadable_images.add(image.image, image.reason)


class TrainLoader(MicroBatchLoader):
    """Micro-batches loaded by worker processes, which persist between epochs."""

    @functools.cached_property
    def _loader(self) -> DataLoader[CollatedBatch]:
        return data_loader(self.views, self.options, batch_sampler=self.micro_batches)

    def _load_epoch(self) -> Iterator[tuple[object, ...]]:
        return self._check(iterate(self._loader))

    def _check(self, collated: Iterable[CollatedBatch]) -> Iterator[tuple[object, ...]]:
        for batch, unreadable in collated:
            if batch is None or len(batch[1]) < self.micro_batches.micro_batch_size:
                raise unreadable[0].error()
            self._record(unreadable)
            yield batch


class ValidationLoader:
    """This rank's part of the validation set, images rank::world_size, in order, without padding.

    With `unreadable_images` skip, images that cannot be read are omitted, counted and logged.

    Attributes:
        num_images: size of the validation set, over all ranks.
        unreadable: number of images of this rank that could not be read in the last pass.
    """

    def __init__(
        self,
        dataset: EvaluationImages,
        batch_size: int,
        options: LoaderOptions,
        process: Process,
        unreadable_images: UnreadableImagePolicy = "fail",
    ) -> None:
        self.num_images = len(dataset.source)
        self.unreadable = 0
        indices = range(process.rank, self.num_images, process.world_size)
        self._loader = data_loader(dataset, options, batch_size=batch_size, sampler=indices)
        self._options = options
        self._normalize = NormalizeAndErase(dataset.transform.mean, dataset.transform.std, options.device)
        self._on_unreadable = unreadable_images

    def examples(self, count: int) -> Tensor:
        """Return up to `count` images (B, C, H, W), evenly spaced over the set, as `__iter__` yields them."""
        indices = torch.linspace(0, self.num_images - 1, min(count, self.num_images)).long().unique()
        batch, unreadable = _collate([self._loader.dataset[index] for index in indices.tolist()])
        if batch is None:
            raise unreadable[0].error()
        images, _ = next(self._to_device([batch]))
        return images

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return self._to_device(self._check(iterate(self._loader)))

    def _to_device(self, batches: Iterable[tuple[object, ...]]) -> Iterator[Batch]:
        return to_device(batches, self._options.device, self._normalize, self._options.channels_last)

    def _check(self, collated: Iterable[CollatedBatch]) -> Iterator[tuple[object, ...]]:
        self.unreadable = 0
        for batch, unreadable in collated:
            if unreadable and self._on_unreadable == "fail":
                raise unreadable[0].error()
            self.unreadable += len(unreadable)
            for image in unreadable:
                _logger.warning("not evaluated: %s, which cannot be read: %s", image.image, image.reason)
            if batch is not None:
                yield batch


CollatedBatch = tuple[
    "tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ErasedRegions] | None", list[UnreadableImage]
]
"""Images (B, C, H, W) uint8, targets and, in training, the erasing, or None if no image can be read; and the
images that cannot be read."""


def data_loader(dataset: Dataset[object], options: LoaderOptions, **order: Any) -> DataLoader[Any]:
    """Return a loader of collated batches; `order` has the sampler's arguments of `DataLoader`."""
    return DataLoader(
        dataset,
        num_workers=options.workers,
        collate_fn=_collate,
        worker_init_fn=init_worker,
        pin_memory=options.device.type == "cuda",
        persistent_workers=options.workers > 0 and options.persistent_workers,
        # DataLoader draws a seed for its workers, which is not used: keep the global generator unchanged.
        generator=torch.Generator(),
        **order,
    )


def _load(source: Source, index: int, transform: Transform) -> Sample[tuple[Tensor, int]]:
    try:
        with decoding_errors():
            image = source.read(index)
        return Sample((transform.pixels(image), int(source.targets[index])))
    except UnreadableImageError as error:
        return Sample(None, [UnreadableImage(source.describe(index), str(error))])


def _collate(samples: Sequence[Sample[tuple[Any, ...]]]) -> CollatedBatch:
    unreadable = [image for sample in samples for image in sample.unreadable]
    readable = [sample.content for sample in samples if sample.content is not None]
    if not readable:
        return None, unreadable
    # Stacked in the order of their memory, (B, [S,] H, W, C), which is faster.
    images, targets = default_collate([(pixels.movedim(-3, -1), target) for pixels, target, *_ in readable])
    if images.ndim == 5:
        images = images.transpose(0, 1).flatten(0, 1)  # (B, S, H, W, C) -> (S·B, H, W, C)
    plans = [plan for view in zip(*(plans for _, _, *rest in readable for plans in rest)) for plan in view]
    erased = (collate_erasing(plans),) if plans else ()
    return (images.permute(0, 3, 1, 2), targets, *erased), unreadable
