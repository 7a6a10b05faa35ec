"""Published ViL checkpoints: their configuration and the names of their weights, brought to this model.

A published checkpoint is a dict with `net`, `arch`, `epoch`, `best_acc`; its configuration is the YAML file
that the training code printed. Nothing but tensors and plain values is ever unpickled.
"""

from __future__ import annotations

import ast
import dataclasses
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vil.attention.full import resize_offsets
from vil.config import ConfigError, DataConfig, StageConfig
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.position import resize_embedding
from vil.models.zoo import create_model

_logger = logging.getLogger(__name__)

# What the code that trained the checkpoints takes where its configuration is silent.
DEFAULTS: dict[str, Any] = {
    "DATA.NUM_CLASSES": 1000,
    "INPUT.IMAGE_SIZE": 224,
    "INPUT.CROP_PCT": 0.875,
    "INPUT.INTERPOLATION": 2,
    "INPUT.MEAN": [0.485, 0.456, 0.406],
    "INPUT.STD": [0.229, 0.224, 0.225],
    "MODEL.VIT.AVG_POOL": False,
    "MODEL.VIT.NORM_EMBED": True,
    "MODEL.VIT.DROP": 0.0,
    "MODEL.VIT.DROP_PATH": 0.0,
    "MODEL.VIT.MSVIT.ATTN_TYPE": "longformerhand",
    "MODEL.VIT.MSVIT.SHARE_W": True,
    "MODEL.VIT.MSVIT.SHARE_KV": True,
    "MODEL.VIT.MSVIT.ONLY_GLOBAL": False,
    "MODEL.VIT.MSVIT.SW_EXACT": 0,
    "MODEL.VIT.MSVIT.MODE": 0,
}
_ATTENTIONS = {
    "full": "full",
    "longformerhand": "vision_longformer",
    "longformerauto": "vision_longformer",
    "linformer": "linformer",
    "srformer": "spatial_reduction",
    "performer": "performer",
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_MASKS = {0: "chunk", 1: "exact", -1: "cyclic"}
_NEIGHBORS = {0: "all", 1: "random", -1: "self"}
"""MODE of that code: 0 all chunks, 1 the random shift, −1 the own chunk only."""


@dataclasses.dataclass(frozen=True)
class ReleasedConfig:
    """A published configuration in our terms.

    Attributes:
        image_size: height and width of the images, in pixels.
        num_classes: classes of the head.
        options: keyword arguments of `vil.create_model("vil", …)`, without image size and classes.
        data: evaluation transform: crop, interpolation, mean and standard deviation.
    """

    image_size: int
    num_classes: int
    options: dict[str, Any]
    data: DataConfig


def load_released(
    config_path: str | Path,
    checkpoint_path: str | Path,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> MultiScaleViT:
    """Loads a published checkpoint with its published configuration.

    Args:
        config_path: the YAML file published with the checkpoint.
        checkpoint_path: the checkpoint, as `model_best.pth`.
        image_size: another image size in pixels; embeddings and bias tables are resized bilinearly.
        num_classes: another number of classes; a head with more rows keeps its first ones.

    Returns:
        The model in eval mode.

    Raises:
        ConfigError: a file that is missing, unreadable or not of this kind, and weights that do not fit, by
            name.
    """
    released = read_config(config_path)
    model = create_model(
        "vil",
        image_size=image_size or released.image_size,
        num_classes=released.num_classes if num_classes is None else num_classes,
        **released.options,
    )
    load_weights(model, read_checkpoint(checkpoint_path), str(checkpoint_path))
    return model.eval()


def read_config(path: str | Path) -> ReleasedConfig:
    """Reads a published configuration.

    Raises:
        ConfigError: the file cannot be read, or a value in it has no meaning here.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"not valid YAML: {str(error).splitlines()[0]}") from None
    try:
        return _interpret(tree)
    except ConfigError as error:
        raise ConfigError(str(path), str(error)) from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights of a published checkpoint, under its own names without `module.`.

    Raises:
        ConfigError: the file is missing, unreadable, holds anything but tensors and plain values, or NaN.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except pickle.UnpicklingError:
        raise ConfigError(
            str(path), "refused: not a checkpoint, or one that holds more than tensors and plain values"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError):
        raise ConfigError(str(path), "not a checkpoint, or a damaged one") from None
    weights = content.get("net") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(str(path), "not a published ViL checkpoint: it has no weights under `net`")
    result = {}
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise ConfigError(str(path), f"not a published ViL checkpoint: net.{key} is not a tensor")
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigError(str(path), f"net.{key} holds values that are not finite")
        result[str(key).removeprefix("module.")] = value
    return result


def load_weights(model: MultiScaleViT, released: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Loads published weights into a model, strictly.

    What depends on the image size is resized, and a head with more rows is cut to its first ones; both are
    logged.

    Args:
        model: the model that the configuration describes.
        released: published names → weights.
        source: what to call the weights in errors.

    Raises:
        ConfigError: anything missing, unexpected, or of another shape, by name.
    """
    weights = convert_weights(model, released)
    expected = model.state_dict()
    problems = []
    for kind, names in (
        ("missing", sorted(expected.keys() - weights.keys())),
        ("unexpected", sorted(weights.keys() - expected.keys())),
    ):
        if names:
            problems.append(f"{kind}: {', '.join(names)}")
    problems += [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(expected[name].shape)}"
        for name in expected
        if name in weights and weights[name].shape != expected[name].shape
    ]
    if problems:
        raise ConfigError(source, f"does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(weights)


def convert_weights(model: MultiScaleViT, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names and shapes → those of `model`, resized to its image size and cut to its classes.

    A name without a counterpart stays as it is, for the caller to report.
    """
    expected = model.state_dict()
    weights: dict[str, Tensor] = {}
    for key, value in released.items():
        if key.endswith(("relative_position_index", "calls_since_last_redraw")):
            continue  # derived from the window, and a counter that a step number replaces
        if not value.numel():
            continue  # the embedding of no global token
        for name, tensor in _renamed(model, key, value):
            weights[name] = _fitted(name, tensor, expected.get(name))
    return weights


def _renamed(model: MultiScaleViT, key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """One published weight as (name, value) pairs of this model: two for a stacked one, none for a copy."""
    match = re.fullmatch(r"layer(\d+)\.(\d+)\.(.+)", key)
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
        return [(f"{prefix}value_mixture", value)] if attention.value_mixture is not None else []
    return [(key, value)]


def _fitted(name: str, value: Tensor, expected: Tensor | None) -> Tensor:
    """A weight brought to the model's image size or number of classes, where it can be."""
    if expected is None or value.shape == expected.shape:
        return value
    fitted = value
    if name.endswith((".position.rows", ".position.columns")) and value.dim() == 2:
        if value.shape[1] == expected.shape[1]:
            fitted = resize_embedding(value, expected.shape[0])
    elif name.endswith(".bias_table") and value.shape[0] == expected.shape[0] and ".query_key" not in name:
        fitted = resize_offsets(value, ((expected.shape[1] + 1) // 2, (expected.shape[2] + 1) // 2))
    elif name in ("head.weight", "head.bias") and value.shape[0] > expected.shape[0]:
        fitted = value[: expected.shape[0]]
    if fitted is not value:
        _logger.info("%s: %s → %s", name, tuple(value.shape), tuple(fitted.shape))
    return fitted


def _interpret(tree: Any) -> ReleasedConfig:
    """A published configuration as a tree of plain values → our terms."""
    values = dict(DEFAULTS)
    _flatten(tree, "", values)
    for key, default in DEFAULTS.items():
        values[key] = _typed(key, values[key], default)
    if "MODEL.VIT.MSVIT.ARCH" not in values:
        raise ConfigError("MODEL.VIT.MSVIT.ARCH", "is missing: not a published ViL configuration")
    name = str(values["MODEL.VIT.MSVIT.ATTN_TYPE"])
    attention = _choice("MODEL.VIT.MSVIT.ATTN_TYPE", name, _ATTENTIONS)
    if values["MODEL.VIT.MSVIT.ONLY_GLOBAL"] and attention == "vision_longformer":
        attention = "global_only"
    stages = parse_arch(str(values["MODEL.VIT.MSVIT.ARCH"]), attention)
    pooled = values["MODEL.VIT.AVG_POOL"] or not stages[-1].global_tokens
    drop = values["MODEL.VIT.DROP"]
    return ReleasedConfig(
        image_size=values["INPUT.IMAGE_SIZE"],
        num_classes=values["DATA.NUM_CLASSES"],
        options={
            "stages": stages,
            "pool": "avg" if pooled else "cls",
            "mask": _choice("MODEL.VIT.MSVIT.SW_EXACT", values["MODEL.VIT.MSVIT.SW_EXACT"], _MASKS),
            "neighbors": _choice("MODEL.VIT.MSVIT.MODE", values["MODEL.VIT.MSVIT.MODE"], _NEIGHBORS),
            "share_global_projection": values["MODEL.VIT.MSVIT.SHARE_W"],
            "share_key_value_projection": values["MODEL.VIT.MSVIT.SHARE_KV"],
            "norm_embed": values["MODEL.VIT.NORM_EMBED"],
            "drop_path": values["MODEL.VIT.DROP_PATH"],
            "pos_drop_rate": drop,
            "proj_drop_rate": drop,
        },
        data=DataConfig(
            crop_pct=values["INPUT.CROP_PCT"],
            interpolation=_choice("INPUT.INTERPOLATION", values["INPUT.INTERPOLATION"], _INTERPOLATIONS),
            mean=tuple(values["INPUT.MEAN"]),
            std=tuple(values["INPUT.STD"]),
        ),
    )


def parse_arch(arch: str, attention: str) -> list[StageConfig]:
    """Stages from the published notation.

    Args:
        arch: stages joined by `_`, each a list of letter and number: l stage, h heads, d width, n blocks, s
            1 for the sparse attention and 0 for full, g global tokens, p patch, f window, features or
            reduction, a 1 for absolute and 0 for relative position.
        attention: our name of the sparse attention.

    Raises:
        ConfigError: the text is not of this form.
    """
    stages = []
    for text in arch.split("_"):
        letters = {"s": 1, "g": 1, "p": 2, "f": 7, "a": 1}
        for item in text.strip().split(","):
            match = re.fullmatch(r"([lhdnsgpfa])(\d{1,6})", item.strip())
            if not match:
                raise ConfigError("MODEL.VIT.MSVIT.ARCH", f"{item!r} is no letter of lhdnsgpfa with a number")
            letters[match[1]] = int(match[2])
        lacking = {"h", "d", "n"} - letters.keys()
        if lacking:
            raise ConfigError("MODEL.VIT.MSVIT.ARCH", f"stage {text!r} lacks {', '.join(sorted(lacking))}")
        stages.append(
            StageConfig(
                dim=letters["d"],
                heads=letters["h"],
                blocks=letters["n"],
                patch=letters["p"],
                attention=attention if letters["s"] else "full",  # type: ignore[arg-type]
                global_tokens=letters["g"],
                position="absolute" if letters["a"] else "relative",
                window=letters["f"],
                projected_tokens=letters["f"],
                random_features=letters["f"],
                reduction=letters["f"],
            )
        )
    return stages


def _flatten(tree: Any, prefix: str, values: dict[str, Any]) -> None:
    if not isinstance(tree, Mapping):
        raise ConfigError(prefix.rstrip("."), "expected a mapping of keys to values")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _flatten(value, f"{name}.", values)
        else:
            values[name] = value


def _typed(key: str, value: Any, default: Any) -> Any:
    """A value of the type of its default; numbers and tuples may be written as Python text."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ConfigError(key, f"expected a value like {default}, got {value!r}") from None
    if isinstance(default, list):
        numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
        fits = numbers and len(value) == len(default)
    elif isinstance(default, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, type(default)) and (isinstance(value, bool) == isinstance(default, bool))
    if not fits:
        raise ConfigError(key, f"expected a value like {default}, got {value!r}")
    return value


def _choice(key: str, value: Any, meaning: Mapping[Any, str]) -> Any:
    if value not in meaning:
        raise ConfigError(key, f"must be one of {', '.join(map(str, meaning))}, got {value!r}")
    return meaning[value]
