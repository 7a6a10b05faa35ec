"""The optimiser with its parameter groups, from timm.optim, and the learning rate of every step, from
timm.scheduler."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import auto_group_layers, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vil.config import ConfigError, ScheduleConfig

_FUSED = ("adam", "adamw", "sgd", "momentum")
"""timm's names of PyTorch's optimisers that can skip a step on the device, which their fused forms do."""

CONFIGURED = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "dampening")
"""Keys of an optimiser's parameter groups that a schedule sets; the others are state of the optimiser."""


def build_optimizer(model: nn.Module, schedule: ScheduleConfig) -> torch.optim.Optimizer:
    """The optimiser that `schedule` names, at its peak learning rate.

    Raises:
        ConfigError: the name is unknown to timm, or the optimiser does not take the options given.
    """
    name = schedule.optimizer.lower()
    kind = name.removeprefix("lookahead_")
    if kind not in list_optimizers():
        close = difflib.get_close_matches(kind, list_optimizers(), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; timm.optim.list_optimizers() names them"
        raise ConfigError("schedule.optimizer", f"timm knows no optimiser {schedule.optimizer!r}{hint}")
    info = get_optimizer_info(kind)
    if info.second_order:
        raise ConfigError(
            "schedule.optimizer", f"{name} needs second derivatives, which training never takes"
        )
    # The third β of an optimiser that has more than two keeps its default.
    options: dict[str, Any] = {"betas": schedule.betas} if info.has_betas and info.num_betas == 2 else {}
    if schedule.eps is not None:
        options["eps"] = schedule.eps
    if schedule.dampening:
        options["dampening"] = schedule.dampening
    if name in _FUSED:
        options["fused"] = True
    try:
        return create_optimizer_v2(
            parameter_groups(model, schedule),
            opt=name,
            lr=peak_learning_rate(schedule),
            weight_decay=schedule.weight_decay,
            momentum=schedule.momentum,
            **options,
        )
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if schedule.dampening and "dampening" in reason:
            reason = f"{name} takes none; momentum, timm's name for SGD without Nesterov, does"
            raise ConfigError("schedule.dampening", reason) from error
        raise ConfigError("schedule.optimizer", f"{name}: {reason}") from error


def check_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Check what a checkpoint says of an optimiser before it is loaded, which trusts it.

    The kernels of fused optimisers read and write as many numbers as a parameter has, whatever the size of
    their state.

    Raises:
        ValueError: a tensor is not plain, or larger than its storage; or of a fused optimiser, the state of a
            parameter is incomplete or of another shape.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, states = state["param_groups"], state["state"]
    indices = [index for group in groups for index in group["params"]]
    if len(indices) != len(parameters) or len(set(indices)) < len(indices):
        raise ValueError(f"the optimizer's state has {len(indices)} parameters, the model {len(parameters)}")
    for index, values in states.items():
        for name, value in values.items():
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor) and not _is_plain(tensor):
                    raise ValueError(f"{name} of parameter {index} is not a plain tensor")
    if not any(group.get("fused") for group in optimizer.param_groups):
        return
    has_momentum = isinstance(optimizer, torch.optim.SGD)
    for index, parameter in zip(indices, parameters):
        values = states.get(index, {})
        names = ("momentum_buffer",) if has_momentum else ("exp_avg", "exp_avg_sq")
        for name in names if values else ():
            value = values.get(name)
            if value is None and has_momentum:
                continue  # before the first step, or without momentum
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                raise ValueError(f"{name} of parameter {index} is missing or of another shape")
        step = values.get("step")
        if values and not has_momentum and (not isinstance(step, torch.Tensor) or step.numel() != 1):
            raise ValueError(f"step of parameter {index} is not one number")


def _is_plain(tensor: torch.Tensor) -> bool:
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    is_whole = tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    return is_whole and not tensor.is_quantized


def state_of_group(stored: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group's options as built, with the counters that the optimiser keeps beside them.

    Counters, as the step of Lookahead, are the numbers that no schedule sets; flags and options are never
    taken from a checkpoint.
    """
    options = {key: value for key, value in built.items() if key != "params"}
    for key, value in options.items():
        is_number = all(
            isinstance(x, int | float) and not isinstance(x, bool) for x in (value, stored.get(key))
        )
        if is_number and key not in CONFIGURED and math.isfinite(stored[key]):
            options[key] = stored[key]
    return options


def peak_learning_rate(schedule: ScheduleConfig) -> float:
    """`lr`, scaled linearly from `lr_batch_size` to `batch_size` where the former is given."""
    return schedule.lr * (schedule.batch_size / schedule.lr_batch_size if schedule.lr_batch_size else 1.0)


def parameter_groups(model: nn.Module, schedule: ScheduleConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, grouped by weight decay and by layer.

    A group has `params`, `weight_decay`, and with layer decay `lr_scale`, which the scheduler multiplies into
    the learning rate. Layers are those of the model's `group_matcher`, else groups of parameters in order.
    """
    undecayed = undecayed_parameters(model, schedule.decay_biases)
    scales = _layer_scales(model, schedule.layer_decay) if schedule.layer_decay is not None else {}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decays = scales.get(name, 1.0), name not in undecayed
        group = groups.setdefault(
            (scale, decays), {"params": [], "weight_decay": schedule.weight_decay if decays else 0.0}
        )
        if scales:
            group["lr_scale"] = scale
        group["params"].append(parameter)
    return list(groups.values())


def undecayed_parameters(model: nn.Module, decay_biases: bool) -> set[str]:
    """Names of the parameters without weight decay.

    They are what `model.no_weight_decay()` names (embeddings, bias tables; patterns as timm allows), norms
    and everything else with one dimension, and all biases; with `decay_biases` only those biases that belong
    to the head or to no linear or convolution layer.
    """
    names = getattr(model, "no_weight_decay", None)
    patterns = list(names()) if names else []
    head = _head_parameters(model)
    undecayed = set()
    for prefix, module in model.named_modules():
        has_decayed_bias = decay_biases and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        for suffix, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{suffix}" if prefix else suffix
            if suffix == "bias" and has_decayed_bias:
                decays = parameter not in head
            else:
                decays = parameter.ndim > 1 and suffix != "bias"
            if not decays or any(fnmatch(name, pattern) for pattern in patterns):
                undecayed.add(name)
    return undecayed


def _head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the classifier, as far as the model names one (timm's `get_classifier`)."""
    classifier = getattr(model, "get_classifier", None)
    head = classifier() if classifier else None
    heads = head if isinstance(head, tuple) else (head,)  # distilled models have two
    return {parameter for part in heads if isinstance(part, nn.Module) for parameter in part.parameters()}


def clipped_parameters(model: nn.Module, mode: str) -> list[nn.Parameter]:
    """The parameters whose gradients are clipped: all, but for adaptive clipping not the head's.

    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization (2021), section 4.1.
    """
    spared = _head_parameters(model) if mode == "agc" else set()
    return [p for p in model.parameters() if p.requires_grad and p not in spared]


def _layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter by name: decay ** (layers between it and the head)."""
    matcher = getattr(model, "group_matcher", None)
    if matcher:
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(model)
    deepest = max(layers.values(), default=0)
    return {name: decay ** (deepest - layer) for name, layer in layers.items()}


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, steps_per_epoch: int
) -> Scheduler:
    """The learning rate as a function of the step alone: call `step_update(step)` before step 0, 1, 2, …

    It rises linearly from `warmup_factor` × peak at step 0 to the peak after `warmup_epochs`. Cosine
    (Loshchilov & Hutter, SGDR, 2017) and poly (a straight line) reach `min_lr` at the last step of the last
    epoch. With `warmup_prefix` they begin at the peak after the warm-up; without it they begin with the run,
    and what follows the warm-up is the rest of them. step is multiplied by `decay_rate` every `decay_epochs`,
    counted from the start.
    """
    peak = peak_learning_rate(schedule)
    warmup = schedule.warmup_epochs * steps_per_epoch
    options: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": schedule.warmup_factor * peak,
        "t_in_epochs": False,
    }
    if schedule.scheduler == "constant":
        return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, warmup_prefix=False, **options)
    if schedule.scheduler == "step":
        decay_t = schedule.decay_epochs * steps_per_epoch
        rate = schedule.decay_rate
        return StepLRScheduler(optimizer, decay_t=decay_t, decay_rate=rate, warmup_prefix=False, **options)
    remaining = schedule.epochs * steps_per_epoch - 1 - (warmup if schedule.warmup_prefix else 0)
    # Where the warm-up outlasts the run, nothing remains, and any length does. timm warns of the length 1, as
    # if the rate would then stay; half a step is over after one step just so.
    if remaining <= 0 or remaining == 1:
        remaining = 0.5
    options |= {"t_initial": remaining, "lr_min": schedule.min_lr, "warmup_prefix": schedule.warmup_prefix}
    if schedule.scheduler == "poly":
        return PolyLRScheduler(optimizer, power=1.0, **options)
    return CosineLRScheduler(optimizer, **options)
