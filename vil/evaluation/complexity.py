"""Parameters and FLOPs of a model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vil.config import Size, as_size


@dataclass(frozen=True)
class Complexity:
    """Parameters (shared ones count once, buffers do not), and multiply-adds of one image as `flops`."""

    params: int
    flops: int


def measure_complexity(model: nn.Module, image_size: int | Size, in_chans: int) -> Complexity:
    """Count the parameters of `model`, and its multiply-adds for one image of (height, width) in pixels."""
    return Complexity(count_parameters(model), multiply_adds(model, image_size, in_chans))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, image_size: int | Size, in_chans: int) -> int:
    """Return the multiply-adds of a forward pass of one image of (height, width) = `image_size`, in pixels.

    A model with a method `multiply_adds((height, width))` computes them itself, which also covers fused
    kernels. Any other runs once in eval mode under PyTorch's counter of matrix products and convolutions.
    """
    formula = getattr(model, "multiply_adds", None)
    if callable(formula):
        return int(formula(as_size(image_size)))
    # The counter's hooks fail on views of parameters that require gradients (CaiT, PiT).
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, in_chans, *as_size(image_size), device=parameter.device, dtype=parameter.dtype)
    # The math backend splits attention into products that the counter supports on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2
