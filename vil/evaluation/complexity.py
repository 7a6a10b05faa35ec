"""Parameters and FLOPs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vil.runtime.modes import mode


@dataclass(frozen=True)
class Complexity:
    """Cost of a model on any machine.

    Attributes:
        params: number of parameters; shared ones count once, buffers do not count.
        flops: multiply-adds of a forward pass of one image, the convention of papers in this field.
    """

    params: int
    flops: int


def measure_complexity(model: nn.Module, image_size: int, in_chans: int) -> Complexity:
    """Count the parameters of `model`, and its multiply-adds for one square image."""
    return Complexity(count_parameters(model), multiply_adds(model, image_size, in_chans))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, image_size: int, in_chans: int) -> int:
    """Return the multiply-adds of a forward pass of one image.

    A model with a method `multiply_adds((height, width))` computes them itself, which also covers fused
    kernels. Any other runs once in eval mode under PyTorch's counter of matrix products and convolutions.
    """
    formula = getattr(model, "multiply_adds", None)
    if callable(formula):
        return int(formula((image_size, image_size)))
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, in_chans, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    # The math backend splits attention into products that the counter supports on every device. The counter's
    # hooks fail on views of parameters that require gradients (CaiT, PiT).
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
    """Disable the gradients of all parameters, and restore those that were enabled."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
