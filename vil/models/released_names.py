"""The names and shapes of the weights in published ViL checkpoints, and this model's for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vil.config import ConfigError
from vil.models.multiscale_vit import MultiScaleViT


def convert_weights(model: MultiScaleViT, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names and shapes → those of `model`, but for what depends on image size and classes.

    A name without a counterpart stays as it is, for the caller to report.

    Raises:
        ConfigError: two copies of a weight that the model shares differ.
    """
    weights: dict[str, Tensor] = {}
    _check_copies(model, published)
    for key, value in published.items():
        if key.endswith(("relative_position_index", "calls_since_last_redraw")):
            continue  # derived from the window, and a counter that a step number replaces
        if not value.numel():
            continue  # the embedding of no global token
        try:
            weights.update(_renamed(model, key, value))
        except (IndexError, RuntimeError):  # of a shape that no such weight has
            weights[key] = value
    return weights


_COPIES = {"query_global": "query", "kv_global": "kv", "proj_global": "proj", "proj_v": "proj_k"}
"""Layers that a published checkpoint holds once more under another name where their weights are shared."""


def _check_copies(model: MultiScaleViT, published: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if weights that the model shares differ: their configuration is of another model."""
    for key, value in published.items():
        match = re.fullmatch(r"(layer\d{1,4}\.\d{1,4}\.attn\.)(\w+)((?:\.\w+)?)", key)
        if not match or match[2] not in _COPIES:
            continue
        original = f"{match[1]}{_COPIES[match[2]]}{match[3]}"
        other = published.get(original)
        if other is None or other.shape != value.shape or torch.equal(value, other):
            continue  # what is missing or of another shape is found when it is loaded
        try:
            is_copy = not _renamed(model, key, value)
        except (AttributeError, IndexError, RuntimeError):  # of a layer that the model does not have
            continue
        if is_copy:
            reason = f"{key} and {original} differ, but the configuration shares them (SHARE_W, SHARE_KV)"
            raise ConfigError("", reason)


def _renamed(model: MultiScaleViT, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """One published weight as (name, value) pairs of this model: two for a stacked one, none for a copy."""
    match = re.fullmatch(r"layer([1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})\.(.+)", key)
    if not match:
        return [(key, value)]
    number, place, rest = int(match[1]) - 1, int(match[2]), match[3]
    if number >= len(model.stages):
        return [(key, value)]
    prefix = f"stages.{number}."
    if place == 0:
        embed = {
            "cls_token": "global_tokens", "cls_pos_embed": "position.globals",
            "x_pos_embed": "position.rows", "y_pos_embed": "position.columns",
            "norm_embed.weight": "patch_embed.norm.weight", "norm_embed.bias": "patch_embed.norm.bias",
            "proj.weight": "patch_embed.proj.weight", "proj.bias": "patch_embed.proj.bias",
        }  # fmt: skip
        name = embed.get(rest)
        if name is None:
            return [(key, value)]
        return [(prefix + name, value[0] if "position" in name else value)]
    if (place - 1) // 2 >= len(model.stages[number].blocks):
        return [(key, value)]
    prefix += f"blocks.{(place - 1) // 2}."
    is_attention = place % 2 == 1
    if rest.startswith("norm."):
        return [(f"{prefix}{'norm1' if is_attention else 'norm2'}.{rest.removeprefix('norm.')}", value)]
    if rest.startswith("mlp.") and not is_attention:
        return [(prefix + rest, value)]
    if not rest.startswith("attn.") or not is_attention:
        return [(key, value)]
    rest = rest.removeprefix("attn.")
    prefix += "attn."
    if rest == "local_relative_position_bias_table":  # (side², heads), rows first → (heads, side, side)
        side = round(value.shape[0] ** 0.5)
        return [(f"{prefix}bias_table", value.t().unflatten(1, (side, -1)))]
    if rest == "g2l_relative_position_bias":
        return [(f"{prefix}global_bias.to_local", value[0]), (f"{prefix}global_bias.from_local", value[1])]
    if rest == "g2g_relative_position_bias":
        return [(f"{prefix}global_bias.among", value)]
    layer, _, parameter = rest.rpartition(".")
    own_global = {
        "query_global": "global_query",
        "kv_global": "global_key_value",
        "proj_global": "global_projection",
    }
    attention = model.get_submodule(prefix.rstrip("."))
    if layer in own_global:
        if hasattr(attention, own_global[layer]):
            return [(f"{prefix}{own_global[layer]}.{parameter}", value)]
        return []  # shared: the same weights once more
    layers = {
        "query": "query",
        "kv": "key_value",
        "proj": "projection",
        "qkv": "query_key_value",
        "proj_sr": "reduce",
    }
    if layer in layers:
        return [(f"{prefix}{layers[layer]}.{parameter}", value)]
    if rest == "fast_attention.projection_matrix":
        return [(f"{prefix}random_projection", value)]
    if rest == "proj_k":
        return [(f"{prefix}key_mixture", value)]
    if rest == "proj_v":  # present also where shared: then the same weights once more
        return (
            [(f"{prefix}value_mixture", value)]
            if getattr(attention, "value_mixture", None) is not None
            else []
        )
    return [(key, value)]
