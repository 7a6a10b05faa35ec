"""Translate state dicts to `MultiScaleViT`: published names, other image sizes, other windows."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vil.attention.full import FullAttention, resize_offsets
from vil.attention.vision_longformer import VisionLongformerAttention
from vil.errors import UserError
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.position import resize_embedding

_logger = logging.getLogger(__name__)


class _Rule(NamedTuple):
    """Translation of one published name within a stage (patch embedding) or a block."""

    pattern: str
    name: str
    convert: Callable[[Tensor], Tensor] = lambda value: value
    copy_of: str | None = None
    """Published name of the tensor that this one repeats if the model shares the two."""


def _squeeze_batch(value: Tensor) -> Tensor:
    return value[0]  # (1, L, C) → (L, C)


def _unflatten_offsets(value: Tensor) -> Tensor:
    side = round(value.shape[0] ** 0.5)
    return value.t().unflatten(1, (side, -1))  # (side², h), rows first → (h, side, side)


_PATCH_EMBED = (
    _Rule(r"cls_token", "global_tokens"),
    _Rule(r"cls_pos_embed", "position.globals", _squeeze_batch),
    _Rule(r"x_pos_embed", "position.rows", _squeeze_batch),
    _Rule(r"y_pos_embed", "position.columns", _squeeze_batch),
    _Rule(r"norm_embed\.(weight|bias)", r"patch_embed.norm.\1"),
    _Rule(r"proj\.(weight|bias)", r"patch_embed.proj.\1"),
)
"""Names after `layer{stage}.0.`"""

_ATTENTION = (
    _Rule(r"norm\.(.+)", r"norm1.\1"),
    _Rule(r"attn\.query\.(\w*)", r"attn.query.\1"),
    _Rule(r"attn\.kv\.(\w*)", r"attn.key_value.\1"),
    _Rule(r"attn\.proj\.(\w*)", r"attn.projection.\1"),
    _Rule(r"attn\.qkv\.(\w*)", r"attn.query_key_value.\1"),
    _Rule(r"attn\.query_global\.(\w*)", r"attn.global_query.\1", copy_of=r"attn.query.\1"),
    _Rule(r"attn\.kv_global\.(\w*)", r"attn.global_key_value.\1", copy_of=r"attn.kv.\1"),
    _Rule(r"attn\.proj_global\.(\w*)", r"attn.global_projection.\1", copy_of=r"attn.proj.\1"),
    _Rule(r"attn\.local_relative_position_bias_table", "attn.bias_table", _unflatten_offsets),
    _Rule(r"attn\.g2l_relative_position_bias", "attn.global_bias.to_local", lambda value: value[0]),
    _Rule(r"attn\.g2l_relative_position_bias", "attn.global_bias.from_local", lambda value: value[1]),
    _Rule(r"attn\.g2g_relative_position_bias", "attn.global_bias.among"),
    _Rule(r"attn\.proj_k", "attn.key_mixture"),
    _Rule(r"attn\.proj_v", "attn.value_mixture", copy_of="attn.proj_k"),
    _Rule(r"attn\.proj_sr\.(\w*)", r"attn.reduce.\1"),
    _Rule(r"attn\.fast_attention\.projection_matrix", "attn.random_projection"),
)
"""Names after `layer{stage}.{i}.` with odd i: the first half of block (i − 1) / 2."""

_MLP = (_Rule(r"norm\.(.+)", r"norm2.\1"), _Rule(r"(mlp\..+)", r"\1"))
"""Names after `layer{stage}.{i}.` with even i: the second half of block i / 2 − 1."""

_UNUSED = ("relative_position_index", "calls_since_last_redraw")
"""Buffers that this model derives from the window and from the step."""

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of DistributedDataParallel and torch.compile."""


def translate_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the names and, where they depend on the image size, the shapes of a model.

    Prefixes of wrappers are removed, published names are translated, row and column embeddings and bias
    tables are resized bilinearly without aligned corners, as in the paper's code. Entries without a
    counterpart in the model are kept unchanged, for strict loading to report.

    Args:
        model: the model; for any class but `MultiScaleViT` only the prefixes are removed.
        state_dict: names → tensors, or the content of a published checkpoint, with its weights under `net`.

    Raises:
        UserError: a weight that the model shares has two different values in the checkpoint.
    """
    published = state_dict.get("net")
    weights = strip_wrapper_prefixes(published if isinstance(published, Mapping) else state_dict)
    if not isinstance(model, MultiScaleViT):
        return weights
    if has_published_names(weights):
        weights = translate_published_names(model, weights)
    return _resize_position(model, weights)


def has_published_names(state_dict: Mapping[str, Tensor]) -> bool:
    """Return True if the names are those of the published ViL checkpoints."""
    return any(isinstance(name, str) and name.startswith("layer1.") for name in state_dict)


def strip_wrapper_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of DistributedDataParallel and torch.compile."""
    stripped = {}
    for name, value in state_dict.items():
        while isinstance(name, str) and name.startswith(_WRAPPER_PREFIXES):
            name = name.partition(".")[2]
        stripped[name] = value
    return stripped


def translate_published_names(model: MultiScaleViT, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of `model`, before any resizing.

    Raises:
        UserError: a weight that the model shares has two different values in the checkpoint.
    """
    names = model.state_dict().keys()
    weights: dict[str, Tensor] = {}
    for key, value in published.items():
        if key.endswith(_UNUSED) or not value.numel():  # the embedding of zero global tokens is empty
            continue
        match = re.fullmatch(r"(layer([1-9]\d{0,3})\.(0|[1-9]\d{0,3})\.)(.+)", key, re.ASCII)
        rules, prefix = _rules_of_layer(model, int(match[2]), int(match[3])) if match else ((), "")
        layer, end = (match[1], match[4]) if match else ("", "")
        matches = [(rule, found) for rule in rules if (found := re.fullmatch(rule.pattern, end))]
        translated: dict[str, Tensor] = {} if matches else {key: value}
        try:
            for rule, found in matches:
                name = prefix + found.expand(rule.name)
                if rule.copy_of is not None and name not in names:
                    _check_copy(published, key, layer + found.expand(rule.copy_of))
                else:
                    translated[name] = rule.convert(value)
        except (IndexError, RuntimeError):  # a shape that this weight cannot have
            translated = {key: value}
        weights.update(translated)
    return weights


def _rules_of_layer(model: MultiScaleViT, stage: int, index: int) -> tuple[tuple[_Rule, ...], str]:
    """Return the rules for names after `layer{stage}.{index}.`, and the prefix of the translated names."""
    if stage > len(model.stages):
        return (), ""
    if index == 0:
        return _PATCH_EMBED, f"stages.{stage - 1}."
    block = (index - 1) // 2
    if block >= len(model.stages[stage - 1].blocks):
        return (), ""
    return _ATTENTION if index % 2 else _MLP, f"stages.{stage - 1}.blocks.{block}."


def _check_copy(published: Mapping[str, Tensor], key: str, original: str) -> None:
    """Raise UserError if two published weights that the model shares differ."""
    other = published.get(original)
    if other is not None and other.shape == published[key].shape and not torch.equal(other, published[key]):
        reason = f"{key} and {original} differ, but the configuration shares them (SHARE_W, SHARE_KV)"
        raise UserError("", reason)


def _resize_position(model: MultiScaleViT, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with embeddings and bias tables resized for the maps and windows of the model."""
    expected = model.state_dict()
    result = dict(weights)
    for name, value in weights.items():
        target = expected.get(name)
        if target is None or value.shape == target.shape or value.dim() != target.dim():
            continue
        if not value.numel() or not value.is_floating_point():
            continue
        if name.endswith((".position.rows", ".position.columns")) and value.shape[1] == target.shape[1]:
            resized = resize_embedding(value, target.shape[0])
        elif name.endswith(".bias_table"):
            # (heads, 2H−1, 2W−1); the local attention's table has H = W = 2 × window.
            attention = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(attention, FullAttention | VisionLongformerAttention):
                continue
            divisor = 2 if isinstance(attention, FullAttention) else 4
            if value.shape[0] != target.shape[0] or any((side + 1) % divisor for side in value.shape[1:]):
                continue
            resized = resize_offsets(value, ((target.shape[1] + 1) // 2, (target.shape[2] + 1) // 2))
        else:
            continue
        _logger.info("%s: %s → %s", name, tuple(value.shape), tuple(resized.shape))
        result[name] = resized
    return result
