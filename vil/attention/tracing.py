"""Questions about the current trace that torch.compile answers once, while it traces, and puts into no graph.

PyTorch's own functions are not enough: in torch 2.11 Dynamo takes `torch.compiler.is_exporting()` for True in
plain `torch.compile` as well (pytorch/pytorch#176347), and cannot trace `torch.amp.is_autocast_available`. A
function marked `assume_constant_result` runs as ordinary Python instead, with its result in the graph.
"""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return True while torch.export, the ONNX exporter or torch.jit.trace records a graph."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Return True if PyTorch has mixed precision for devices of this type, enabled or not."""
    return torch.amp.is_autocast_available(device_type)
