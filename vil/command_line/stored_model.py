"""The weights that a command line names, and the configuration that comes with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vil.checkpoints.open import open_weights, run_checkpoint_of
from vil.checkpoints.published_config import read_published_config
from vil.checkpoints.weights import Weights
from vil.command_line.arguments import file_origin
from vil.command_line.resolution import ParsedArguments, ResolvedConfig
from vil.config import EvalConfig, ModelConfig, Tree
from vil.errors import COMMAND_LINE, errors_in_option, errors_in_section
from vil.models.timm_models import pretrained_classes, pretrained_transform
from vil.models.zoo import check_device, model_from_config
from vil.runtime.seeding import seed_generators
from vil.validation import as_tree, timm_start_options

_logger = logging.getLogger("vil.eval")


@dataclass(frozen=True)
class StoredModel:
    """The weights to evaluate, and the configuration that comes with them.

    Attributes:
        origin: file of the configuration, for messages.
        weights: weights of a checkpoint; None for weights of timm and untrained ones.
        kind: `raw`, `ema`, `timm` or `untrained`.
        model: stored model section; None if the command line describes the model.
        transform: options of the evaluation transform that are stored with the weights.
    """

    origin: str | None
    weights: Weights | None
    kind: str
    model: ModelConfig | None
    transform: Mapping[str, object]

    def build_model(self, config: ModelConfig, num_classes: int, device: torch.device) -> nn.Module:
        """Return the model on the CPU, without the weights of a file.

        Its weights are those of timm, or the same random ones on every rank.

        Args:
            config: the model.
            num_classes: number of classes if neither `config` nor the weights have one.
            device: where the model will run.

        Raises:
            UserError: an impossible model, or one that `device` cannot run.
        """
        seed_generators(0, "weights")
        build = self.weights.empty_model if self.weights else model_from_config
        with errors_in_section("model"):
            if self.kind == "timm":
                num_classes = pretrained_classes(config.name, config.timm_options)
            model = build(config, num_classes)
            check_device(model, device)
        return model


def read_stored(path: str | None, command: ResolvedConfig[EvalConfig]) -> StoredModel:
    """Open a checkpoint; without a path, describe the weights of timm or untrained weights."""
    config, published = command.config, None
    if config.released_config is not None:
        with errors_in_option("released_config"):
            published = read_published_config(config.released_config)
    name = config.model.name
    if path is None:
        kind = "timm" if timm_start_options(config.model.timm_options) else "untrained"
        model, transform = (published.model, published.transform) if published else (None, {})
        if kind == "timm" and name.startswith("timm/"):
            transform = pretrained_transform(name)
        return StoredModel(config.released_config, None, kind, model, transform)
    with errors_in_option("checkpoint"):
        run_checkpoint = run_checkpoint_of(path, config.run_checkpoint, config.checkpoint or ())
        weights = open_weights(path, published, run_checkpoint, config.weights)
        if "model.name" not in command.origins:
            weights.require_model("--released_config")
    is_timm = weights.model is None and name.startswith("timm/")
    stored_transform = pretrained_transform(name) if is_timm else weights.transform
    return StoredModel(path, weights, weights.kind, weights.model, stored_transform)


def resolve_over_stored(args: ParsedArguments[EvalConfig], stored: StoredModel) -> ResolvedConfig[EvalConfig]:
    """Resolve the arguments over the configuration that comes with the weights.

    If the arguments name a model, only the number of classes of the stored one is kept. The transform of the
    weights overrides a file of --data, which describes images, but not the options of the command line.
    """
    command = args.resolve()
    data = stored.weights.data_with_split() if stored.weights else {}
    held_out = ("val_fraction", "val_seed", "val_list")
    if any(f"data.{key}" in command.origins for key in held_out):
        data = {key: value for key, value in data.items() if key not in held_out}
    base: Tree = {"data": {**data, **stored.transform}, "model": {}}
    if stored.model is not None:
        is_renamed = "model.name" in command.origins
        base["model"] = {"num_classes": stored.model.num_classes} if is_renamed else as_tree(stored.model)
    given = as_tree(command.config.data)
    for key, value in stored.transform.items():
        origin = command.origins.get(f"data.{key}", COMMAND_LINE)
        if origin == COMMAND_LINE:
            continue
        if (list(value) if isinstance(value, tuple) else value) != given[key]:
            _logger.info("data.%s: %s, required by the weights, overrides %s", key, value, origin)
        args = args.with_values({f"data.{key}": value}, file_origin(str(stored.origin)))
    return args.resolve(base_values=base, base_origin=str(stored.origin))
