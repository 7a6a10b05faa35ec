"""The model of a training run: random weights, those of `model.init_from`, or those that timm loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import read_published_config
from vil.checkpoints.weights import Weights, timm_options_start, timm_weights
from vil.config import ModelConfig
from vil.errors import UserError, errors_in_option, errors_in_section
from vil.models.timm_models import check_logits
from vil.models.zoo import check_device, model_from_config
from vil.runtime import consistency
from vil.runtime.distributed import call_on_all
from vil.runtime.seeding import seed_generators
from vil.validation import as_tree, without_timm_start_options


def build_random_model(
    config: ModelConfig, class_names: Sequence[str], seed: int, device: torch.device
) -> nn.Module:
    """Build the model of a run with random weights on a device; set `config.num_classes` from the data.

    Raises:
        UserError: the data has more classes, or an option fits neither the others nor the device.
    """
    if config.num_classes is None:
        config.num_classes = len(class_names)
    if config.num_classes < len(class_names):
        reason = f"the data has {len(class_names)} classes, got {config.num_classes}"
        raise UserError("model.num_classes", reason)
    seed_generators(seed, "weights")
    with errors_in_section("model"):
        architecture = config
        if timm_options_start(config):  # `initialize_model` loads those weights
            options = without_timm_start_options(as_tree(config))["timm_options"]
            architecture = replace(config, timm_options=options)
        model = model_from_config(architecture)
        check_device(model, device)
        model.to(device)  # an attention backend that an option selects may run on this device alone
        check_logits(model, config)
    return model


def initial_weights(model: ModelConfig) -> Weights:
    """Read the weights that `init_from` names.

    Raises:
        UserError: they cannot be read, or there is a published configuration without a checkpoint.
    """
    published = None
    if model.init_released_config is not None:
        with errors_in_option("model.init_released_config"):
            published = read_published_config(model.init_released_config)
    if model.init_from is None:
        raise UserError("model.init_released_config", "requires model.init_from, the published checkpoint")
    with errors_in_option("model.init_from"):
        return open_weights(model.init_from, published)


def initialize_model(model: nn.Module, config: ModelConfig, class_names: Sequence[str]) -> list[str]:
    """Load the initial weights of a new run, if the configuration has any; return lines that describe them.

    Every rank calls this.

    Args:
        model: the model of `config`, with random weights.
        config: the model section.
        class_names: classes of the data; rows of the head are found by their names.

    Raises:
        UserError: on every rank, if the weights cannot be used on one, or differ between ranks.
    """
    lines = call_on_all(lambda: _load_weights(model, config, class_names))
    consistency.check_weights("model.init_from" if config.init_from else "model", model)
    return lines


def _load_weights(model: nn.Module, config: ModelConfig, class_names: Sequence[str]) -> list[str]:
    if config.init_from or config.init_released_config:
        weights, option = initial_weights(config), "model.init_from"
    else:
        with errors_in_section("model"):
            found, option = timm_weights(config), "model.timm_options"
        if found is None and config.new_head:
            raise UserError("model.new_head", "requires initial weights: model.init_from, or those of timm")
        if found is None:
            return []
        weights = found
    with errors_in_option(option):
        head = weights.initialize(model, class_names, config.size, config.new_head)
    return [f"starting from {weights.path}, {weights.kind} weights", head]
