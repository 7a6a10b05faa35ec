"""Training images from FFCV's files: threads of this process decode and crop them, nothing is copied between
processes, and on a GPU the rest of the recipe is done there on whole batches.

FFCV's files and its decoder are used, its `Loader` is not. That draws crops and flips from generators that no
seed reaches once there are several threads, so that no run could be repeated or continued; it hands out
buffers that it overwrites, never ends the threads of an epoch that was left, and changes PyTorch's number of
threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
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

from data.bad_images import BadImages
from data.batch_augment import Plan, Planner, finished, on_batch, on_image, plannable
from data.beton import Beton
from data.loaders import Replaced, TrainingViews, Unreadable
from data.prefetch import Batch
from data.randomness import seeded
from data.samplers import Key, MicroBatches
from data.sources import Source
from data.sources.beton import BetonImages
from data.subsets import origin
from data.transforms import RandomResizedCrop
from vil.config import ConfigError
from vil.randomness import seed_sequence

INSTALL = "sudo apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install ffcv"
AHEAD = 3
"""Micro-batches that are being made while one is trained on."""
IMAGES_PER_TASK = 8
BATCHES_TOGETHER = 8
"""quasi_random: the images of so many batches, of neighbouring pages, are shuffled among themselves."""


def missing_ffcv(error: object) -> ConfigError:
    """The line that says how to install FFCV."""
    reason = " ".join(str(error).split())
    return ConfigError("data.source", f"ffcv needs the package FFCV ({reason}); to install it: {INSTALL}")


def import_ffcv() -> None:
    """Imports FFCV as a whole, which takes seconds and which only writing needs; ConfigError without it."""
    try:
        importlib.import_module("ffcv.writer")
    except Exception as error:  # a package that was built for other libraries raises many kinds
        raise missing_ffcv(error) from None


@functools.cache
def decoder() -> Any:
    """FFCV's decoder of JPEGs, a function of its C library; ConfigError without FFCV."""
    package = importlib.util.find_spec("ffcv")
    for folder in (package.submodule_search_locations or ()) if package else ():
        for library in sorted(Path(folder).glob("_libffcv*")):
            try:
                decode = ctypes.CDLL(str(library)).imdecode
            except (OSError, AttributeError) as error:
                raise missing_ffcv(error) from None
            decode.argtypes = [
                ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p,
                *[ctypes.c_uint32] * 6, ctypes.c_bool, ctypes.c_bool,
            ]  # fmt: skip
            return decode
    raise missing_ffcv("it is not installed")


class StoredImage:
    """An image of a .beton file, of which FFCV decodes what a crop needs.

    Args:
        beton: the file.
        index: of the image.
    """

    def __init__(self, beton: Beton, index: int) -> None:
        self._beton, self._index = beton, index

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return int(self._beton.widths[self._index]), int(self._beton.heights[self._index])

    def pixels(self, scale: int = 1) -> np.ndarray:
        """(H, W, 3) uint8; of a JPEG at one `scale`-th of its size, rounded up.

        Raises:
            ValueError: FFCV does not decode it.
        """
        stored = self._beton.stored(self._index)
        if stored.ndim == 3:
            return stored
        width, height = self.size
        pixels = np.empty((-(-height // scale), -(-width // scale), 3), np.uint8)
        status = decoder()(
            stored.ctypes.data, stored.size, height, width, pixels.ctypes.data,
            height, width, 0, 0, 1, scale, False, False,
        )  # fmt: skip
        if status != 0:
            raise ValueError("FFCV cannot decode it")
        return pixels


def reads_ffcv(views: TrainingViews) -> bool:
    """Whether the images lie in a .beton file, and the recipe is one for `FFCVTrainLoader`.

    Other recipes, those with AugMix, another crop or grey images, are left to worker processes, which read
    the same file.
    """
    return isinstance(origin(views.source)[0], BetonImages) and plannable(views.transform)


def build_micro_batches(source: Source, order: str, *parts: int) -> MicroBatches:
    """The micro-batches of a source, in the order that `data.ffcv_order` names.

    Raises:
        ConfigError: a quasi-random order of images that lie in no .beton file, or what `MicroBatches` raises.
    """
    if order == "random":
        return MicroBatches(len(source), *parts)
    whole, indices = origin(source)
    if not isinstance(whole, BetonImages):
        raise ConfigError("data.ffcv_order", "quasi_random goes with data.source ffcv alone")
    return QuasiRandomBatches(whole.beton.pages[indices], len(source), *parts)


class QuasiRandomBatches(MicroBatches):
    """Micro-batches in an order that reads a file by its pages.

    The pages are shuffled; as many of them as hold `BATCHES_TOGETHER` batches are read together, and their
    images shuffled. It is a function of (seed, epoch), and an epoch sees every image once.

    Args:
        pages: (images,), the page on which each image lies.
        options: of `MicroBatches`.
    """

    def __init__(self, pages: np.ndarray, *options: Any) -> None:
        super().__init__(*options)
        self._pages = np.unique(pages, return_inverse=True)[1].reshape(-1)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and views of an epoch, each (num_images,), over all ranks."""
        rng = np.random.default_rng(seed_sequence(self.seed, "quasi-random order", epoch))
        rank_of_page = rng.permutation(self._pages.max() + 1)
        by_page = np.argsort(rank_of_page[self._pages], kind="stable")
        together = max(1, BATCHES_TOGETHER * self.batch_size // self.repeats)
        parts = [by_page[first : first + together] for first in range(0, self.num_images, together)]
        images = np.concatenate([rng.permutation(part) for part in parts])
        images_seen = -(-self.num_images // self.repeats)
        indices = images[:images_seen].repeat(self.repeats)[: self.num_images]
        return indices, np.arange(self.num_images) % self.repeats


@dataclass
class _Pending:
    """A micro-batch that threads are at work on."""

    keys: Sequence[Key]
    plans: list[Plan]
    images: Tensor
    """(B, size, size, 3), uint8."""
    tasks: list[Future[list[int]]]
    """Each returns the places of the images that could not be decoded."""


class FFCVTrainLoader:
    """Augmented micro-batches of a .beton file; as `data.loaders.TrainLoader`.

    A view is the one that the other sources would make of the stored image: the same draws for the same
    (seed, epoch, index, view), for any number of threads and from any step on.

    Args:
        views: of images of a .beton file; they also answer for those that FFCV refuses.
        micro_batches: their order.
        threads: that decode.
        device: where the batches are wanted.
        channels_last: lay the images out channels-last.
        bad_images: where to note images that were replaced.

    Raises:
        ConfigError: FFCV is not installed.
    """

    def __init__(
        self,
        views: TrainingViews,
        micro_batches: MicroBatches,
        threads: int,
        device: torch.device,
        channels_last: bool,
        bad_images: BadImages,
    ) -> None:
        decoder()
        transform = views.transform
        assert isinstance(transform.crop, RandomResizedCrop)
        self.steps_per_epoch = micro_batches.steps_per_epoch
        self.num_images = micro_batches.num_images
        self._crop = transform.crop
        self._planner = Planner(transform)
        self._views = TrainingViews(views.source, transform, views.seed, views.on_error, normalised=False)
        source, self._indices = origin(views.source)
        assert isinstance(source, BetonImages)
        self._beton = source.beton
        self._micro_batches = micro_batches
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="ffcv")
        self._device = device
        self._on_gpu = self._on_batches = device.type == "cuda"
        self._channels_last = channels_last
        self._bad_images = bad_images
        self._mean, self._std = transform.mean.to(device), transform.std.to(device)
        self._pending: deque[_Pending] = deque()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Micro-batches of one epoch, `accumulation` per step, from step `start` on; none before it is read.

        Loading begins with the call. Only one epoch can be under way: the next call ends the one before.

        Returns:
            (images (B, 3, H, W) float32, targets (B,) int64) of this rank.

        Raises:
            ConfigError: from the iterator, naming an image that cannot be decoded; or too many cannot.
        """
        for left in self._pending:
            for task in left.tasks:
                task.cancel()
        self._micro_batches.choose(epoch, start)
        keys = iter(self._micro_batches)
        pending: deque[_Pending] = deque()
        self._pending = pending
        for _ in range(AHEAD):
            self._begin(next(keys, None), pending)
        made = self._made(keys, pending)
        return self._ahead(made) if self._on_gpu else made

    def samples(self, epoch: int, step: int) -> list[str]:
        """The images of one step's global batch, as they are called where one cannot be read."""
        return [self._views.source.describe(index) for index in self._micro_batches.images(epoch, step)]

    def _begin(self, keys: Sequence[Key] | None, pending: deque[_Pending]) -> None:
        """Draws what happens to the images of a micro-batch, and sets threads to work on them."""
        if keys is None:
            return
        plans = []
        for key in keys:
            place = self._indices[key[1]]
            with seeded(self._views.seed, "augmentation", *key):
                plans.append(self._planner(int(self._beton.widths[place]), int(self._beton.heights[place])))
        size = self._crop.size
        images = torch.empty((len(keys), size, size, 3), dtype=torch.uint8, pin_memory=self._on_gpu)
        parts = [range(len(keys))[first : first + IMAGES_PER_TASK]
                 for first in range(0, len(keys), IMAGES_PER_TASK)]  # fmt: skip
        tasks = [self._pool.submit(self._fill, images.numpy(), keys, plans, part) for part in parts]
        pending.append(_Pending(keys, plans, images, tasks))

    def _fill(self, images: np.ndarray, keys: Sequence[Key], plans: Sequence[Plan], part: range) -> list[int]:
        """Decodes, crops and flips some images of a batch, and on the CPU carries out the policy on them."""
        unreadable = []
        for place in part:
            plan = plans[place]
            try:
                stored = StoredImage(self._beton, int(self._indices[keys[place][1]]))
                pixels = self._crop.cut(stored, plan.box, plan.interpolation)
            except ValueError:
                unreadable.append(place)
                continue
            for flip in plan.flips:
                pixels = flip.mirrored(pixels)
            if plan.steps and not self._on_batches:
                pixels = np.asarray(on_image(Image.fromarray(pixels), plan.steps))
            images[place] = pixels
        return unreadable

    def _made(self, keys: Iterator[Sequence[Key]], pending: deque[_Pending]) -> Iterator[Batch]:
        while pending:
            batch = pending.popleft()
            unreadable = [place for task in batch.tasks for place in task.result()]
            self._begin(next(keys, None), pending)
            targets = torch.from_numpy(self._views.source.targets[[index for _, index, _ in batch.keys]])
            for place in unreadable:
                pixels, targets[place] = self._replaced(batch.keys[place])
                batch.images[place] = pixels.permute(1, 2, 0)
                batch.plans[place].steps.clear()  # this one has been through its policy
            yield self._finished(batch, targets)

    def _replaced(self, key: Key) -> tuple[Tensor, int]:
        """What Pillow makes of an image that FFCV refuses, or the image in its place, bytes (3, H, W)."""
        sample = self._views[key]
        if isinstance(sample, Unreadable):
            raise ConfigError("data.root", f"{sample.image}: cannot be read: {sample.reason}")
        if isinstance(sample, Replaced):
            for image in sample.unreadable:
                self._bad_images.add(image.image, image.reason)
            return sample.sample
        return sample

    def _finished(self, batch: _Pending, targets: Tensor) -> Batch:
        """The rest of the recipe, on the device."""
        images = batch.images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        if self._on_gpu:
            targets = targets.pin_memory().to(self._device, non_blocking=True)
        if self._on_batches:
            images = on_batch(images.contiguous(), [plan.steps for plan in batch.plans])
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        images = images.contiguous(memory_format=layout)
        return finished(images, [plan.patches for plan in batch.plans], self._mean, self._std), targets

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Has the GPU make the next batch, on a side stream, while the current one is computed on."""
        stream = torch.cuda.Stream(self._device)
        current: Batch | None = None
        while True:
            with torch.cuda.stream(stream):
                following = next(batches, None)
                made = stream.record_event()
            if current is not None:
                yield current
            if following is None:
                return
            torch.cuda.current_stream(self._device).wait_event(made)
            for tensor in following:
                # The memory belongs to the side stream, which must not reuse it before this stream is done.
                tensor.record_stream(torch.cuda.current_stream(self._device))
            current = following
