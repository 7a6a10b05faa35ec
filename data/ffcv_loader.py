"""Training batches of FFCV's files, decoded and cropped by threads instead of worker processes.

On a GPU, the rest of the augmentation runs there on whole batches.

This module uses FFCV's files and its decoder, but not its `Loader`, which draws crops and flips from
generators that cannot be seeded with several threads, reuses the buffers that it returns, never stops the
threads of an unfinished epoch, and changes PyTorch's number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import batch_augment
from data.batch_augment import AugmentationPlan, AugmentationPlanner, Operation
from data.beton import Beton
from data.crops import RandomResizedCrop
from data.loaders import MicroBatchLoader, TrainSample
from data.mixing import check_even_batch, is_mixing_enabled
from data.samplers import BalancedBatches, Key, MicroBatches
from data.sources import Source
from data.sources.ffcv import FFCVImages
from data.sources.subsets import unwrap_subset
from data.to_device import ErasedRegions, collate_erasing
from data.transforms import train_transform
from vil.config import TrainConfig, as_size
from vil.errors import UserError, error_reason
from vil.runtime.distributed import Process
from vil.runtime.seeding import seed_sequence, seeded

INSTALL_COMMAND = "sudo apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install ffcv"
PREFETCHED_BATCHES = 3
"""Micro-batches in progress in addition to the current one."""
IMAGES_PER_TASK = 8
BATCHES_PER_SHUFFLE = 8
"""quasi_random: number of batches whose images, of neighboring pages, are shuffled together."""

_logger = logging.getLogger("vil.data")


def _missing_ffcv(error: BaseException) -> UserError:
    reason = f"ffcv needs the package FFCV ({error_reason(error)}); to install it: {INSTALL_COMMAND}"
    return UserError("data.source", reason)


def import_ffcv() -> None:
    """Import FFCV for writing, which takes seconds. Raises UserError without FFCV."""
    try:
        importlib.import_module("ffcv.writer")
    except Exception as error:  # a package built for other libraries raises exceptions of many types
        raise _missing_ffcv(error) from None


@functools.cache
def load_decoder() -> Any:
    """Return the JPEG decoder of FFCV's C library. Raises UserError without FFCV."""
    package = importlib.util.find_spec("ffcv")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for library in sorted(Path(folder).glob("_libffcv*")):
            try:
                decode = ctypes.CDLL(str(library)).imdecode
            except (OSError, AttributeError) as error:
                raise _missing_ffcv(error) from None
            size, flag = ctypes.c_uint32, ctypes.c_bool
            content = (ctypes.c_void_p, ctypes.c_uint64, size, size)
            target = (ctypes.c_void_p, *(size,) * 6, flag, flag)
            decode.argtypes = (*content, *target)
            return decode
    raise _missing_ffcv(ImportError("it is not installed"))


@dataclass(frozen=True)
class StoredImage:
    """The image of a .beton file with an index, decoded by FFCV."""

    beton: Beton
    index: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return int(self.beton.widths[self.index]), int(self.beton.heights[self.index])

    def decode(self, scale: int = 1) -> np.ndarray:
        """Return (H, W, 3) uint8, a JPEG's sides divided by `scale` and rounded up; ValueError if damaged."""
        stored = self.beton.stored(self.index)
        if stored.ndim == 3:
            return stored
        width, height = self.size
        pixels = np.empty((-(-height // scale), -(-width // scale), 3), np.uint8)
        content = (stored.ctypes.data, stored.size, height, width)
        crop = (height, width, 0, 0, 1, scale)  # the whole image
        if load_decoder()(*content, pixels.ctypes.data, *crop, False, False) != 0:
            raise ValueError("FFCV cannot decode it")
        return pixels


def uses_ffcv(config: TrainConfig, source: Source, process: Process) -> bool:
    """Return True if `FFCVTrainLoader` can load a training set.

    Worker processes read .beton files for augmentations that it does not support, which rank 0 logs.
    """
    if not isinstance(unwrap_subset(source)[0], FFCVImages):
        return False
    model = config.model
    augment = config.schedule.augment
    transform = train_transform(augment, config.data, image_size=model.size, in_chans=model.in_chans)
    option = batch_augment.unsupported_option(transform)
    if config.schedule.random_sizes is not None:
        option = "schedule.random_sizes"
    if option is not None and process.is_main:
        _logger.warning(
            "data.source ffcv: %s cannot run on batches; falling back to %d worker processes per rank",
            f"{option} {functools.reduce(getattr, option.split('.'), config)}",
            config.data.workers,
        )
    return option is None


def build_micro_batches(
    config: TrainConfig, source: Source, process: Process, batch_size: int, order_version: int
) -> MicroBatches:
    """Build the micro-batches of a source and a batch size, balanced or in the order `data.ffcv_order`.

    `order_version` is that of the run to continue.

    Raises:
        UserError: options that do not fit one another or the source.
    """
    micro_batches = _micro_batches(config, source, process, batch_size, order_version)
    if is_mixing_enabled(config.schedule.augment):
        check_even_batch(micro_batches.micro_batch_size)
    return micro_batches


def _micro_batches(
    config: TrainConfig, source: Source, process: Process, batch_size: int, order_version: int
) -> MicroBatches:
    schedule = config.schedule
    repeats = schedule.augment.repeated_augmentation
    ranks = (process.rank, process.world_size)
    options = (batch_size, schedule.accumulation, config.seed, repeats, *ranks, order_version)
    if config.data.balanced_sampling:
        if config.data.ffcv_order != "random":
            reason = "cannot be combined with data.ffcv_order quasi_random"
            raise UserError("data.balanced_sampling", reason)
        if schedule.class_weights == "balanced":
            reason = "schedule.class_weights balanced would correct the imbalance twice; use one of them"
            raise UserError("data.balanced_sampling", reason)
        if batch_size != schedule.batch_size:
            reason = "cannot be combined with batch sizes in schedule.progressive_resizing"
            raise UserError("data.balanced_sampling", reason)
        return BalancedBatches(source.targets, *options)
    if config.data.ffcv_order == "random":
        return MicroBatches(len(source), *options)
    base, indices = unwrap_subset(source)
    if not isinstance(base, FFCVImages):
        raise UserError("data.ffcv_order", "quasi_random requires data.source ffcv")
    return QuasiRandomBatches(base.beton.pages[indices], len(source), *options)


class QuasiRandomBatches(MicroBatches):
    """Micro-batches in an order that reads a file by its pages.

    The pages, (images,), are shuffled; the images of the pages of `BATCHES_PER_SHUFFLE` batches are shuffled
    together. The order is a function of (seed, epoch), and an epoch has every image once.
    """

    def __init__(self, pages: np.ndarray, *options: int) -> None:
        super().__init__(*options)
        self._pages = np.unique(pages, return_inverse=True)[1].reshape(-1)
        self._order: tuple[int, np.ndarray] | None = None

    def shuffled(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the image indices at positions of an order of all images."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        return self._order[1][positions]

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng(seed_sequence(self.seed, "quasi-random order", epoch))
        page_ranks = rng.permutation(self._pages.max() + 1)
        by_page = np.argsort(page_ranks[self._pages], kind="stable")
        group_size = max(1, BATCHES_PER_SHUFFLE * self.batch_size // self.repeats)
        groups = [by_page[first : first + group_size] for first in range(0, self.num_images, group_size)]
        return np.concatenate([rng.permutation(group) for group in groups])


@dataclass
class _PendingBatch:
    """A micro-batch that threads are decoding."""

    keys: Sequence[Key]
    plans: list[AugmentationPlan]
    images: Tensor
    """(B, H, W, 3), uint8."""
    tasks: list[Future[list[int]]]
    """Each returns the indices of the images that FFCV could not decode."""


class FFCVTrainLoader(MicroBatchLoader):
    """Micro-batches of a .beton file, decoded by threads.

    A view is equal to the one that other sources make of the stored image: the draws are the same for the
    same (seed, epoch, index, view), for any number of threads and from any step on. Images that FFCV does not
    decode are loaded as other sources load them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        load_decoder()
        source, self._indices = unwrap_subset(self.views.source)
        assert isinstance(self.views.transform.crop, RandomResizedCrop)
        assert isinstance(source, FFCVImages)
        self._beton = source.beton
        self._crop = self.views.transform.crop
        self._planner = AugmentationPlanner(self.views.transform)
        self._pool = ThreadPoolExecutor(max(1, self.options.workers), thread_name_prefix="ffcv")
        self._pin_memory = self._augment_on_batches = self.options.device.type == "cuda"
        self._pending: deque[_PendingBatch] = deque()

    def _load_epoch(self) -> Iterator[tuple[object, ...]]:
        for unfinished in self._pending:
            for task in unfinished.tasks:
                task.cancel()
        keys = iter(self.micro_batches)
        pending: deque[_PendingBatch] = deque()
        self._pending = pending
        for _ in range(PREFETCHED_BATCHES):
            self._submit(next(keys, None), pending)
        return self._collect(keys, pending)

    def _submit(self, keys: Sequence[Key] | None, pending: deque[_PendingBatch]) -> None:
        """Draw the plans of a micro-batch, and let threads decode, crop and flip its images."""
        if keys is None:
            return
        plans = []
        for key in keys:
            index = self._indices[key[1]]
            with seeded(self.views.seed, "augmentation", *key):
                plans.append(self._planner(int(self._beton.widths[index]), int(self._beton.heights[index])))
        shape = (len(keys), *as_size(self._crop.size), 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        starts = range(0, len(keys), IMAGES_PER_TASK)
        parts = [range(len(keys))[first : first + IMAGES_PER_TASK] for first in starts]
        tasks = [self._pool.submit(self._decode, images.numpy(), keys, plans, part) for part in parts]
        pending.append(_PendingBatch(keys, plans, images, tasks))

    def _decode(
        self, images: np.ndarray, keys: Sequence[Key], plans: Sequence[AugmentationPlan], part: range
    ) -> list[int]:
        """Decode and augment some images of a batch in place, and return the indices of unreadable ones."""
        unreadable = []
        for index in part:
            plan = plans[index]
            try:
                stored = StoredImage(self._beton, int(self._indices[keys[index][1]]))
                pixels = self._crop.crop(stored, plan.box, plan.interpolation)
            except ValueError:
                unreadable.append(index)
                continue
            for flip in plan.flips:
                pixels = flip.flip(pixels)
            if plan.operations and not self._augment_on_batches:
                pixels = np.asarray(batch_augment.apply_to_image(Image.fromarray(pixels), plan.operations))
            images[index] = pixels
        return unreadable

    def _collect(
        self, keys: Iterator[Sequence[Key]], pending: deque[_PendingBatch]
    ) -> Iterator[tuple[Tensor, Tensor, list[list[Operation]], ErasedRegions]]:
        """Yield decoded batches: images (B, 3, H, W) uint8, targets, and the arguments of `_finish`."""
        while pending:
            batch = pending.popleft()
            unreadable = [index for task in batch.tasks for index in task.result()]
            self._submit(next(keys, None), pending)
            targets = torch.from_numpy(self.views.source.targets[[index for _, index, _ in batch.keys]])
            for index in unreadable:
                pixels, targets[index], (batch.plans[index].erasing,) = self._load_view(batch.keys[index])
                batch.images[index] = pixels.permute(1, 2, 0)  # (C, H, W) -> (H, W, C)
                batch.plans[index].operations.clear()  # already applied
            erased = collate_erasing([plan.erasing for plan in batch.plans])
            if self._pin_memory:
                targets = targets.pin_memory()
                erased = erased._replace(values=erased.values.pin_memory())
            operations = [plan.operations for plan in batch.plans] if self._augment_on_batches else []
            yield batch.images.permute(0, 3, 1, 2), targets, operations, erased

    def _load_view(self, key: Key) -> TrainSample:
        """Load by Pillow what FFCV does not decode, or the image that replaces it."""
        sample = self.views[key]
        if sample.content is None:
            raise sample.unreadable[0].error()
        self._record(sample.unreadable)
        return sample.content

    def _finish(self, images: Tensor, operations: Sequence[Sequence[Operation]], *arguments: Any) -> Tensor:
        if operations:
            images = batch_augment.apply_to_batch(images.contiguous(), operations)
        return super()._finish(images, *arguments)
