"""Optimizer, parameter groups and learning-rate schedule, built on timm.optim and timm.scheduler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import (
    auto_group_layers,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
)
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vil.checkpoints.training_state import State
from vil.config import ScheduleConfig, Tree
from vil.errors import UserError, error_reason
from vil.runtime.epoch_steps import EpochSteps
from vil.training.trainable import classifiers
from vil.validation import suggestion

_FUSED = ("adam", "adamw", "sgd", "momentum")
"""timm's names of PyTorch optimizers whose fused versions can skip a step on the device."""

_CONFIGURED_KEYS = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "dampening")
"""Keys of parameter groups that the configuration sets; other numbers are state of the optimizer."""


_SCHEDULE_OPTIONS = ("lr", "momentum", "dampening", "eps", "weight_decay")
"""Keyword arguments of optimizers that options of the same names in the schedule set."""
_GROUPING_OPTIONS = ("decay_biases", "layer_decay", "layer_decay_min")
"""Options of the schedule section that `parameter_groups` reads, besides the weight decay."""
_IMPLEMENTATION_OPTIONS = ("params", "fused", "foreach", "capturable", "differentiable")
"""Keyword arguments of optimizers that select an implementation, which a skipped step depends on."""


def build_optimizer(model: nn.Module, schedule: ScheduleConfig) -> torch.optim.Optimizer:
    """Build the optimizer of `schedule` at its peak learning rate.

    Raises:
        UserError: timm has no optimizer of this name, or it does not support the options.
    """
    name = schedule.optimizer.lower()
    kind = name.removeprefix("lookahead_")
    if kind not in list_optimizers():
        hint = suggestion(
            kind, map(str, list_optimizers()), otherwise="; timm.optim.list_optimizers() lists them"
        )
        raise UserError("schedule.optimizer", f"timm has no optimizer {schedule.optimizer!r}{hint}")
    info = get_optimizer_info(kind)
    if info.second_order:
        raise UserError("schedule.optimizer", f"{name} needs second derivatives: not supported")
    # An optimizer with three β keeps its own defaults.
    options: Tree = {"betas": schedule.betas} if info.has_betas and info.num_betas == 2 else {}
    if schedule.eps is not None:
        options["eps"] = schedule.eps
    if schedule.dampening:
        options["dampening"] = schedule.dampening
    if name in _FUSED:
        options["fused"] = True
    if schedule.optimizer_options:
        options |= check_optimizer_options(kind, schedule.optimizer_options)
    groups, lr = parameter_groups(model, schedule), peak_learning_rate(schedule)
    try:
        return create_optimizer_v2(
            groups, opt=name, lr=lr, weight_decay=schedule.weight_decay, momentum=schedule.momentum, **options
        )
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if schedule.dampening and "dampening" in reason:
            reason = f"not supported by {name}; use momentum, which is SGD without Nesterov momentum in timm"
            raise UserError("schedule.dampening", reason) from error
        raise UserError("schedule.optimizer", f"{name}: {reason}") from error


def check_optimizer_options(name: str, values: Mapping[str, object]) -> Tree:
    """Return `schedule.optimizer_options` as keyword arguments of timm's optimizer `name`.

    Raises:
        UserError: an option that the optimizer does not have, that another option sets, or that fails in a
            step.
    """
    option, info = "schedule.optimizer_options", get_optimizer_info(name)
    weight, bias = (nn.Parameter(torch.ones(shape)) for shape in ((8, 8), (8,)))
    try:
        known = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    except Exception as error:  # of an optimizer that needs another package or a GPU
        raise UserError("schedule.optimizer", f"{name}: {error_reason(error)}") from error
    configured = [*_SCHEDULE_OPTIONS, *(["betas"] if info.has_betas and info.num_betas == 2 else [])]
    for key, value in values.items():
        if key in configured:
            raise UserError(f"{option}.{key}", f"is set by schedule.{key}")
        if key in _IMPLEMENTATION_OPTIONS:
            raise UserError(f"{option}.{key}", "cannot be set: the trainer chooses the implementation")
        if key not in known:
            hint = suggestion(key, set(known) - {*configured, *_IMPLEMENTATION_OPTIONS})
            raise UserError(f"{option}.{key}", f"{name} has no such option{hint}")
        if isinstance(known[key].default, bool) and not isinstance(value, bool):
            raise UserError(f"{option}.{key}", f"expected true or false, got {value!r}")
    options: Tree = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:  # many optimizers read their options in a step only
        weight.grad, bias.grad = torch.eye(8), torch.ones(8)
        create_optimizer_v2([weight, bias], opt=name, lr=1e-3, weight_decay=0.0, **options).step()
    except Exception as error:
        raise UserError(option, f"{name}: {error_reason(error)}") from error
    return options


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load the state of a checkpoint, and keep the options of the configuration.

    Raises:
        ValueError: as of `check_optimizer_state`.
    """
    options = [dict(group) for group in optimizer.param_groups]
    check_optimizer_state(optimizer, state)
    optimizer.load_state_dict(state)
    for group, configured in zip(optimizer.param_groups, options):
        group.update(merge_group_options(group, configured))


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Check the optimizer state of a checkpoint before it is loaded.

    The kernels of fused optimizers read and write as many numbers as a parameter has, whatever the size of
    the tensors in their state.

    Raises:
        ValueError: a tensor is not plain or larger than its storage, or, for a fused optimizer, the state of
            a parameter is incomplete or has another shape.
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
    names = ["momentum_buffer"] if has_momentum else ["exp_avg", "exp_avg_sq"]
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        names.append("max_exp_avg_sq")
    for index, parameter in zip(indices, parameters):
        values = states.get(index, {})
        for name in names if values else ():
            value = values.get(name)
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                raise ValueError(f"{name} of parameter {index} is missing or of another shape")
        step = values.get("step")
        if values and not has_momentum and (not isinstance(step, torch.Tensor) or step.numel() != 1):
            raise ValueError(f"step of parameter {index} is not one number")


def _is_plain(tensor: torch.Tensor) -> bool:
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    is_complete = tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    return is_complete and not tensor.is_quantized


def merge_group_options(stored: State, configured: Mapping[str, object]) -> Tree:
    """Return the configured options of a parameter group, with the stored counters of the optimizer.

    Counters, such as the step of Lookahead, are the numbers that the configuration does not set. Other stored
    options are ignored.
    """
    options = {key: value for key, value in configured.items() if key != "params"}
    for key, value in options.items():
        is_number = {type(value), type(stored.get(key))} <= {int, float}
        if is_number and key not in _CONFIGURED_KEYS and math.isfinite(stored[key]):
            options[key] = stored[key]
    return options


def peak_learning_rate(schedule: ScheduleConfig) -> float:
    """Return `lr`, scaled from `lr_batch_size` (if given) to `batch_size`.

    Raises:
        UserError: `lr_scaling` sqrt without a batch size to scale from.
    """
    if schedule.lr_batch_size is None:
        if schedule.lr_scaling == "sqrt" and not schedule.scale_lr_with_batch_size:
            reason = "sqrt needs schedule.lr_batch_size or schedule.scale_lr_with_batch_size"
            raise UserError("schedule.lr_scaling", reason)
        return schedule.lr
    return schedule.lr * learning_rate_factor(schedule, schedule.batch_size / schedule.lr_batch_size)


def learning_rate_factor(schedule: ScheduleConfig, ratio: float) -> float:
    """Return the factor on the learning rate of a batch that is larger by the factor `ratio`."""
    return math.sqrt(ratio) if schedule.lr_scaling == "sqrt" else ratio


def parameter_groups(model: nn.Module, schedule: ScheduleConfig) -> list[Tree]:
    """Group the trainable parameters of `model` by weight decay and by layer.

    A group has `params`, `weight_decay`, and, with layer decay, `lr_scale`, by which the scheduler multiplies
    the learning rate. The layers are those of the model's `group_matcher`, else timm's groups in order.
    """
    undecayed = undecayed_parameters(model, schedule.decay_biases)
    decay, smallest = schedule.layer_decay, schedule.layer_decay_min
    if decay is None and smallest:
        raise UserError("schedule.layer_decay_min", "needs schedule.layer_decay")
    scales = _layer_scales(model, decay, smallest) if decay is not None else {}
    groups: dict[tuple[float, bool], Tree] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decays = scales.get(name, 1.0), name not in undecayed
        new_group = {"params": [], "weight_decay": schedule.weight_decay if decays else 0.0}
        group = groups.setdefault((scale, decays), new_group)
        if scales:
            group["lr_scale"] = scale
        group["params"].append(parameter)
    return list(groups.values())


def find_reordering_option(
    model: nn.Module, schedule: ScheduleConfig, stored: Mapping[str, Any]
) -> str | None:
    """Return an option changed since `stored`, a schedule section, that reorders the optimizer's parameters.

    The state of an optimizer is stored by the index of a parameter: in another order it would be that of
    other parameters, also where the shapes are equal.
    """
    defaults = ScheduleConfig()
    options = {key: stored.get(key, getattr(defaults, key)) for key in _GROUPING_OPTIONS}
    changed = [key for key, value in options.items() if value != getattr(schedule, key)]
    old, new = (
        [id(parameter) for group in parameter_groups(model, config) for parameter in group["params"]]
        for config in (replace(schedule, **options), schedule)
    )
    return f"schedule.{changed[0]}" if old != new else None


def undecayed_parameters(model: nn.Module, decay_biases: bool) -> set[str]:
    """Return the names of the parameters without weight decay.

    They match a pattern of `model.no_weight_decay()` (embeddings, bias tables), have one dimension (norms),
    or are biases; with `decay_biases`, only biases of the head and of other modules than linear and
    convolution layers.
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
    """Return the parameters of the model's classifier, if it has one."""
    return {parameter for head in classifiers(model) for parameter in head.parameters()}


def clipped_parameters(model: nn.Module, mode: str) -> list[nn.Parameter]:
    """Return the parameters whose gradients are clipped; adaptive clipping excludes the head.

    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization (2021), section 4.1.
    """
    excluded = _head_parameters(model) if mode == "agc" else set()
    return [p for p in model.parameters() if p.requires_grad and p not in excluded]


def _layer_scales(model: nn.Module, decay: float, smallest: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter: decay ** (layers up to the head)."""
    matcher = getattr(model, "group_matcher", None)
    if matcher:
        layers = group_parameters(model, matcher(coarse=False), reverse=True)
    else:
        layers = auto_group_layers(model)
    deepest = max(layers.values(), default=0)
    return {name: max(smallest, decay ** (deepest - layer)) for name, layer in layers.items()}


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, epoch_steps: EpochSteps
) -> Scheduler:
    """Build the learning-rate schedule; call `step_update` with `scheduled_time(step)` before each step.

    The rate rises linearly from `warmup_factor` times the peak at step 0 to the peak after `warmup_epochs`.
    cosine (Loshchilov & Hutter, SGDR, 2017) and poly (a straight line) reach `min_lr` at the last step. With
    `warmup_prefix` they start at the peak after the warm-up; without it they start at step 0, and the warm-up
    replaces their first part. step multiplies the rate by `decay_rate` every `decay_epochs`, multistep at
    each of `decay_milestones`; both count from step 0. After `epochs`, in the cool-down, the rate of cosine
    and poly stays `min_lr`.

    Raises:
        UserError: milestones without multistep, or multistep without.
    """
    milestones = schedule.decay_milestones
    if (milestones is not None) != (schedule.scheduler == "multistep"):
        reason = (
            "needs schedule.scheduler multistep"
            if milestones
            else "is needed by schedule.scheduler multistep"
        )
        raise UserError("schedule.decay_milestones", reason)
    peak, steps_per_epoch = peak_learning_rate(schedule), epoch_steps.steps(0)
    warmup = schedule.warmup_epochs * steps_per_epoch
    options: Tree = {
        "warmup_t": warmup,
        "warmup_lr_init": schedule.warmup_factor * peak,
        "t_in_epochs": False,
    }
    last = epoch_steps.scheduled_time(epoch_steps.first_step(schedule.epochs) - 1)
    remaining = last - (warmup if schedule.warmup_prefix else 0)
    # If the warm-up is longer than the run, the length does not matter. timm warns about length 1, as if the
    # rate would be constant; with 0.5 the schedule ends after one step just the same.
    if remaining <= 0 or remaining == 1:
        remaining = 0.5
    to_min_lr: Tree = {
        **options,
        "t_initial": remaining,
        "lr_min": schedule.min_lr,
        "warmup_prefix": schedule.warmup_prefix,
    }
    match schedule.scheduler:
        case "cosine":
            return CosineLRScheduler(optimizer, **to_min_lr)
        case "poly":
            return PolyLRScheduler(optimizer, power=1.0, **to_min_lr)
        case "constant":
            return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, warmup_prefix=False, **options)
        case "step":
            options |= {"decay_t": schedule.decay_epochs * steps_per_epoch, "decay_rate": schedule.decay_rate}
            return StepLRScheduler(optimizer, warmup_prefix=False, **options)
        case "multistep":
            # timm compares milestones with t + 1: one step early, unless they are one later.
            decay_at = [milestone * steps_per_epoch + 1 for milestone in milestones or ()]
            options |= {"decay_t": decay_at, "decay_rate": schedule.decay_rate}
            return MultiStepLRScheduler(optimizer, warmup_prefix=False, **options)
