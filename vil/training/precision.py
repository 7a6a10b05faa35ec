"""Mixed precision: which one a device offers, autocast for the forward pass, and the scaling of float16."""

from __future__ import annotations

import os

import torch

from vil.config import ConfigError, Precision

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(precision: Precision | None, device: torch.device) -> Precision:
    """The precision to use on `device`; None chooses bfloat16 on a GPU that computes it, else float32.

    A CPU computes both 16-bit formats, if slowly where it lacks the instructions. From here on convolutions
    of this process are float32 on a GPU as well, as products of matrices are: PyTorch's default is TF32.

    Raises:
        ConfigError: bfloat16 on a GPU that would only emulate it (before NVIDIA's Ampere).
    """
    torch.backends.cudnn.allow_tf32 = False
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision is None:
        return "bfloat16" if device.type == "cuda" and has_bfloat16 else "float32"
    if precision == "bfloat16" and not has_bfloat16:
        name = torch.cuda.get_device_name(device)
        raise ConfigError("precision", f"{name} does not compute in bfloat16; use float16 or float32")
    return precision


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward pass; does nothing for float32."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "float32")


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """The scaler of the loss, without which small float16 gradients vanish; passes through for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def set_deterministic(wanted: bool) -> None:
    """Has PyTorch use deterministic algorithms only, and raise an error where an operator has none.

    The libraries of a GPU need a setting from the environment for it, before they are first used.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)
