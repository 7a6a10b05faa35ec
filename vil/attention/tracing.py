"""Properties of the current trace, evaluated by torch.compile once, while tracing, and not in the graph.

PyTorch's functions are not sufficient: in torch 2.11 Dynamo evaluates `torch.compiler.is_exporting()` as
True in plain `torch.compile` as well (pytorch/pytorch#176347), and cannot trace
`torch.amp.is_autocast_available`. A function marked `assume_constant_result` runs as ordinary Python instead,
and its result is a constant of the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return True while torch.export, the ONNX exporter or torch.jit.trace records a graph."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Return True if PyTorch has mixed precision for devices of this type, enabled or not."""
    return torch.amp.is_autocast_available(device_type)


def is_autocast_enabled(tensor: Tensor) -> bool:
    """Return True if autocast is on for the device of the tensor."""
    device_type = tensor.device.type
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)
