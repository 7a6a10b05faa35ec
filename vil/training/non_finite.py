"""Skip optimizer steps whose loss or gradient is not finite, without a synchronization with the device."""

from __future__ import annotations

import torch
from torch import nn


def batch_norm_buffers(model: nn.Module, training: bool | None = None) -> list[torch.Tensor]:
    """Return the running statistics of `model`, the counters of batches included.

    `training` selects the layers in train or in evaluation mode; None selects all.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [b for norm in norms if training in (None, norm.training) for b in norm.buffers()]


def loss_grad(loss: torch.Tensor) -> torch.Tensor:
    """Return the gradient for `loss.backward`, a scalar: 1, or NaN if the loss is not finite.

    The gradients of a loss that is not finite may be finite. NaN makes them NaN, and the all-reduce of the
    gradients brings it to all ranks.
    """
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


class NonFiniteSkipper:
    """Call `optimizer.step`, and skip it if the gradient is not finite.

    PyTorch's fused optimizers skip on the device, by the tensor `found_inf` that a loss scaler sets; with any
    other optimizer, each step waits for the device.

    Args:
        optimizer: the optimizer.
        model: its running statistics (batch norm) are restored after a skipped step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._has_state = any(group.get("momentum", 1) for group in optimizer.param_groups)
        self._statistics = batch_norm_buffers(model)
        self._saved_statistics: list[torch.Tensor] = []

    def save_statistics(self) -> None:
        """Copy the running statistics; call it before the forward passes of a step."""
        self._saved_statistics = [buffer.clone() for buffer in self._statistics]

    def step(self, is_finite: torch.Tensor) -> None:
        """Step the optimizer if `is_finite` (a scalar, bool, on the device, equal on all ranks)."""
        # A fused SGD that skips its first step never writes the momentum that it allocates for it.
        is_initialized = self._optimizer.state or not self._has_state
        if self._skips_on_device and is_initialized:
            self._optimizer.found_inf = (~is_finite).to(torch.float32)  # type: ignore[attr-defined]
            self._optimizer.step()
        elif is_finite:
            if self._skips_on_device:
                self._optimizer.found_inf = None  # type: ignore[attr-defined]
            self._optimizer.step()
        for buffer, saved in zip(self._statistics, self._saved_statistics):
            buffer.copy_(torch.where(is_finite, buffer, saved))
