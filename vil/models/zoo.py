"""The models by name: Table 1 of the ICCV 2021 paper as one table of sizes, registered with timm.

A size is one row in `SIZES` and one file in configs/models.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vil import weight_files
from vil.attention import Attention
from vil.config import AttentionName, ConfigError, ModelConfig, StageConfig
from vil.models.limits import buildable, check_numbers, sized_for
from vil.models.multiscale_vit import MultiScaleViT
from vil.models.released_names import convert_weights
from vil.models.weights import load_file, resized
from vil.schema import timm_start_options
from vil.weight_files import NO_MODEL, WeightsFile

MAX_REASON = 300
"""Characters of timm's own reason in an error."""

_logger = logging.getLogger(__name__)

Position = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Size:
    """One row of Table 1: per stage (blocks, patch, heads, dim), and how many first stages attend sparsely.

    The last `len(stages) - sparse` stages use full attention, and the last stage has no global token, as in
    the paper's models; flat models (`sparse` 0) keep theirs.
    """

    stages: tuple[tuple[int, int, int, int], ...]
    sparse: int


SIZES: dict[str, Size] = {
    "vil_tiny": Size(((1, 4, 1, 48), (1, 2, 3, 96), (9, 2, 3, 192), (1, 2, 6, 384)), sparse=2),
    "vil_small": Size(((1, 4, 3, 96), (2, 2, 3, 192), (8, 2, 6, 384), (1, 2, 12, 768)), sparse=2),
    "vil_medium_deep": Size(((1, 4, 3, 96), (4, 2, 3, 192), (16, 2, 6, 384), (1, 2, 12, 768)), sparse=2),
    "vil_medium_wide": Size(((1, 4, 3, 192), (2, 2, 6, 384), (8, 2, 8, 512), (1, 2, 12, 768)), sparse=2),
    "vil_base_deep": Size(((1, 4, 3, 96), (8, 2, 3, 192), (24, 2, 6, 384), (1, 2, 12, 768)), sparse=2),
    "vil_base_wide": Size(((1, 4, 3, 192), (2, 2, 6, 384), (8, 2, 12, 768), (1, 2, 16, 1024)), sparse=2),
    "vil_tiny_3stage": Size(((2, 8, 3, 96), (9, 2, 3, 192), (1, 2, 6, 384)), sparse=1),
    "vil_small_3stage": Size(((2, 8, 3, 192), (9, 2, 6, 384), (1, 2, 12, 768)), sparse=1),
    "evit_tiny_patch16": Size(((12, 16, 3, 192),), sparse=0),
    "evit_small_patch16": Size(((12, 16, 6, 384),), sparse=0),
}


def list_models() -> list[str]:
    """Names of all models of the zoo; `vil` with a list of stages can be created besides."""
    return list(SIZES)


def create_model(
    name: str | None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    pool: Literal["avg", "cls"] = "avg",
    attention: AttentionName | Sequence[AttentionName] | None = None,
    blocks: Sequence[int] | None = None,
    position: Position | None = None,
    mask: Literal["chunk", "exact", "cyclic"] = "chunk",
    window: int | None = None,
    global_tokens: int | Sequence[int] | None = None,
    neighbors: Literal["all", "self", "random"] = "all",
    drop_path: float = 0.0,
    in_chans: int = 3,
    checkpoint: str | Path | WeightsFile | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a multi-scale Vision Longformer, or a baseline of timm.

    Args:
        name: one of `list_models()`; `vil` with the keyword `stages`, a list of `StageConfig`; `timm/<name>`,
            a model of timm, for which options that it cannot have are refused; None for the model that
            `checkpoint` describes.
        image_size: (height, width) of the images in pixels, or one number for both; None is the checkpoint's,
            or 224.
        num_classes: classes of the head; 0 for none; None is the checkpoint's number, or 1000.
        pool: what the head sees: the mean over all tokens, or the first global token. Where the zoo's last
            stage has no global token, `cls` gives it one.
        attention: attention of the sparse stages, or one name per stage; None keeps the zoo's own. Attentions
            without offsets (all but full and vision_longformer) take absolute position in their stages.
        blocks: blocks per stage.
        position: `relative` or `absolute` in every stage; the zoo's own is relative.
        mask: keys of the local attention.
        window: side of a chunk of the local attention, in tokens.
        global_tokens: global tokens of every stage, or one number per stage.
        neighbors: chunks that the local attention sees in training.
        drop_path: stochastic depth at the last block.
        in_chans: channels of the images.
        checkpoint: weights to load, strictly: safetensors of tools/convert.py, a run's folder, a checkpoint
            of train.py or a published one. Where it holds a model of this name, its options are those of the
            model, and arguments that differ from their defaults go over them; for any other name the weights
            must fit what the arguments describe. Resizing and cutting are logged (`vil.models.weights`).
        **options: further options of `MultiScaleViT` (`share_global_projection`, `attn_drop_rate`, …) and
            of the stages (`projected_tokens`, `random_features`, `reduction`).

    Raises:
        ConfigError: an unknown name, or an impossible combination; a `ValueError`. Also a checkpoint that
            cannot be read or does not fit.
    """
    arguments = dict(
        image_size=image_size, num_classes=num_classes, pool=pool, attention=attention, blocks=blocks,
        position=position, mask=mask, window=window, global_tokens=global_tokens, neighbors=neighbors,
        drop_path=drop_path, in_chans=in_chans, **options,
    )  # fmt: skip
    given = {
        key: value for key, value in arguments.items() if value is not None and value != _DEFAULTS.get(key)
    }
    file = None
    if checkpoint is not None:
        file = checkpoint if isinstance(checkpoint, WeightsFile) else weight_files.read(checkpoint)
        name, given = _over_file(name, file, given)
    if name is None:
        raise ConfigError("name", "is needed where there is no checkpoint")
    given = {"image_size": 224, "num_classes": 1000, **given}
    check_numbers({key: value for key, value in given.items() if key != "image_size"})  # has its own limit
    if name.startswith("timm/"):
        with nullcontext() if file is None else sized_for(file):
            model = _timm_model({"name": name, **given})
        if file is not None:
            load_file(model, file, given["image_size"])
        return model
    if name != "vil" and name not in SIZES:
        close = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(SIZES)}, vil and timm/<name>"
        raise ConfigError("name", f"there is no model {name!r}; {hint}")
    with buildable("name"), nullcontext() if file is None else sized_for(file):
        model = _build(name, **{_TIMM_NAMES.get(key, key): value for key, value in given.items()})
    if file is not None:
        load_file(model, file)
    return model


_DEFAULTS = {"pool": "avg", "mask": "chunk", "neighbors": "all", "drop_path": 0.0, "in_chans": 3}
"""The arguments of `create_model` whose default is a value."""
_TIMM_NAMES = {"image_size": "img_size", "pool": "global_pool", "drop_path": "drop_path_rate"}
"""The arguments of `create_model` that timm's contract calls otherwise."""


def _over_file(
    name: str | None, file: WeightsFile, given: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The name and the arguments of the model in a file of weights, with the given arguments over them."""
    if file.model is None:
        if name is None:
            raise ConfigError(file.path, NO_MODEL)
        return name, given
    stored = _arguments(file.model)
    own_name = stored.pop("name")
    if name not in (None, own_name):
        stored = {key: stored[key] for key in ("image_size", "num_classes") if key in stored}
    return name or own_name, {**stored, **given}


def model_from_file(
    file: WeightsFile, image_size: int | None = None, num_classes: int | None = None
) -> nn.Module:
    """The model that a file of weights describes, with these weights.

    Args:
        file: the weights and their model.
        image_size: another image size in pixels.
        num_classes: another number of classes.

    Raises:
        ConfigError: the file does not describe a model, or the weights do not fit it.
    """
    if file.model is None:
        raise ConfigError(file.path, NO_MODEL)
    changes: dict[str, Any] = {"image_size": image_size, "num_classes": num_classes}
    config = dataclasses.replace(file.model, **{k: v for k, v in changes.items() if v is not None})
    with sized_for(file):
        model = model_from_config(config)
    load_file(model, file, config.image_size)
    return model


def check_device(model: nn.Module, device: torch.device) -> None:
    """Raises ConfigError where the model asks for an implementation of attention that cannot run there."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.check_device(device)


def model_from_config(config: ModelConfig, num_classes: int | None = None) -> nn.Module:
    """Creates what a model section describes: a model of the zoo, of stages, or of timm.

    Weights are the first ones: `init_from` is for the program that trains.

    Args:
        config: the section.
        num_classes: classes where the section leaves them open.

    Raises:
        ConfigError: the key that cannot be used, as in the section.
    """
    classes = config.num_classes if config.num_classes is not None else num_classes
    if classes is None:
        raise ConfigError("num_classes", "is needed where no data says how many classes there are")
    if classes < 0:
        raise ConfigError("num_classes", f"must be 0 or more, got {classes}")
    config = dataclasses.replace(config, num_classes=classes)
    if config.name.startswith("timm/"):
        arguments = _arguments(config)
        check_numbers(arguments)
        return _timm_model(arguments)
    if config.timm_options is not None:
        raise ConfigError("timm_options", f"only for a timm/<name> model, not for {config.name}")
    if (config.name == "vil") != (config.stages is not None):
        raise ConfigError("stages", "name: vil and a list of stages belong together")
    return create_model(**_arguments(config))


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """What a model section sets, as arguments of `create_model`; for a baseline of timm, as it stands."""
    arguments = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    arguments |= {"name": config.name, "image_size": config.image_size}
    for key in ("init_from", "init_released_config"):
        arguments.pop(key, None)
    if config.name.startswith("timm/"):
        return arguments
    if "dropout" in arguments:
        arguments["pos_drop_rate"] = arguments["proj_drop_rate"] = arguments.pop("dropout")
    if "attention_dropout" in arguments:
        arguments["attn_drop_rate"] = arguments.pop("attention_dropout")
    return arguments


def _timm_model(options: dict[str, Any]) -> nn.Module:
    """A baseline of timm; options that it cannot have are refused."""
    name = options.pop("name").removeprefix("timm/")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean timm/{close[0]}?" if close else ""
        raise ConfigError("name", f"timm has no model {name!r}{hint}")
    arguments = dict(options.pop("timm_options", None) or {})
    arguments["num_classes"] = options.pop("num_classes")
    image_size = options.pop("image_size")
    for ours, theirs in (("in_chans", "in_chans"), ("drop_path", "drop_path_rate")):
        if ours in options:
            arguments[theirs] = options.pop(ours)
    if "pool" in options:
        arguments["global_pool"] = {"cls": "token"}.get(options["pool"], options["pool"])
        options.pop("pool")
    if options:
        raise ConfigError(next(iter(options)), f"timm/{name} has no such option; see timm_options")
    if start := timm_start_options(arguments):
        _logger.info("timm/%s: timm loads weights, as asked by %s", name, ", ".join(sorted(start)))
    try:
        if (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).fixed_input_size:
            arguments["img_size"] = image_size
        with buildable("name"):
            return timm.create_model(name, **arguments)
    except ConfigError:
        raise
    except Exception as error:  # of whatever kind: its models check their options little
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise ConfigError("timm_options", f"timm cannot create {name}: {reason}") from error


def pretrained_classes(name: str) -> int:
    """Return how many classes timm's weights of a timm/<name> model have."""
    cfg = timm.models.get_pretrained_cfg(name.removeprefix("timm/")) or timm.models.PretrainedCfg()
    return cfg.num_classes


def pretrained_transform(name: str) -> dict[str, Any]:
    """Return the transform that belongs to timm's weights of a model, as options of a data section."""
    cfg = timm.models.get_pretrained_cfg(name.removeprefix("timm/")) or timm.models.PretrainedCfg()
    transform: dict[str, Any] = {"mean": list(cfg.mean), "std": list(cfg.std), "crop_pct": cfg.crop_pct}
    if cfg.interpolation in ("nearest", "bilinear", "bicubic", "lanczos"):
        transform["interpolation"] = cfg.interpolation
    return transform


def stages_of(
    name: str,
    *,
    pool: str = "avg",
    stage_globals: str = "discard",
    attention: AttentionName | Sequence[AttentionName] | None = None,
    blocks: Sequence[int] | None = None,
    position: Position | None = None,
    window: int | None = None,
    global_tokens: int | Sequence[int] | None = None,
    projected_tokens: int | None = None,
    random_features: int | None = None,
    reduction: int | None = None,
    stages: Sequence[StageConfig] | None = None,
) -> list[StageConfig]:
    """The stages of a zoo model (or the given ones, for `vil`), with everything that is not None changed.

    Raises:
        ConfigError: as `create_model`.
    """
    if name == "vil":
        if not stages:
            raise ConfigError("stages", "name: vil needs a list of stages")
        result, sparse = [dataclasses.replace(stage) for stage in stages], None
    else:
        if stages is not None:
            raise ConfigError("stages", f"only for name: vil, not for {name}")
        result, sparse = _zoo_stages(SIZES[name]), SIZES[name].sparse
    if blocks is not None:
        _spread(result, "blocks", blocks)
    if isinstance(attention, str):
        chosen = [s for s in result if s.attention != "full"] if sparse is None else result[:sparse]
        if not chosen and attention != "full":
            reason = f"{name} has no sparse stage; give one name per stage, as [{attention}]"
            raise ConfigError("attention", reason)
        for stage in chosen:
            stage.attention = attention
    elif attention is not None:
        _spread(result, "attention", attention)
    changes = {
        "position": position, "window": window, "global_tokens": global_tokens,
        "projected_tokens": projected_tokens, "random_features": random_features, "reduction": reduction,
    }  # fmt: skip
    for key, value in changes.items():
        if value is not None:
            _spread(result, key, value if isinstance(value, list | tuple) else [value] * len(result))
    if stage_globals == "carry" and global_tokens is None and name != "vil":
        for stage in result:
            stage.global_tokens = result[0].global_tokens
    if pool == "cls" and global_tokens is None and name != "vil":
        result[-1].global_tokens = max(1, result[-1].global_tokens)
    return result


def _spread(stages: Sequence[StageConfig], key: str, values: Sequence[Any]) -> None:
    """Gives each stage its own value of the option `key`."""
    if len(values) != len(stages):
        words = "names" if key == "attention" else "numbers"
        raise ConfigError(key, f"needs {len(stages)} {words}, one per stage, got {list(values)}")
    for stage, value in zip(stages, values):
        setattr(stage, key, value)


def _zoo_stages(size: Size) -> list[StageConfig]:
    stages, stride = [], 1
    for number, (blocks, patch, heads, dim) in enumerate(size.stages):
        stride *= patch
        last = number == len(size.stages) - 1
        stages.append(
            StageConfig(
                dim=dim,
                heads=heads,
                blocks=blocks,
                patch=patch,
                attention="vision_longformer" if number < size.sparse else "full",
                global_tokens=0 if last and size.sparse else 1,
                reduction=max(1, 32 // stride),  # keys and values at 1/32 of the image
            )
        )
    return stages


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds → the state dict of `model`, as timm asks of its models.

    Args:
        state_dict: a state dict of ours, one with the paper's published names, or a whole published
            checkpoint, with its weights under `net`.
        model: the model; embeddings and bias tables are resized to its image size.
    """
    content = state_dict.get("net", state_dict)
    weights = {str(key).removeprefix("module."): value for key, value in content.items()}
    if not isinstance(model, MultiScaleViT):  # a wrapper, as for features_only: its names are not ours
        return weights
    if any(key.startswith("layer1.") for key in weights):
        weights = convert_weights(model, weights)
    return resized(model, weights)


def _accept_published(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict`, and so timm's `checkpoint_path`, take published checkpoints as they are."""
    if not prefix and ("net" in state_dict or any(key.startswith("layer1.") for key in state_dict)):
        weights = checkpoint_filter_fn(state_dict, model)
        state_dict.clear()
        state_dict.update(weights)


_STAGE_OPTIONS = (
    "attention", "blocks", "position", "window", "global_tokens",
    "projected_tokens", "random_features", "reduction", "stages",
)  # fmt: skip
_MODEL_OPTIONS = (
    "mask", "neighbors", "stage_globals", "share_global_projection", "share_key_value_projection",
    "attention_backend", "mlp_ratio", "norm_embed",
)  # fmt: skip
"""Options of `MultiScaleViT` that make a model what it is, beside those that timm keeps for every model."""


def _build(name: str, pretrained: bool = False, **options: Any) -> MultiScaleViT:
    """Builds a model in timm's way: options are those of `MultiScaleViT` and of `stages_of`.

    Stages may be mappings, as in a configuration of the Hugging Face hub.
    """
    pool = {"token": "cls"}.get(options.get("global_pool", "avg"), options.get("global_pool", "avg"))
    changes = {key: options.pop(key) for key in _STAGE_OPTIONS if key in options}
    if changes.get("stages"):
        changes["stages"] = [s if isinstance(s, StageConfig) else StageConfig(**s) for s in changes["stages"]]
    stages = stages_of(name, pool=pool, stage_globals=options.get("stage_globals", "discard"), **changes)
    kept = {key: options[key] for key in _MODEL_OPTIONS if key in options}
    model = build_model_with_cfg(
        MultiScaleViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(stages))), "feature_cls": "getter"},
        stages=stages,
        **options,
    )
    if "stages" in changes:
        changes["stages"] = [dataclasses.asdict(stage) for stage in changes["stages"]]
    kept |= changes
    if isinstance(model, MultiScaleViT):
        model.register_load_state_dict_pre_hook(_accept_published)
    model._model_args = kept  # what timm writes beside the weights for the hub
    return model


def _cfg() -> dict[str, Any]:
    """What timm wants to know of a model's input: the paper's evaluation transform."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": True,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head",
        "license": "mit",
    }


_REGISTERED = (*SIZES, "vil")

default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in _REGISTERED})


def _entrypoint(name: str) -> Callable[..., MultiScaleViT]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MultiScaleViT:
        return _build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{name}: see `vil.create_model`; keyword arguments as timm names them."
    entrypoint.__module__ = __name__
    return entrypoint


for _name in _REGISTERED:
    setattr(sys.modules[__name__], _name, register_model(_entrypoint(_name)))
