"""Mixed precision by autocast, loss scaling for float16, and deterministic algorithms."""

from __future__ import annotations

import os

import torch

from vil.config import Precision
from vil.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(precision: Precision | None, device: torch.device) -> Precision:
    """Return the precision to use on `device`; None is bfloat16 on a GPU that computes it, else float32.

    A CPU computes both 16-bit formats, slowly without the instructions. Turn off TF32, PyTorch's default for
    convolutions on GPUs: float32 is float32.

    Raises:
        UserError: bfloat16 on a GPU that would only emulate it (before NVIDIA's Ampere).
    """
    torch.backends.cudnn.allow_tf32 = False
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision is None:
        return "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if precision == "bfloat16" and not has_bfloat16:
        name = torch.cuda.get_device_name(device)
        raise UserError("precision", f"{name} does not compute in bfloat16; use float16 or float32")
    return precision


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass; it does nothing for float32."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "float32")


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler, enabled for float16, whose small gradients would vanish otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def set_deterministic(enabled: bool) -> None:
    """Restrict PyTorch to deterministic algorithms; operators that have none raise an error.

    Call it before the first CUDA operation: cuBLAS reads its setting from the environment.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)
