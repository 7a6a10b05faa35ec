"""Models of timm, `timm/<name>`: building, checks, and what their weights were trained on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vil.config import ModelConfig, Size, Tree, format_size
from vil.errors import UserError, error_reason
from vil.models.limits import check_model_size
from vil.models.multiscale_vit import MAX_BLOCKS, MultiScaleViT
from vil.runtime.modes import mode
from vil.validation import INITIALIZATION, TIMM_PREFIX, TIMM_START_OPTIONS, suggestion, timm_start_options

MAX_REASON_LENGTH = 300
"""Characters of an error of timm that are shown."""
MAX_TIMM_OPTION = 1_000_000
"""Largest number among the options of a timm model."""
DROP_RATES = ("drop_rate", "drop_path_rate", "drop_block_rate")
"""Ends of the names of options that are probabilities."""

_logger = logging.getLogger(__name__)

_OPTIONS = (
    *("name", "image_size", "num_classes", "in_chans", "drop_path", "pool", "timm_options"),
    *INITIALIZATION,
)
"""Options of `ModelConfig` that a model of timm has."""


def create_timm_model(
    config: ModelConfig, max_bytes: int | None = None, more: Tree | None = None
) -> nn.Module:
    """Create a model of timm, with `more` keyword arguments of `timm.create_model`.

    Raises UserError for an option of `ModelConfig` that it does not have.
    """
    name = config.name.removeprefix("timm/")
    if not timm.is_model(name):
        hint = suggestion(name, timm.list_models(), TIMM_PREFIX, otherwise="")
        raise UserError("name", f"timm has no model {name!r}{hint}")
    for field in dataclasses.fields(ModelConfig):
        if field.name not in _OPTIONS and getattr(config, field.name) != field.default:
            raise UserError(field.name, f"{config.name} has no such option; see timm_options")
    arguments: Tree = dict(config.timm_options or {})
    for key in ("num_classes", "in_chans"):
        if key in arguments:
            raise UserError("timm_options", f"{key}: set model.{key} instead")
    if not more and arguments.get("features_only"):
        raise UserError("timm_options", "features_only: the model would have no classes")
    _check_numbers(arguments)
    arguments["num_classes"] = config.num_classes
    if config.in_chans != ModelConfig.in_chans:
        arguments["in_chans"] = config.in_chans
    if config.drop_path:
        arguments["drop_path_rate"] = config.drop_path
    if config.pool is not None:
        arguments["global_pool"] = "token" if config.pool == "cls" else config.pool
    start_options = timm_start_options(arguments)
    if start_options:
        _logger.info("%s: timm loads weights: %s", config.name, ", ".join(sorted(start_options)))
    try:
        if (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).fixed_input_size:
            arguments["img_size"] = config.image_size
        architecture = {key: value for key, value in arguments.items() if key not in TIMM_START_OPTIONS}
        check_model_size(lambda: timm.create_model(name, **architecture), "name", max_bytes)
        return timm.create_model(name, **arguments | (more or {}))
    except UserError:
        raise
    except Exception as error:  # of any type: timm's models do not check their options
        if more and "out_indices" in more and isinstance(error, AssertionError | LookupError):
            raise UserError(
                "out_indices", f"{config.name} lacks one of the levels {more['out_indices']}"
            ) from error
        reason = error_reason(error, MAX_REASON_LENGTH)
        raise UserError("timm_options", f"timm cannot create {name}: {reason}") from error


def _check_numbers(options: Mapping[str, object]) -> None:
    """Raise UserError for numbers that would build a model of endless size: timm does not limit them."""
    for key, option in options.items():
        numbers = [value for value in tree_leaves(option) if isinstance(value, int | float)]
        # Layers take time and memory even on the meta device.
        limit = MAX_BLOCKS if key in ("depth", "depths", "layers") else MAX_TIMM_OPTION
        if not all(abs(number) <= limit for number in numbers):  # also false for nan
            raise UserError("timm_options", f"{key}: numbers must be from -{limit:,} to {limit:,}")
        # Not the growth_rate of DenseNet, a number of channels.
        if key.endswith(DROP_RATES) and not all(0 <= number <= 1 for number in numbers):
            raise UserError("timm_options", f"{key}: expected a number from 0 to 1")


@torch.no_grad()
def check_logits(model: nn.Module, config: ModelConfig) -> None:
    """Raise UserError if a model of timm does not compute the logits of its classes for an image.

    timm builds models whose options do not fit one another or the size of the images, and others that return
    feature maps. The model computes one image, in eval mode and on its device.
    """
    if isinstance(model, MultiScaleViT):
        return
    device = next((parameter.device for parameter in model.parameters()), None)
    option = "timm_options" if config.timm_options else "name"
    try:
        with mode(model, training=False):
            logits = model(torch.zeros(1, config.in_chans, *config.size, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any type
        reason = error_reason(error, MAX_REASON_LENGTH)
        size = f"images of {format_size(config.size)} pixels"
        raise UserError(option, f"{config.name} cannot compute {size}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, getattr(model, "num_classes", -1)):
        shape = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(option, f"the output of {config.name} is {shape}, expected one logit per class")


def pretrained_classes(name: str, options: Mapping[str, object] | None = None) -> int:
    """Return the number of classes of timm's weights for a timm/<name> model with these `timm_options`."""
    chosen: Any = {key: (options or {}).get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")}
    try:
        cfg = timm.models.resolve_pretrained_cfg(name.removeprefix("timm/"), **chosen)
    except Exception as error:  # of any type: timm does not check the options
        reason = error_reason(error, MAX_REASON_LENGTH)
        raise UserError("timm_options", f"timm cannot find the weights: {reason}") from error
    return cfg.num_classes


def pretrained_transform(name: str) -> Tree:
    """Return the transform of timm's weights for a timm/<name> model, as options of a data section."""
    cfg = _pretrained_cfg(name)
    transform: Tree = {"mean": list(cfg.mean), "std": list(cfg.std), "crop_pct": cfg.crop_pct}
    if cfg.crop_mode in ("center", "squash", "border"):
        transform["crop_mode"] = cfg.crop_mode
    if cfg.interpolation in ("nearest", "bilinear", "bicubic", "lanczos"):
        transform["interpolation"] = cfg.interpolation
    return transform


def pretrained_image_size(name: str) -> Size:
    """Return the size of the images of timm's weights for a timm/<name> model: (height, width) in pixels."""
    height, width = _pretrained_cfg(name).input_size[-2:]
    return height, width


def _pretrained_cfg(name: str) -> timm.models.PretrainedCfg:
    return timm.models.get_pretrained_cfg(name.removeprefix("timm/")) or timm.models.PretrainedCfg()
