"""Batches on the device before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


def to_device(batches: Iterable[Batch], device: torch.device, channels_last: bool = False) -> Iterator[Batch]:
    """Yields the batches on `device`.

    On a GPU the next batch is copied on a side stream while the current one is computed on; the copies
    overlap with the computation only from pinned memory. On the CPU nothing is copied. The time that `next`
    takes is the time for which data was waited for.

    Args:
        batches: (images (B, C, H, W), targets) on the CPU.
        device: where to.
        channels_last: lay the images out channels-last.
    """

    def moved(images: Tensor, targets: Tensor) -> Batch:
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if channels_last else images, targets

    if device.type != "cuda":
        for images, targets in batches:
            yield moved(images, targets)
        return
    stream = torch.cuda.Stream(device)
    current: Batch | None = None
    for images, targets in batches:
        with torch.cuda.stream(stream):
            following = moved(images, targets)
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
