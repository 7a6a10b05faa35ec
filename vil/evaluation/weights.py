"""From what a user calls a checkpoint to the weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vil.config import ConfigError
from vil.training.checkpoint import BEST, LAST


def find_checkpoint(path: str, which: Literal["best", "last"]) -> Path:
    """The checkpoint file of a run's folder; a file is itself.

    Raises:
        ConfigError: there is none.
    """
    given = Path(path)
    if not given.exists():
        raise ConfigError("checkpoint", f"{path}: no such file or folder")
    if given.is_file():
        return given
    file = given / (BEST if which == "best" else LAST)
    if not file.is_file():
        raise ConfigError("checkpoint", f"{path}: the folder holds no {file.relative_to(given)}")
    return file


def choose_weights(
    state: Mapping[str, Any], weights: Literal["auto", "raw", "ema"]
) -> tuple[Mapping[str, torch.Tensor], str]:
    """A state dict of a checkpoint, and whether it is `raw` or `ema`; auto takes the kind that was best.

    Raises:
        ConfigError: the average of the weights is asked for and was not kept.
    """
    if weights == "auto":
        weights = state["best"]["weights"] if state["best"] else "raw"
    if weights == "raw":
        return state["model"], "raw"
    if state["ema"] is None:
        raise ConfigError(
            "weights", "the checkpoint has no ema weights: its run had no schedule.ema_decay; use raw"
        )
    return state["ema"], "ema"


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Loads a state dict that must fit `model` exactly: same names, same shapes.

    Raises:
        ConfigError: it does not; counts what differs and names the first of each kind. `model` is unchanged.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    reshaped = [
        f"{name} is {_shape(weights[name])}, not {_shape(own[name])}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    if found:
        raise ConfigError(
            "checkpoint", f"{path}: weights of another architecture than the model: {'; '.join(found)}"
        )
    model.load_state_dict(weights)


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
