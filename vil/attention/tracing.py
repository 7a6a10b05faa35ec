"""Properties of the current trace, evaluated by torch.compile once, while tracing, and not in the graph.

PyTorch's functions are not sufficient: in torch 2.11 Dynamo evaluates `torch.compiler.is_exporting()` as
True in plain `torch.compile` as well (pytorch/pytorch#176347), and cannot trace
`torch.amp.is_autocast_available`. A function marked `assume_constant_result` runs as ordinary Python instead,
and its result is a constant of the graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return True while torch.export, the ONNX exporter or torch.jit.trace records a graph."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def _is_in_grad() -> bool:
    """Return True in `torch.func.grad` and the like. Compiled graphs are specific to the transforms."""
    transforms = _functorch.get_interpreter_stack() or []
    return any(transform.key() == _functorch.TransformType.Grad for transform in transforms)


def is_transformed() -> bool:
    """Return True in `torch.func.grad` and the like, and while derivatives are computed in forward mode.

    Operators of `torch.library.custom_op` support neither. Forward mode is not refused by PyTorch 2.11: the
    derivatives are zero. `torch.func.vmap` alone is supported.
    """
    # torch.func.jvp begins a level, too. Not a constant of compiled graphs, which may be called in one later.
    return forward_ad._current_level >= 0 or _is_in_grad()


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Return True if PyTorch has mixed precision for devices of this type, enabled or not."""
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context without autocast; it does nothing for devices that have none, such as `meta`."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def is_autocast_enabled(tensor: Tensor) -> bool:
    """Return True if autocast is on for the device of the tensor."""
    device_type = tensor.device.type
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)
