"""Batches on the device before they are asked for, the last part of their recipe done there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Erasures(NamedTuple):
    """What random erasing writes over parts of normalised images."""

    places: Tensor
    """(P, 5), int64: image of the batch, first row, first column, rows, columns."""
    values: Tensor
    """(Σ C·rows·columns,), float32: what is written, one part after the other."""


class ErasingPlan:
    """In place of a normalised image (C, H, W): writes down what timm's random erasing would write to it.

    Its draws are those of erasing the image itself, in a worker process: the bytes travel to the device with
    little more, and the images there are the same.
    """

    def __init__(self) -> None:
        self.places: list[tuple[int, int, int, int]] = []
        self.values: list[Tensor] = []

    @classmethod
    def draw(cls, erasing: Callable[[Tensor], Tensor] | None, shape: Sequence[int]) -> ErasingPlan:
        """The erasing of one image of `shape` (C, H, W), from the global generators."""
        plan = cls()
        if erasing is not None:
            assert isinstance(erasing, RandomErasing)
            channels, height, width = shape
            erasing._erase(plan, channels, height, width, torch.float32)
        return plan

    def __setitem__(self, place: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = place
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.places.append((rows.start, columns.start, height, width))
        self.values.append(values.expand(values.shape[0], height, width).flatten())


def erasures(plans: Sequence[ErasingPlan]) -> Erasures:
    """The erasing of a batch, one plan per image."""
    places = [(image, *place) for image, plan in enumerate(plans) for place in plan.places]
    values = [values for plan in plans for values in plan.values]
    return Erasures(torch.tensor(places, dtype=torch.int64).view(-1, 5), torch.cat([torch.empty(0), *values]))


class Finish:
    """Normalises a batch of bytes on the device, and erases parts of it.

    Args:
        mean: of the channels, for values in 0..1, (C, 1, 1).
        std: likewise.
        device: of the batches.
    """

    def __init__(self, mean: Tensor, std: Tensor, device: torch.device) -> None:
        self._mean, self._std = mean.to(device), std.to(device)
        # A tensor, not a number, by which a GPU would multiply its inverse: that rounds otherwise than a CPU.
        self._levels = torch.tensor([255.0], device=device)

    def __call__(self, images: Tensor, erased: Erasures | None = None) -> Tensor:
        """(B, C, H, W) uint8 -> float32, in the layout of a batch that was normalised before.

        The places stay on the CPU: nothing here waits for the device.
        """
        normalised = images.contiguous().float().div_(self._levels).sub_(self._mean).div_(self._std)
        if erased is None or not len(erased.places):
            return normalised
        values = erased.values.to(images.device, non_blocking=True)
        first, channels = 0, images.shape[1]
        for image, top, left, rows, columns in erased.places.tolist():
            end = first + channels * rows * columns
            part = values[first:end].view(channels, rows, columns)
            normalised[image, :, top : top + rows, left : left + columns] = part
            first = end
        return normalised


def to_device(
    batches: Iterable[tuple[Any, ...]],
    device: torch.device,
    channels_last: bool = False,
    finish: Callable[..., Tensor] | None = None,
) -> Iterator[Batch]:
    """Yields the batches on `device`.

    On a GPU the next batch is copied, and finished, on a side stream while the current one is computed on;
    the copies overlap with the computation only from pinned memory. On the CPU nothing is copied. The time
    that `next` takes is the time for which data was waited for.

    Args:
        batches: (images (B, C, H, W), targets) on the CPU, and what else `finish` takes.
        device: where to.
        channels_last: lay the images out channels-last.
        finish: makes the images of a batch, on the device, of what came with it beside the targets.
    """

    def moved(images: Tensor, targets: Tensor, *more: Any) -> Batch:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        if finish is not None:
            images = finish(images, *more)
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images, targets

    if device.type != "cuda":
        for batch in batches:
            yield moved(*batch)
        return
    stream = torch.cuda.Stream(device)
    current: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = moved(*batch)
            copied = stream.record_event()
        if current is not None:
            yield current
        torch.cuda.current_stream(device).wait_event(copied)
        for tensor in following:
            # The memory belongs to the side stream, which must not reuse it before this stream is done.
            tensor.record_stream(torch.cuda.current_stream(device))
        current = following
    if current is not None:
        yield current
