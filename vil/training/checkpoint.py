"""Checkpoints: one file with everything a run needs to go on, which is either wholly there or not at all.

A checkpoint is a dict of tensors and plain values, so that `torch.load(weights_only=True)` reads it and no
code in it can run:

    model, ema        state dicts, keys as of the bare model; ema is None where it is off
    optimizer, scaler their state dicts
    step, epoch       optimiser steps and epochs that are finished; no generator state, as every random draw
                      is a function of the step
    best              {"top1", "weights": "raw" | "ema", "epoch"} of the best evaluation, or None
    config            dataclasses.asdict of the resolved TrainConfig
    class_names       list of str
    versions          {"python", "torch", "timm"}
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from vil.config import ConfigError, of_option
from vil.weight_files import BEST, LAST, read_pickle

__all__ = ["BEST", "KEYS", "LAST", "load", "save", "versions"]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_mapping(value: Any, of: type | tuple[type, ...] = object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, of) for key, item in value.items()
    )


def _is_config(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return _is_mapping(value)


def _is_best(value: Any) -> bool:
    return _is_mapping(value) and (
        isinstance(value.get("top1"), int | float)
        and value.get("weights") in ("raw", "ema")
        and _is_count(value.get("epoch"))
    )


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda x: _is_mapping(x, torch.Tensor), "a mapping of names to tensors"),
    "ema": (lambda x: x is None or _is_mapping(x, torch.Tensor), "a mapping of names to tensors, or None"),
    "optimizer": (_is_mapping, "a mapping of names to values"),
    "scaler": (lambda x: _is_mapping(x, (int, float)), "a mapping of names to numbers"),
    "step": (_is_count, "a whole number, 0 or more"),
    "epoch": (_is_count, "a whole number, 0 or more"),
    "best": (lambda x: x is None or _is_best(x), "None, or top1, weights (raw or ema) and epoch"),
    "config": (_is_config, "a mapping of names to plain values"),
    "class_names": (lambda x: isinstance(x, list) and all(isinstance(n, str) for n in x), "a list of names"),
    "versions": (_is_mapping, "a mapping of names to versions"),
}
"""What the value of each key must be, so that nobody who reads a checkpoint needs to ask."""

KEYS = tuple(_FORMS)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`; whatever happens meanwhile, `path` holds the old content or the new.

    Raises:
        OSError: the disk is full or the folder is gone; the old file is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, as atomically as `save`; a copy where links are unknown.

    Files that `save` wrote are only ever replaced, so that neither name changes with the other.

    Raises:
        OSError: the disk is full or the folder is gone; the old target is untouched.
    """
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:  # also where both are one file already, when replacing does nothing
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that `save` wrote; tensors are on the CPU.

    Raises:
        ConfigError: the file is missing, damaged, or not a checkpoint of this project.
    """
    with of_option("checkpoint"):
        state = read_pickle(path)
    missing = [key for key in KEYS if key not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise ConfigError("checkpoint", f"{path}: not a checkpoint of train.py: lacks {', '.join(missing)}")
    for key, (fits, words) in _FORMS.items():
        if not fits(state[key]):
            raise ConfigError("checkpoint", f"{path}: damaged: {key} is not {words}")
    return state


def versions() -> dict[str, str]:
    """The versions of the libraries that shape a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": str(timm.__version__),
    }


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system lets a folder be synchronised."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
