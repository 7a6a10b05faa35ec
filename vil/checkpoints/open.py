"""Open weights in any supported format, without executing anything that the file holds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from vil.checkpoints.checkpoint_files import BEST, FOLDER, check_digest, newest_intact
from vil.checkpoints.pickle_file import read_pickle
from vil.checkpoints.published_config import PublishedConfig, read_published_config
from vil.checkpoints.safetensors_file import is_safetensors, read_safetensors
from vil.checkpoints.training_state import WeightsChoice, WeightsKind, select_weights
from vil.checkpoints.weights import Weights
from vil.errors import UserError, error_reason, errors_in_file
from vil.models.state_dict import has_published_names, strip_wrapper_prefixes
from vil.validation import shown

RunCheckpoint = Literal["best", "last"]
"""Choice among the checkpoints of a run's folder."""

_RUN_KEYS = {"model", "ema", "best", "config", "class_names"}
_FOREIGN_KEYS: dict[WeightsKind, tuple[str, ...]] = {
    "raw": ("state_dict", "model", "net"),
    "ema": ("state_dict_ema", "model_ema", "ema"),
}

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
"""Types of a weight; strict loading compares them with the model's."""


def open_weights(
    path: str | Path,
    published_config: str | Path | PublishedConfig | None = None,
    run_checkpoint: RunCheckpoint = "best",
    weights: WeightsChoice = "auto",
) -> Weights:
    """Open weights.

    Args:
        path: a run's folder, a checkpoint of train.py, safetensors, a published checkpoint, or a checkpoint
            of another program (timm, DeiT, Swin).
        published_config: the YAML file published with a checkpoint, or its content; adds the model and the
            evaluation transform.
        run_checkpoint: checkpoint of a run's folder; `last`, the newest intact one, is refused for a file.
        weights: kind of weights; auto is the kind with the best evaluation in a run, else raw if present.

    Raises:
        UserError: the file is missing, damaged or of an unknown format; holds anything but tensors and plain
            values, or weights that are not finite; lacks the requested kind of weights; or has a
            configuration in addition to `published_config`.
    """
    if isinstance(published_config, str | Path):
        published_config = read_published_config(published_config)
    file = find_checkpoint(path, run_checkpoint)
    with errors_in_file(file):
        opened = read_safetensors(file) if is_safetensors(file) else _read_checkpoint(file, weights)
        if weights not in ("auto", opened.kind):
            raise UserError("", f"holds {opened.kind} weights only, not {weights}")
        if not opened.state_dict:
            raise UserError("", "holds no weights")
        for name, value in opened.state_dict.items():
            _check_weight(name, value)
        names, rows = opened.class_names or (), opened.head_rows()
        if rows is not None and len(names) > rows:
            raise UserError("", f"damaged: it names {len(names):,} classes, and its head has {rows:,} rows")
        if published_config is None:
            return dataclasses.replace(opened, path=str(file))
        if opened.format != "published":
            raise UserError("", "not a published checkpoint, so a published configuration cannot be used")
    model, transform = published_config.model, published_config.transform
    return dataclasses.replace(opened, path=str(file), model=model, transform=transform)


def run_checkpoint_of(path: str | Path, choice: RunCheckpoint, paths: Iterable[str | Path]) -> RunCheckpoint:
    """Return the `run_checkpoint` of one of several paths; a choice for folders does not concern files."""
    is_for_others = not os.path.isdir(path) and any(map(os.path.isdir, paths))
    return "best" if is_for_others else choice


def find_checkpoint(path: str | Path, run_checkpoint: RunCheckpoint = "best") -> Path:
    """Return the checkpoint of a run's folder, or `path` itself if it is a file; its digest is verified."""
    given = Path(path)
    try:
        exists = given.exists()
    except (OSError, ValueError) as error:  # a name that is too long or contains a null byte
        raise UserError(str(path), error_reason(error)) from None
    if not exists:
        raise UserError(str(path), "no such file or folder")
    if given.is_dir() and run_checkpoint == "last":
        newest = newest_intact(given, partial(check_digest, required=True))
        if newest is None:
            raise UserError(str(path), f"the folder holds no {FOLDER}/step_….pt")
        return newest[0]
    if run_checkpoint != "best" and not given.is_dir():
        raise UserError(
            str(path), "is a file; run_checkpoint chooses among the checkpoints of a run's folder"
        )
    if given.is_dir():
        given /= BEST
        if not given.is_file():
            raise UserError(str(path), f"the folder holds no {BEST}")
    check_digest(given)
    return given


def _read_checkpoint(path: Path, weights: WeightsChoice) -> Weights:
    content = read_pickle(path)
    if isinstance(content, Mapping) and (
        isinstance(content.get("net"), Mapping) or "class_names" not in content
    ):
        return _foreign_weights(content, weights)
    state = content if isinstance(content, Mapping) else {}
    if missing := sorted(_RUN_KEYS - state.keys()):
        raise UserError("", f"not a checkpoint of train.py: lacks {', '.join(missing)}")
    try:
        state_dict, kind = select_weights(state, weights)
        config, class_names = state["config"], state["class_names"]
        found = Weights.from_stored(
            "run", kind, dict(state_dict), config["model"], config["data"], class_names
        )
        if found.model is None or found.class_names is None:
            raise TypeError("no model or class names")
    except UserError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError("", f"damaged: {error_reason(error)} in the checkpoint") from None
    return found


def _foreign_weights(content: Mapping[str, object], weights: WeightsChoice) -> Weights:
    """Return the weights of a published checkpoint or of one of another program.

    They are under a key, raw or averaged, or are the content itself.
    """

    found: dict[WeightsKind, Mapping[str, Tensor]] = {}
    for kind, keys in _FOREIGN_KEYS.items():
        candidates = filter(_is_state_dict, map(content.get, keys))
        if (state_dict := next(candidates, None)) is not None:
            found[kind] = state_dict
    if not found and _is_state_dict(content):
        found["raw"] = content
    if not found:
        known = ", ".join(key for keys in _FOREIGN_KEYS.values() for key in keys)
        raise UserError("", f"not a checkpoint: it holds no weights, neither itself nor under {known}")
    kind = next(iter(found)) if weights == "auto" else weights
    if kind not in found:
        raise UserError("", f"holds {next(iter(found))} weights only, not {weights}")
    state_dict = strip_wrapper_prefixes(found[kind])
    is_published = isinstance(content.get("net"), Mapping) and has_published_names(state_dict)
    return Weights("", "published" if is_published else "foreign", kind, state_dict)


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _check_weight(name: object, value: object) -> None:
    """Raise UserError for an entry of a state dict that is not a weight of a model."""
    if not isinstance(name, str) or not name.isprintable():
        raise UserError("", f"not a checkpoint: {shown(name, 300)} is not a name of a weight")
    if not isinstance(value, Tensor):
        raise UserError("", f"not a checkpoint: {name} is not a tensor")
    reason = None
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_nested:
        reason = f"is not a plain tensor but a {type(value).__name__} of layout {value.layout}"
    elif value.device.type != "cpu":
        reason = f"has no values: it was saved from the device {value.device.type}"
    elif value.is_quantized or value.dtype not in _DTYPES:
        reason = f"is of {value.dtype}, which is not supported; convert it to torch.float32"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        reason = f"is of shape {tuple(value.shape)}, but the file holds only a part of it"
    elif value.is_floating_point() and not value.isfinite().all():
        reason = "holds values that are not finite"
    if reason is not None:
        raise UserError("", f"{name} {reason}")
