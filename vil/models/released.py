"""Published ViL checkpoints and their configurations, in our terms.

A published checkpoint is a dict with `net`, `arch`, `epoch`, `best_acc`; its configuration is the YAML file
that the training code printed.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vil import weight_files
from vil.config import ConfigError, DataConfig, ModelConfig, StageConfig
from vil.models.zoo import model_from_file
from vil.weight_files import WeightsFile
from vil.yaml_files import read_yaml

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
    "MODEL.VIT.DROP_PATH": 0.1,
    "MODEL.VIT.MSVIT.ATTN_TYPE": "longformerhand",
    "MODEL.VIT.MSVIT.SHARE_W": True,
    "MODEL.VIT.MSVIT.SHARE_KV": True,
    "MODEL.VIT.MSVIT.ONLY_GLOBAL": False,
    "MODEL.VIT.MSVIT.SW_EXACT": 0,
    "MODEL.VIT.MSVIT.MODE": 0,
}
ATTENTION_NAMES = {
    "full": "full",
    "longformerhand": "vision_longformer",
    "longformerauto": "vision_longformer",
    "linformer": "linformer",
    "srformer": "spatial_reduction",
    "performer": "performer",
}
"""ATTN_TYPE of that code → our names."""
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_MASKS = {0: "chunk", 1: "exact", -1: "cyclic"}
_NEIGHBORS = {0: "all", 1: "random", -1: "self"}
"""MODE of that code: 0 all chunks, 1 the random shift, −1 the own chunk only."""


@dataclasses.dataclass(frozen=True)
class ReleasedConfig:
    """A published configuration in our terms.

    Attributes:
        model: the model: `vil` with its stages, and their image size and classes.
        data: evaluation transform: crop, interpolation, mean and standard deviation; the rest as always.
    """

    model: ModelConfig
    data: DataConfig


def load_released(
    config_path: str | Path,
    checkpoint_path: str | Path,
    image_size: int | None = None,
    num_classes: int | None = None,
) -> nn.Module:
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
    file = read_weights(checkpoint_path, read_config(config_path))
    return model_from_file(file, image_size, num_classes).eval()


def read_weights(
    path: str | Path,
    released: ReleasedConfig | None = None,
    which: Literal["best", "last"] = "best",
    weights: weight_files.Choice = "auto",
) -> WeightsFile:
    """Reads any file of weights; a published one gets its model and transform from its configuration.

    Args:
        path, which, weights: see `vil.weight_files.read`.
        released: the configuration published with the checkpoint; None leaves a published one without.

    Raises:
        ConfigError: a file that cannot be used, or a configuration beside a file that has its own.
    """
    file = weight_files.read(path, which, weights)
    if released is None:
        return file
    if file.origin != "published":
        raise ConfigError(file.path, "no published checkpoint: it does not go with a published configuration")
    return dataclasses.replace(file, model=released.model, data=weight_files.transform_of(released.data))


def open_model(
    checkpoint: str | Path,
    released_config: str | Path | None = None,
    which: Literal["best", "last"] = "best",
    weights: weight_files.Choice = "auto",
) -> tuple[nn.Module, WeightsFile]:
    """The model of any file of weights, in eval mode, and the file with its weights under the model's names.

    Args:
        checkpoint, which, weights: see `vil.weight_files.read`.
        released_config: the YAML file published with the checkpoint.

    Raises:
        ConfigError: a file that cannot be used, does not say which model it is, or does not fit that model.
    """
    released = None if released_config is None else read_config(released_config)
    file = read_weights(checkpoint, released, which, weights)
    model = model_from_file(file).eval()
    return model, dataclasses.replace(file, origin="converted", weights=model.state_dict())


def read_config(path: str | Path) -> ReleasedConfig:
    """Reads a published configuration.

    Raises:
        ConfigError: the file cannot be read, or a value in it has no meaning here.
    """
    tree = read_yaml(path)
    try:
        return _interpret(tree)
    except ConfigError as error:
        raise ConfigError(str(path), str(error)) from error


def _interpret(tree: Any) -> ReleasedConfig:
    """A published configuration as a tree of plain values → our terms."""
    values = dict(DEFAULTS)
    _flatten(tree, "", values)
    for key, default in DEFAULTS.items():
        values[key] = _typed(key, values[key], default)
    if "MODEL.VIT.MSVIT.ARCH" not in values:
        raise ConfigError("MODEL.VIT.MSVIT.ARCH", "is missing: not a published ViL configuration")
    name = str(values["MODEL.VIT.MSVIT.ATTN_TYPE"])
    attention = _choice("MODEL.VIT.MSVIT.ATTN_TYPE", name, ATTENTION_NAMES)
    if values["MODEL.VIT.MSVIT.ONLY_GLOBAL"] and attention == "vision_longformer":
        attention = "global_only"
    stages = parse_arch(str(values["MODEL.VIT.MSVIT.ARCH"]), attention)
    pooled = values["MODEL.VIT.AVG_POOL"] or not stages[-1].global_tokens
    return ReleasedConfig(
        model=ModelConfig(
            name="vil",
            image_size=values["INPUT.IMAGE_SIZE"],
            num_classes=values["DATA.NUM_CLASSES"],
            stages=stages,
            pool="avg" if pooled else "cls",
            mask=_choice("MODEL.VIT.MSVIT.SW_EXACT", values["MODEL.VIT.MSVIT.SW_EXACT"], _MASKS),
            neighbors=_choice("MODEL.VIT.MSVIT.MODE", values["MODEL.VIT.MSVIT.MODE"], _NEIGHBORS),
            share_global_projection=values["MODEL.VIT.MSVIT.SHARE_W"],
            share_key_value_projection=values["MODEL.VIT.MSVIT.SHARE_KV"],
            norm_embed=values["MODEL.VIT.NORM_EMBED"],
            drop_path=values["MODEL.VIT.DROP_PATH"],
            dropout=values["MODEL.VIT.DROP"],
        ),
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
