"""Kernels that do not compile or launch: an error of one line, or a warning and another backend.

The decision is made inside the operator's implementation, which runs also in graphs of `torch.compile`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch

from vil.config import ConfigError

_logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_failed: set[Hashable] = set()
"""Kinds of calls whose kernels failed in this process."""
_reported: set[str] = set()
"""Warnings that were given."""


class KernelError(ConfigError):
    """The kernels of a backend that was asked for by name failed, or the GPU can no longer be used."""


def failures() -> list[str]:
    """Return the warnings given so far in this process: empty where no kernel was replaced."""
    return sorted(_reported)


def forget_failures() -> None:
    """Try kernels again that failed; for tests."""
    _failed.clear()
    _reported.clear()


def run_kernels(
    kernels: Callable[[], Result],
    substitute: Callable[[], Result] | None,
    kind: Hashable,
    device: torch.device,
) -> Result:
    """Run `kernels`; where they fail, warn once and run `substitute` for all calls of this kind from then on.

    Args:
        kernels: compiles and launches them; may have written part of its own outputs when it fails.
        substitute: computes the same in another way; None where the kernels were asked for by name.
        kind: the same for a forward pass and its backward pass, so that both fall back.
        device: where the kernels run.

    Raises:
        KernelError: the kernels failed and there is no substitute; or the error destroyed the CUDA context
            (an illegal memory access, a failed assertion), after which nothing runs in this process.
        Exception: as it was, where memory was not enough or a CUDA graph is being captured.
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
            lost = f"the GPU cannot be used any more in this process after {reason}"
            raise KernelError("attention_backend", f"{lost}; if it happens again, use chunked") from error
        if substitute is None:
            raise KernelError("attention_backend", f"a kernel of fused fails: {reason}") from error
    # After the except clause, whose traceback keeps the failed attempt's tensors alive.
    _failed.add(kind)
    if reason not in _reported:
        _reported.add(reason)
        _logger.warning("warning: a kernel of the local attention fails, chunked is used instead: %s", reason)
    return substitute()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error)


def _is_usable(device: torch.device) -> bool:
    """Return False where a CUDA error is sticky: every later call then fails with it."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def _summary(error: Exception) -> str:
    """One line: Triton puts its source code in front of what is wrong with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    line = lines[-1] if "CompilationError" in type(error).__name__ else lines[0]
    return f"{type(error).__name__}: {line[:200]}"


def _versions(device: torch.device) -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"torch {torch.__version__}, triton {triton}, {name}"
