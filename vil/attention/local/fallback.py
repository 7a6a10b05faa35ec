"""Handling of kernels that do not compile or launch: a one-line error, or a warning and another backend.

It is part of the operator's implementation, so that it also works in graphs of `torch.compile`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from vil.errors import UserError

_logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_failed: set[Hashable] = set()
"""Keys of calls whose kernels failed in this process."""
_reported: set[str] = set()
"""Reasons of the warnings logged in this process."""


class KernelError(UserError):
    """The kernels of a requested backend failed, or the GPU can no longer be used."""


def failures() -> list[str]:
    """Return the reasons of the warnings so far in this process; empty if no kernel was replaced."""
    return sorted(_reported)


def forget_failures() -> None:
    """Reset the recorded failures, so that kernels are tried again; for tests."""
    _failed.clear()
    _reported.clear()


def run_kernels(
    kernels: Callable[[], Result],
    substitute: Callable[[], Result] | None,
    kind: Hashable,
    device: torch.device,
) -> Result:
    """Run `kernels`; if they fail, warn once and run `substitute`, also for later calls of this kind.

    Args:
        kernels: compile and launch the kernels; their outputs may be partly written after a failure.
        substitute: another implementation; None if the kernels were requested by name.
        kind: key of the kernels, the same for a forward pass and its backward pass, so that both fall back.
        device: device of the kernels.

    Raises:
        KernelError: the kernels failed without a substitute; or the CUDA context is lost (illegal memory
            access, failed assertion), after which no kernel runs in this process.
        Exception: the original error, if memory is exhausted or a CUDA graph is being captured.
    """
    if substitute is not None and kind in _failed:
        return substitute()
    try:
        return kernels()
    except Exception as error:
        if _is_out_of_memory(error) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            raise
        reason = f"{_summary(error)} ({_versions(device)})"
        if not _is_usable(device):
            lost = f"the GPU can no longer be used in this process after {reason}"
            raise KernelError("attention_backend", f"{lost}; if it happens again, use chunked") from error
        if substitute is None:
            raise KernelError("attention_backend", f"a kernel of fused fails: {reason}") from error
    # Outside the except clause, whose traceback keeps tensors of the failed attempt alive.
    _failed.add(kind)
    if reason not in _reported:
        _reported.add(reason)
        _logger.warning("warning: a kernel of the local attention fails, chunked is used instead: %s", reason)
    return substitute()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error)


def _is_usable(device: torch.device) -> bool:
    """Return False if the CUDA context is lost, so that every later call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def _summary(error: Exception) -> str:
    """Return one line of the message; compilation errors of Triton quote source code before the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    line = lines[-1] if "CompilationError" in type(error).__name__ else lines[0]
    return f"{type(error).__name__}: {line[:200]}"


def _versions(device: torch.device) -> str:
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"torch {torch.__version__}, triton {triton.__version__}, {name}"
