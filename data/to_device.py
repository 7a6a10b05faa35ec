"""Move batches to the device, and normalize and erase them there.

Worker processes return bytes and the drawn erasing, a quarter of the memory of floats. This is the only
module that normalizes and erases, for a single image, for a CPU and for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) float32 and targets (B,) int64."""


class ErasedRegions(NamedTuple):
    """Rectangles of a batch that random erasing overwrites."""

    boxes: Tensor
    """(R, 5), int64: index of the image, top, left, height, width."""
    values: Tensor
    """(sum of C·height·width,), float32: the new values of one rectangle after the other."""


class ErasingPlan:
    """Stand-in for a normalized image (C, H, W) that records what timm's random erasing writes to it."""

    def __init__(self) -> None:
        self.boxes: list[tuple[int, int, int, int]] = []
        self.values: list[Tensor] = []

    @classmethod
    def draw(cls, erasing: RandomErasing | None, shape: Sequence[int]) -> ErasingPlan:
        """Draw the erasing of an image of `shape` (C, H, W) from the global generators, as timm does."""
        plan = cls()
        if erasing is not None:
            channels, height, width = shape
            erasing._erase(plan, channels, height, width, torch.float32)
        return plan

    def __setitem__(self, region: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = region
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.boxes.append((rows.start, columns.start, height, width))
        self.values.append(values.expand(values.shape[0], height, width).flatten())


def collate_erasing(plans: Sequence[ErasingPlan]) -> ErasedRegions:
    """Join the plans of the images of a batch."""
    boxes = [(index, *box) for index, plan in enumerate(plans) for box in plan.boxes]
    values = [values for plan in plans for values in plan.values]
    return ErasedRegions(
        torch.tensor(boxes, dtype=torch.int64).view(-1, 5), torch.cat([torch.empty(0), *values])
    )


class NormalizeAndErase:
    """Normalize a batch of bytes on a device by mean and std per channel, and erase parts of it."""

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
    ) -> None:
        self.mean, self.std = (
            torch.tensor(v, device=device)[:, None, None] for v in (mean, std)
        )  # (C, 1, 1)
        # A tensor, since a GPU multiplies by the inverse of a number, which rounds differently from a CPU.
        self._max_level = torch.tensor([255.0], device=device)

    def __call__(self, images: Tensor, erased: ErasedRegions | None = None) -> Tensor:
        """Return images (B, C, H, W) uint8 as float32, contiguous.

        The rectangles are on the CPU, so that nothing waits for the device.
        """
        # Not `contiguous().float()`, which keeps the strides of a gray image in the order (H, W, C).
        normalized = torch.empty(images.shape, device=images.device).copy_(images)
        normalized.div_(self._max_level).sub_(self.mean).div_(self.std)
        if erased is None or not len(erased.boxes):
            return normalized
        values = erased.values.to(images.device, non_blocking=True)
        first, channels = 0, images.shape[1]
        for index, top, left, height, width in erased.boxes.tolist():
            end = first + channels * height * width
            region = values[first:end].view(channels, height, width)
            normalized[index, :, top : top + height, left : left + width] = region
            first = end
        return normalized


def to_device(
    batches: Iterable[tuple[Any, ...]],
    device: torch.device,
    finish: Callable[..., Tensor],
    channels_last: bool = False,
) -> Iterator[Batch]:
    """Yield the batches on `device`.

    On a GPU a batch is copied and finished on a side stream, and yielded at once: the current stream waits
    for it, not the host. The copy overlaps with the computation queued before, from pinned memory only.
    The time that `next` takes is the time spent waiting for data.

    Args:
        batches: (images (B, C, H, W), targets, further arguments of `finish`) on the CPU.
        device: the target device.
        finish: maps the images on the device, and the further arguments, to the images of the batch.
        channels_last: convert the images to channels-last order.
    """

    def move(images: Tensor, targets: Tensor, *arguments: Any) -> Batch:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        images = finish(images, *arguments)
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images, targets

    if device.type != "cuda":
        for batch in batches:
            yield move(*batch)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = move(*batch)
            is_moved = stream.record_event()
        torch.cuda.current_stream(device).wait_event(is_moved)
        for tensor in moved:
            # The memory was allocated by the side stream, which must not reuse it before this stream is done.
            tensor.record_stream(torch.cuda.current_stream(device))
        yield moved
