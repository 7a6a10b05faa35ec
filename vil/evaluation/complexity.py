"""Parameters and FLOPs of a model, without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vil.modes import mode


@dataclass(frozen=True)
class Complexity:
    """What a model costs whatever the machine.

    Attributes:
        params: numbers in its parameters; one that is shared counts once, buffers do not count.
        flops: multiply-adds of one forward pass of one image, as papers of this field count them.
    """

    params: int
    flops: int


def measure_complexity(model: nn.Module, image_size: int, in_chans: int) -> Complexity:
    """Parameters and multiply-adds of `model` for one image (in_chans, image_size, image_size)."""
    return Complexity(
        sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds(model, image_size, in_chans),
    )


def multiply_adds(model: nn.Module, image_size: int, in_chans: int) -> int:
    """Multiply-adds of one forward pass of one image.

    A model with a method `multiply_adds((height, width))` is asked: its formula also knows fused kernels. Any
    other runs once, in eval mode, under PyTorch's counter of matrix products and convolutions.
    """
    formula = getattr(model, "multiply_adds", None)
    if callable(formula):
        return int(formula((image_size, image_size)))
    some_tensor = next(model.parameters(), torch.empty(0))
    image = torch.zeros(
        1, in_chans, image_size, image_size, device=some_tensor.device, dtype=some_tensor.dtype
    )
    # The math backend takes attention apart into the products that the counter knows on every device. The
    # counter's hooks break on views of parameters that need gradients (CaiT, PiT), so none does here.
    with (
        torch.no_grad(),
        mode(model, training=False),
        _frozen(model),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(image)
    return counter.get_total_flops() // 2


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter need a gradient inside; afterwards each is as it was."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
