"""Halve the batch of a forward pass when the GPU runs out of memory."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

_logger = logging.getLogger(__name__)


class BatchHalving:
    """Run a model on parts of each batch, which are halved when PyTorch runs out of memory.

    A smaller size is logged, and kept for all later batches.

    Attributes:
        max_images: images of a part; None for whole batches.
    """

    def __init__(self) -> None:
        self.max_images: int | None = None

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W).

        Raises:
            torch.OutOfMemoryError: a single image does not fit into memory.
        """
        before = size = min(self.max_images or len(images), len(images))
        while True:
            try:
                logits = torch.cat([model(part) for part in images.split(size)])
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
            torch.cuda.empty_cache()  # after the except clause, which keeps the tensors of the failed call
        if size < before:
            self.max_images = size
            _logger.info("out of memory with a batch of %d images: evaluated in parts of %d", before, size)
        return logits
