"""Limit of a model's memory, checked before it is allocated."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch
from torch import nn

from vil.errors import UserError


class ModelTooLargeError(UserError):
    """The weights of a model take more memory than allowed."""


def total_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_model_size(build: Callable[[], nn.Module], location: str, max_bytes: int | None = None) -> None:
    """Raise ModelTooLargeError if the weights of a model take more than `max_bytes`.

    The model is built on the meta device, which allocates nothing, and draws no random numbers.

    Args:
        build: builds the model on the default device.
        location: `location` of the error.
        max_bytes: limit of parameters and buffers in bytes; None is the memory of this machine.
    """
    limit = total_memory() if max_bytes is None else max_bytes
    size = f"the {limit / 1e9:.0f} GB of this machine" if max_bytes is None else f"{limit / 1e6:,.0f} MB"
    reason = f"takes more memory for its weights than {size}"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build()
    except RuntimeError as error:
        if "overflow" not in str(error):  # the number of bytes of one tensor exceeds 64 bits
            raise
        raise ModelTooLargeError(location, reason) from None
    tensors = itertools.chain(model.parameters(), model.buffers())
    if sum(tensor.nbytes for tensor in tensors) > limit:
        raise ModelTooLargeError(location, reason)
