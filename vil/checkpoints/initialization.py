"""Initial weights of a training run: those of `model.init_from`, or those that timm loads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import read_published_config
from vil.checkpoints.weights import Weights, timm_weights
from vil.config import ModelConfig, UserError, errors_in_option, errors_in_section


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

    Args:
        model: the model of `config`, with random weights.
        config: the model section.
        class_names: classes of the data; rows of the head are found by their names.
    """
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
