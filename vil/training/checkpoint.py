"""Checkpoints: one file with everything a run needs to go on, which is either wholly there or not at all.

A checkpoint is a dict of tensors and plain values, so that `torch.load(weights_only=True)` reads it and no
code in it can run:

    model, ema        state dicts, keys as of the bare model; ema is None where it is off
    optimizer, scaler their state dicts
    step, epoch       optimiser steps and epochs that are finished; no generator state, as every random draw
                      is a function of the step
    finished_step     the step at which an epoch was last finished, its evaluation included
    watched           what `vil.training.guards.StepWatch` knows of earlier steps
    best              {"top1", "weights": "raw" | "ema", "epoch"} of the best evaluation, or None
    config            dataclasses.asdict of the resolved TrainConfig
    class_names       list of str
    train_images, steps_per_epoch     the training set's size and the length of an epoch (from version 0.1.1)
    versions          {"python", "torch", "timm"}
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch

from vil.checkpoint_files import check_digest, known_digests, write_digest
from vil.config import ConfigError, of_option
from vil.runtime.files import open_regular, replacing
from vil.schema import check_plain
from vil.weight_files import read_pickle


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _is_mapping(value: Any, of: type | tuple[type, ...] = object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, of) for key, item in value.items()
    )


def _is_config(value: Any) -> bool:
    try:
        check_plain(value)  # also of a value that is repeated by reference, which no one could write out
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    sections = ("model", "schedule", "data")
    return _is_mapping(value) and all(_is_mapping(value.get(section)) for section in sections)


def _is_watched(value: Any) -> bool:
    return _is_mapping(value) and (
        _is_count(value.get("skipped"))
        and _is_count(value.get("skipped_in_a_row"))
        and isinstance(value.get("losses"), list)
        and all(isinstance(loss, float) and math.isfinite(loss) for loss in value["losses"])
    )


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
    "finished_step": (_is_count, "a whole number, 0 or more"),
    "epoch": (_is_count, "a whole number, 0 or more"),
    "watched": (_is_watched, "skipped, skipped_in_a_row and losses"),
    "best": (lambda x: x is None or _is_best(x), "None, or top1, weights (raw or ema) and epoch"),
    "config": (_is_config, "a mapping of names to plain values"),
    "class_names": (lambda x: isinstance(x, list) and all(isinstance(n, str) for n in x), "a list of names"),
    "versions": (_is_mapping, "a mapping of names to versions"),
}
"""What the value of each key must be, so that nobody who reads a checkpoint needs to ask."""

KEYS = tuple(_FORMS)
_CHUNK = 1 << 22

_LATER_FORMS = {
    "train_images": (_is_count, "a whole number, 0 or more"),
    "steps_per_epoch": (lambda x: _is_count(x) and x > 0, "a whole number, 1 or more"),
}
"""The same for keys that checkpoints of version 0.1.0 lack."""


class _Hashing(io.RawIOBase):
    """A file that is written once, front to back, and the digest of what was written.

    Args:
        file: stays open when this one is closed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._digest.update(content)
        self._file.write(content)
        return len(content)

    def digest(self) -> str:
        """SHA-256 of what was written, 64 hexadecimal digits."""
        return self._digest.hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` to `path`, and its SHA-256 beside it.

    Whatever happens meanwhile, `path` holds the old content or the new, and its digest fits.

    Raises:
        OSError: the disk is full or the folder is gone; the old file is untouched.
    """
    was_there = path.exists()
    with replacing(path) as temporary:
        file = _Hashing(temporary)
        _write(state, file)
        temporary.flush()
        write_digest(path, file.digest(), keep_old=was_there)
    if was_there:
        write_digest(path, file.digest())


def copy(source: Path, target: Path) -> None:
    """Makes `target` a file of its own with the content of `source`, which `save` wrote, as safely as `save`.

    Raises:
        OSError: the disk is full or the folder is gone; the old target is untouched.
    """
    was_there = target.exists()
    with open_regular(source) as content, replacing(target) as temporary:
        file = _Hashing(temporary)
        while chunk := content.read(_CHUNK):
            file.write(chunk)
        temporary.flush()
        digest = file.digest()
        if digest not in known_digests(source):
            raise OSError(errno.EIO, "what was read is damaged")
        write_digest(target, digest, keep_old=was_there)
    if was_there:
        write_digest(target, digest)


def _write(state: dict[str, Any], file: _Hashing) -> None:
    try:
        torch.save(state, file)  # type: ignore[arg-type]
    except RuntimeError as error:  # PyTorch's writer makes one of its own of what the file raised
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from None


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that `save` wrote; tensors are on the CPU.

    Raises:
        ConfigError: the file is missing, damaged, or not a checkpoint of this project.
    """
    with of_option("checkpoint"):
        check_digest(Path(path))
        return read(path)


def read(path: str | Path) -> dict[str, Any]:
    """`load` without the digest, which is known to fit; the error names the file alone."""
    state = read_pickle(path)
    missing = [key for key in KEYS if key not in state] if isinstance(state, dict) else list(KEYS)
    if missing:
        raise ConfigError(str(path), f"not a checkpoint of train.py: lacks {', '.join(missing)}")
    if len(_LATER_FORMS.keys() & state.keys()) == 1:
        raise ConfigError(str(path), "damaged: has one of train_images and steps_per_epoch")
    for key, (fits, words) in {**_FORMS, **_LATER_FORMS}.items():
        if key in state and not fits(state[key]):
            raise ConfigError(str(path), f"damaged: {key} is not {words}")
    return state


def versions() -> dict[str, str]:
    """The versions of the libraries that shape a run's numbers."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": str(timm.__version__),
    }
