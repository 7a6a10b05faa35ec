"""The models by name: Table 1 of the ICCV 2021 paper, and the registration with timm.

A size is one row in `SIZES` and one file in configs/models.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vil.attention import Attention
from vil.config import AttentionName, ModelConfig, StageConfig, Tree
from vil.errors import UserError, error_reason
from vil.models.limits import check_model_size
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.state_dict import has_published_names, translate_state_dict
from vil.models.timm_models import create_timm_model
from vil.validation import INITIALIZATION, suggestion, validate

OutIndices = int | Sequence[int] | None
"""Levels of features, as in timm."""


@dataclass(frozen=True)
class ModelSize:
    """One row of Table 1.

    Attributes:
        stages: (blocks, patch, heads, dim) per stage.
        sparse: number of first stages with sparse attention. The others use full attention, and the last
            stage has no global token, as in the paper's models; flat models (0) keep theirs.
    """

    stages: tuple[tuple[int, int, int, int], ...]
    sparse: int


SIZES: dict[str, ModelSize] = {
    "vil_tiny": ModelSize(((1, 4, 1, 48), (1, 2, 3, 96), (9, 2, 3, 192), (1, 2, 6, 384)), sparse=2),
    "vil_small": ModelSize(((1, 4, 3, 96), (2, 2, 3, 192), (8, 2, 6, 384), (1, 2, 12, 768)), sparse=2),
    "vil_medium_deep": ModelSize(((1, 4, 3, 96), (4, 2, 3, 192), (16, 2, 6, 384), (1, 2, 12, 768)), sparse=2),
    "vil_medium_wide": ModelSize(((1, 4, 3, 192), (2, 2, 6, 384), (8, 2, 8, 512), (1, 2, 12, 768)), sparse=2),
    "vil_base_deep": ModelSize(((1, 4, 3, 96), (8, 2, 3, 192), (24, 2, 6, 384), (1, 2, 12, 768)), sparse=2),
    "vil_base_wide": ModelSize(((1, 4, 3, 192), (2, 2, 6, 384), (8, 2, 12, 768), (1, 2, 16, 1024)), sparse=2),
    "vil_tiny_3stage": ModelSize(((2, 8, 3, 96), (9, 2, 3, 192), (1, 2, 6, 384)), sparse=1),
    "vil_small_3stage": ModelSize(((2, 8, 3, 192), (9, 2, 6, 384), (1, 2, 12, 768)), sparse=1),
    "evit_tiny_patch16": ModelSize(((12, 16, 3, 192),), sparse=0),
    "evit_small_patch16": ModelSize(((12, 16, 6, 384),), sparse=0),
}


def list_models() -> list[str]:
    """Return the names of the zoo; `vil`, with a list of stages, is another name for `create_model`."""
    return list(SIZES)


def create_model(
    name: str,
    image_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    pool: Literal["avg", "cls"] = "avg",
    attention: AttentionName | Sequence[AttentionName] | None = None,
    blocks: Sequence[int] | None = None,
    position: Literal["relative", "absolute"] | None = None,
    mask: Literal["chunk", "exact", "cyclic"] = "chunk",
    window: int | None = None,
    global_tokens: int | Sequence[int] | None = None,
    neighbors: Literal["all", "self", "random"] = "all",
    drop_path: float = 0.0,
    in_chans: int = 3,
    **options: object,
) -> nn.Module:
    """Create a multi-scale Vision Longformer, or a baseline of timm, with random weights.

    Args:
        name: one of `list_models()`; `vil` with the keyword `stages`, a list of `StageConfig`; or
            `timm/<name>` for a model of timm; options that it does not support are refused.
        image_size: (height, width) of the images in pixels, or one number for both.
        num_classes: classes of the head; 0 for no head.
        pool: input of the head: the mean over all tokens, or the first global token. `cls` adds a global
            token to the last stage of a zoo model if it has none.
        attention: attention of the sparse stages, or one name per stage; None keeps those of the zoo.
            Attentions other than full and vision_longformer have absolute position.
        blocks: blocks per stage.
        position: `relative` or `absolute` in every stage; None is relative.
        mask: keys of the local attention.
        window: side of a chunk of the local attention, in tokens.
        global_tokens: global tokens of every stage, or one number per stage.
        neighbors: chunks that the local attention sees in training.
        drop_path: stochastic depth rate at the last block.
        in_chans: channels of the images.
        **options: further options of `ModelConfig`.

    Raises:
        UserError: an unknown name or option, or options that do not go together; a `ValueError`.
    """
    given = {
        "name": name,
        "image_size": image_size,
        "num_classes": num_classes,
        "pool": None if pool == "avg" else pool,
        "attention": attention,
        "blocks": blocks,
        "position": position,
        "mask": None if mask == "chunk" else mask,
        "window": window,
        "global_tokens": global_tokens,
        "neighbors": None if neighbors == "all" else neighbors,
        "drop_path": drop_path,
        "in_chans": in_chans,
        **options,
    }
    return model_from_config(config_from_options(given))


def config_from_options(options: Mapping[str, object]) -> ModelConfig:
    """Return the validated configuration of options that Python code sets; None keeps a default.

    `stages` may hold `StageConfig` or mappings.
    """
    tree = {
        key: value.item() if isinstance(value, np.generic) else value  # a number of NumPy
        for key, value in options.items()
        if value is not None
    }
    if isinstance(stages := tree.get("stages"), list | tuple):
        tree["stages"] = [dataclasses.asdict(s) if isinstance(s, StageConfig) else s for s in stages]
    return validate(ModelConfig, tree, command_line_keys={"timm_options"})


def model_from_config(
    config: ModelConfig,
    num_classes: int | None = None,
    max_bytes: int | None = None,
) -> nn.Module:
    """Create the model of a configuration, of the zoo, of stages, or of timm, with random weights.

    `init_from` is ignored here; train.py loads those weights.

    Args:
        config: the configuration.
        num_classes: number of classes if the configuration has none.
        max_bytes: limit of the weights in bytes; None is the memory of this machine.

    Raises:
        UserError: options that do not go together; the location is the name in `ModelConfig`.
        ModelTooLargeError: the weights would take more memory than allowed.
    """
    if config.num_classes is None:
        config = dataclasses.replace(config, num_classes=num_classes)
    if config.num_classes is None:
        raise UserError("num_classes", "is needed, as no data gives the number of classes")
    if config.name.startswith("timm/"):
        return create_timm_model(config, max_bytes)
    if config.timm_options is not None:
        raise UserError("timm_options", f"only for a timm/<name> model, not for {config.name}")
    config = dataclasses.replace(config, stages=resolve_stages(config))

    def build(**_: object) -> MultiScaleViT:  # timm passes its own names for what the configuration holds
        return MultiScaleViT(config)

    check_model_size(build, "name", max_bytes)
    return _build_with_timm(
        build,
        config.name,
        _default_levels(config.stages or ()),
        num_classes=config.num_classes,
        in_chans=config.in_chans,
        img_size=config.image_size,
        distillation_token=config.distillation_token,
    )


def check_device(model: nn.Module, device: torch.device) -> None:
    """Raise UserError if the requested attention backend does not run on this device."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.check_device(device)


def resolve_stages(config: ModelConfig) -> list[StageConfig]:
    """Return the stages of a configuration: those of the zoo, or `config.stages`, with its options applied.

    Raises:
        UserError: an unknown name, or options that do not fit the stages.
    """
    if (config.name == "vil") != (config.stages is not None):
        reason = "name: vil requires a list of stages, and a list of stages requires name: vil"
        raise UserError("stages", reason)
    if config.stages is not None:
        stages = [dataclasses.replace(stage) for stage in config.stages]
        sparse = [stage for stage in stages if stage.attention != "full"]
    elif config.name in SIZES:
        stages = _zoo_stages(SIZES[config.name])
        sparse = stages[: SIZES[config.name].sparse]
    else:
        every_name = f"; expected one of {', '.join(SIZES)}, vil and timm/<name>"
        hint = suggestion(config.name, SIZES, otherwise=every_name)
        raise UserError("name", f"there is no model {config.name!r}{hint}")
    for field in dataclasses.fields(StageConfig):
        value = getattr(config, field.name, None)  # options of a stage that a model can set for all
        if value is None:
            continue
        if field.name == "attention" and not isinstance(value, list | tuple):
            if not sparse and value != "full":
                reason = f"{config.name} has no sparse stage; give one name per stage, e.g. [{value}]"
                raise UserError("attention", reason)
            for stage in sparse:
                stage.attention = value
            continue
        values = list(value) if isinstance(value, list | tuple) else [value] * len(stages)
        if len(values) != len(stages):
            kind = "names" if field.name == "attention" else "numbers"
            raise UserError(field.name, f"needs {len(stages)} {kind}, one per stage, got {values}")
        for stage, stage_value in zip(stages, values):
            setattr(stage, field.name, stage_value)
    if config.name != "vil" and config.global_tokens is None:
        if config.stage_globals == "carry":
            for stage in stages:
                stage.global_tokens = stages[0].global_tokens
        if config.pool == "cls":
            stages[-1].global_tokens = max(1, stages[-1].global_tokens)
    return stages


def _zoo_stages(size: ModelSize) -> list[StageConfig]:
    stages, stride = [], 1
    for index, (blocks, patch, heads, dim) in enumerate(size.stages):
        stride *= patch
        is_last = index == len(size.stages) - 1
        stages.append(
            StageConfig(
                dim=dim,
                heads=heads,
                blocks=blocks,
                patch=patch,
                attention="vision_longformer" if index < size.sparse else "full",
                global_tokens=0 if is_last and size.sparse else 1,
                reduction=max(1, 32 // stride),  # keys and values at 1/32 of the image
            )
        )
    return stages


# --- Registration with timm ---------------------------------------------------------------------------------

_TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "global_pool": "pool",
    "drop_path_rate": "drop_path",
    "drop_rate": "head_dropout",
    "pos_drop_rate": "position_dropout",
    "proj_drop_rate": "dropout",
    "attn_drop_rate": "attention_dropout",
}
"""timm's names of arguments -> ours."""
_NOT_ARCHITECTURE = (
    *("name", "timm_options", *INITIALIZATION),
    *("image_size", "num_classes", "in_chans", "pool"),  # timm saves these itself
    *("drop_path", "dropout", "position_dropout", "attention_dropout", "head_dropout"),
)


def _model_from_timm(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **arguments: Any
) -> MultiScaleViT:
    """Create a model from timm's keyword arguments, and any options of `ModelConfig`."""
    options = {_TIMM_ARGUMENTS.get(key, key): value for key, value in arguments.items()}
    pool = options.pop("pool", None)
    options["pool"] = {"token": "cls", "avg": None, "": None}.get(pool, pool)
    if "proj_drop_rate" in arguments:  # in timm it does not include the embeddings
        options.setdefault("position_dropout", 0.0)
    config = config_from_options({"name": name, **options})
    config.stages = resolve_stages(config)
    with nullcontext() if device is None else torch.device(device):
        model = MultiScaleViT(config)
    if pool == "":
        model.set_pool(pool)
    return model if dtype is None else model.to(dtype=dtype)


def _build_with_timm(
    build: Callable[..., MultiScaleViT],
    name: str,
    levels: tuple[int, ...],
    pretrained: bool = False,
    **kwargs: Any,
) -> MultiScaleViT:
    """Build a model through timm, which adds its configuration, loads weights, and wraps for features_only.

    Args:
        build: called with the keyword arguments that timm does not use itself.
        name: registered name.
        levels: feature maps that features_only returns by default.
        pretrained, kwargs: see `timm.models.build_model_with_cfg`.
    """

    if kwargs.get("feature_cls", "getter") not in ("getter", FeatureGetterNet):
        raise UserError("feature_cls", "must be getter: a stage returns its tokens and the size of their map")
    if kwargs.get("distillation_token"):
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        kwargs["pretrained_cfg_overlay"] = {"classifier": ("head", "head_dist"), **overlay}

    def build_and_hook(**arguments: Any) -> MultiScaleViT:
        model = build(**arguments)
        model.register_load_state_dict_pre_hook(_translate_on_load)
        model._model_args = _architecture(model.config)
        return model

    model = build_model_with_cfg(
        build_and_hook,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": levels, "feature_cls": "getter"},
        **kwargs,
    )
    model._model_args = getattr(model, "model", model)._model_args  # also on a wrapper of features_only
    return model


def _default_levels(
    stages: Sequence[StageConfig | Mapping[str, Any]], blocks: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the levels of features that features_only returns: all stages, or as many as timm's ViTs do.

    A model with one stage has one level per block, of which these are the last three.
    """
    if len(stages) != 1:
        return tuple(range(len(stages)))
    stage = stages[0]
    depth = stage.blocks if isinstance(stage, StageConfig) else stage.get("blocks", StageConfig.blocks)
    count = max(1, blocks[0] if blocks else depth)
    return tuple(range(max(0, count - 3), count))


def to_features(model: nn.Module, config: ModelConfig, out_indices: OutIndices = None) -> nn.Module:
    """Return a model that maps images to the feature maps of `model`, as timm's features_only does.

    Args:
        model: the model; one of this project is changed.
        config: its configuration.
        out_indices: levels, as in timm: a number for the last ones; None is timm's default, for models of
            this project all stages, or the last three blocks of a model with one stage.

    Raises:
        UserError: levels that the model does not have, or a model of timm without feature maps.
    """
    cfg: Any = model.pretrained_cfg
    try:
        if isinstance(model, MultiScaleViT):
            levels = _default_levels(model.config.stages or ()) if out_indices is None else out_indices
            features = FeatureGetterNet(model, levels if isinstance(levels, int) else tuple(levels))
            features._traits, features.in_chans = dict(getattr(model, "_traits", {})), model.in_chans  # type: ignore[assignment]
            features.pretrained_cfg = features.default_cfg = pretrained_cfg_for_features(cfg)  # type: ignore[assignment]
            return features
        overlay = {**cfg, "state_dict": model.state_dict(), "custom_load": False, "label_offset": 0}
        known = {field.name for field in dataclasses.fields(timm.models.PretrainedCfg)}
        overlay = {key: value for key, value in overlay.items() if key in known}
        more: Tree = {"features_only": True, "pretrained": True, "pretrained_cfg_overlay": overlay}
        if out_indices is not None:
            more["out_indices"] = out_indices
        return create_timm_model(config, more=more)
    except AssertionError as error:
        raise UserError("out_indices", error_reason(error)) from None


def _architecture(config: ModelConfig) -> Tree:
    """Return the options from which `timm.create_model` builds the model again, as JSON has them."""
    tree = dataclasses.asdict(config)
    if config.name != "vil":
        tree["stages"] = None
        if config.pool == "cls" and config.global_tokens is None:  # reset_classifier may change the pooling
            tree["global_tokens"] = [stage.global_tokens for stage in config.stages or ()]
    names = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if tree[field.name] != field.default and field.name not in _NOT_ARCHITECTURE
    ]
    return {name: tree[name] for name in names}


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint's state dict under the names of `model`; timm calls it for pretrained weights."""
    return translate_state_dict(model, state_dict)


def _translate_on_load(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Translate published checkpoints in `load_state_dict`, which timm's `checkpoint_path` calls directly."""
    if not prefix and ("net" in state_dict or has_published_names(state_dict)):
        weights = translate_state_dict(model, state_dict)
        state_dict.clear()
        state_dict.update(weights)


_REGISTERED = (*SIZES, "vil")

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {  # timm's default transform is the paper's evaluation transform
            "url": "",
            "fixed_input_size": True,
            "first_conv": "stages.0.patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        }
        for name in _REGISTERED
    }
)


def _entrypoint(name: str) -> Callable[..., MultiScaleViT]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MultiScaleViT:
        stages = _zoo_stages(SIZES[name]) if name in SIZES else kwargs.get("stages") or ()
        levels = _default_levels(stages, kwargs.get("blocks"))
        return _build_with_timm(partial(_model_from_timm, name), name, levels, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"Create {name} from timm's keyword arguments; see `vil.create_model`."
    entrypoint.__module__ = __name__
    return entrypoint


for _name in _REGISTERED:
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name)))
