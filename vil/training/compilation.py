"""Compile the network of a run by torch.compile."""

from __future__ import annotations

import torch
from torch import nn

from vil.config import ScheduleConfig, TrainConfig
from vil.errors import UserError
from vil.validation import suggestion

_CUDA_GRAPHS = ("cudagraphs", "reduce-overhead", "max-autotune")
"""Backends and modes of torch.compile that record CUDA graphs."""


def check_compile_options(config: TrainConfig) -> None:
    """Raise UserError for a backend or a mode of torch.compile that cannot be used."""
    options = {"compile_backend": config.compile_backend, "compile_mode": config.compile_mode}
    for option, value in options.items():
        if value is not None and not config.compile:
            raise UserError(option, "needs compile: true")
        if value in _CUDA_GRAPHS:
            reason = f"{value} records CUDA graphs, which are not verified with cached masks"
            raise UserError(option, f"{reason}; use inductor, or max-autotune-no-cudagraphs")
    backend = config.compile_backend
    if backend is None or backend == "inductor":
        return
    backends = torch._dynamo.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(
            "compile_backend", f"PyTorch has no backend {backend!r}{suggestion(backend, backends)}"
        )
    if config.compile_mode is not None:
        raise UserError("compile_mode", f"is for compile_backend inductor, not for {backend}")


def compile_network(network: nn.Module, config: TrainConfig) -> nn.Module:
    """Return the network compiled, with one graph for each shape of its images."""
    # Beyond its limit of recompilations, PyTorch would run without the compiler.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, count_graphs(config.schedule))
    options = {"backend": config.compile_backend, "mode": config.compile_mode}
    given = {name: value for name, value in options.items() if value is not None}
    compiled: nn.Module = torch.compile(network, dynamic=False, **given)  # type: ignore[call-overload]
    return compiled


def count_graphs(schedule: ScheduleConfig) -> int:
    """Return the most graphs of a run: each image size, before and after random shift, and the teacher."""
    sizes = [*(schedule.progressive_resizing or []), *(schedule.random_sizes or [])]
    return 2 * (1 + len(sizes)) + (schedule.distillation != "none")
