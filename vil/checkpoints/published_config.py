"""Configurations published with the ViL checkpoints: the YAML files of the paper's code."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from vil.config import AttentionName, EvalConfig, ModelConfig, StageConfig, Tree
from vil.errors import UserError, errors_in_option
from vil.runtime.yaml_files import read_yaml
from vil.validation import as_tree, flatten, validate

Name = TypeVar("Name", bound=str)

DEFAULTS: Tree = {
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
"""Defaults of the paper's code for keys that a configuration omits."""
ATTENTION_NAMES: dict[str, AttentionName] = {
    "full": "full",
    "longformerhand": "vision_longformer",
    "longformerauto": "vision_longformer",
    "linformer": "linformer",
    "srformer": "spatial_reduction",
    "performer": "performer",
}
"""Attentions by ATTN_TYPE."""
_ARCH = "MODEL.VIT.MSVIT.ARCH"
_INTERPOLATIONS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_MASKS: dict[int, Literal["chunk", "exact", "cyclic"]] = {0: "chunk", 1: "exact", -1: "cyclic"}
_NEIGHBORS: dict[int, Literal["all", "random", "self"]] = {0: "all", 1: "random", -1: "self"}
"""Neighbors by MODE: 0 all chunks, 1 random shift, −1 the query's chunk alone."""


@dataclass(frozen=True)
class PublishedConfig:
    """The model of a published configuration, and its options of the evaluation transform (`DataConfig`)."""

    model: ModelConfig
    transform: Tree


def read_published_config(path: str | Path) -> PublishedConfig:
    """Return the model and the evaluation transform of a published configuration."""
    tree = read_yaml(path)
    with errors_in_option(str(path)):
        return _interpret(tree)


def _interpret(tree: object) -> PublishedConfig:
    if not isinstance(tree, Mapping):
        raise UserError("", "expected a mapping of keys to values")
    values = {**DEFAULTS, **flatten(tree)}
    for key, default in DEFAULTS.items():
        values[key] = _typed(key, values[key], default)
    if _ARCH not in values:
        raise UserError(_ARCH, "is missing: not a published ViL configuration")

    def choose(key: str, names: Mapping[int, Name] | Mapping[str, Name]) -> Name:
        if values[key] not in names:
            raise UserError(key, f"must be one of {', '.join(map(str, names))}, got {values[key]!r}")
        return names[values[key]]

    attention = choose("MODEL.VIT.MSVIT.ATTN_TYPE", ATTENTION_NAMES)
    if values["MODEL.VIT.MSVIT.ONLY_GLOBAL"] and attention == "vision_longformer":
        attention = "global_only"
    stages = parse_arch(str(values[_ARCH]), attention)
    is_pooled = values["MODEL.VIT.AVG_POOL"] or not stages[-1].global_tokens
    model = ModelConfig(
        name="vil",
        image_size=values["INPUT.IMAGE_SIZE"],
        num_classes=values["DATA.NUM_CLASSES"],
        stages=stages,
        pool="avg" if is_pooled else "cls",
        mask=choose("MODEL.VIT.MSVIT.SW_EXACT", _MASKS),
        neighbors=choose("MODEL.VIT.MSVIT.MODE", _NEIGHBORS),
        share_global_projection=values["MODEL.VIT.MSVIT.SHARE_W"],
        share_key_value_projection=values["MODEL.VIT.MSVIT.SHARE_KV"],
        norm_embed=values["MODEL.VIT.NORM_EMBED"],
        drop_path=values["MODEL.VIT.DROP_PATH"],
        dropout=values["MODEL.VIT.DROP"],
    )
    transform = {
        "crop_pct": values["INPUT.CROP_PCT"],
        "interpolation": choose("INPUT.INTERPOLATION", _INTERPOLATIONS),
        "mean": list(values["INPUT.MEAN"]),
        "std": list(values["INPUT.STD"]),
    }
    config = validate(EvalConfig, {"model": as_tree(model), "data": transform})
    return PublishedConfig(config.model, transform)


def parse_arch(arch: str, attention: AttentionName) -> list[StageConfig]:
    """Return the stages that the published notation describes.

    Args:
        arch: stages joined by `_`, each a list of letters with a number: l stage, h heads, d width, n blocks,
            s 1 for the sparse attention and 0 for full, g global tokens, p patch, f window, features or
            reduction, a 1 for absolute and 0 for relative position.
        attention: the sparse attention.
    """
    stages = []
    for text in arch.split("_"):
        given: dict[str, int] = {}
        for item in text.strip().split(","):
            match = re.fullmatch(r"([lhdnsgpfa])(\d{1,6})", item.strip())
            if not match:
                raise UserError(_ARCH, f"{item!r} is not one of the letters lhdnsgpfa followed by a number")
            if match[1] in given:
                raise UserError(_ARCH, f"stage {text!r} gives {match[1]} twice")
            given[match[1]] = int(match[2])
        letters = {"s": 1, "g": 1, "p": 2, "f": 7, "a": 1, **given}
        if missing := sorted({"h", "d", "n"} - letters.keys()):
            raise UserError(_ARCH, f"stage {text!r} lacks {', '.join(missing)}")
        stages.append(
            StageConfig(
                dim=letters["d"],
                heads=letters["h"],
                blocks=letters["n"],
                patch=letters["p"],
                attention=attention if letters["s"] else "full",
                global_tokens=letters["g"],
                position="absolute" if letters["a"] else "relative",
                window=letters["f"],
                projected_tokens=letters["f"],
                random_features=letters["f"],
                reduction=letters["f"],
            )
        )
    return stages


def _typed(key: str, value: object, default: object) -> object:
    """Return a value of the type of its default; numbers and tuples may be written as Python literals."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python's parser
                value = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise UserError(key, f"expected a value like {default}, got {value!r}") from None
    if isinstance(default, list) and isinstance(value, list | tuple):
        is_valid = len(value) == len(default) and all(isinstance(item, int | float) for item in value)
    else:
        is_valid = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
    if not is_valid:
        raise UserError(key, f"expected a value like {default}, got {value!r}")
    return value
