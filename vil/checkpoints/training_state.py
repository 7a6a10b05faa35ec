"""Training state of a run: one file with everything that a run needs to continue.

A checkpoint is a dict of tensors and plain values, so `torch.load(weights_only=True)` reads it and no code
in it can run:

    model, ema        state dicts of the bare model; ema is None without schedule.ema_decay
    optimizer, scaler their state dicts
    step, epoch       finished optimizer steps and epochs; no generator state, because every random draw is a
                      function of the step
    epoch_step        finished steps of the current epoch (since version 0.3.0)
    finished_step     step of the last finished epoch, evaluation included
    watched           counts of skipped steps and recent losses (`vil.training`)
    best              {"top1", "weights": "raw" | "ema", "epoch"} of the best evaluation, or None; and
                      "value" if another metric than top1 chooses it
    evaluations_since_best            due evaluations after the best one (since version 0.2.0)
    order_version     version of the order of the training images (since version 0.3.0; else 1)
    config            the resolved TrainConfig as nested mappings
    class_names       list of str
    teacher_digest    of the teacher (`vil.checkpoints.teacher`), or None (since version 0.3.0)
    train_images, steps_per_epoch     training images and optimizer steps per epoch (since version 0.1.1)
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
from typing import Any, BinaryIO, Literal, TypeGuard

import timm
import torch
from torch import Tensor

from vil.checkpoints.checkpoint_files import check_digest, read_digests, write_digest
from vil.checkpoints.pickle_file import read_pickle
from vil.config import Tree
from vil.errors import UserError
from vil.runtime.files import open_regular, replacing
from vil.validation import check_plain

State = Tree
"""A state dict, or the content of a checkpoint."""
WeightsKind = Literal["raw", "ema"]
"""Weights as the optimizer left them, or their exponential moving average."""
WeightsChoice = Literal["auto", "raw", "ema"]
"""`auto` is the kind with the best evaluation."""

_CHUNK_BYTES = 1 << 22


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**12


def _is_mapping(value: object, value_type: type | tuple[type, ...] = object) -> TypeGuard[State]:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, value_type) for key, item in value.items()
    )


def _is_config(value: object) -> bool:
    try:
        check_plain(value)  # nested references can stand for more values than memory holds
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return _is_mapping(value) and all(_is_mapping(value.get(key)) for key in ("model", "schedule", "data"))


def _is_watched(value: object) -> bool:
    return (
        _is_mapping(value)
        and _is_count(value.get("skipped"))
        and _is_count(value.get("skipped_in_a_row"))
        and isinstance(value.get("losses"), list)
        and all(isinstance(loss, float) and math.isfinite(loss) for loss in value["losses"])
    )


def _is_best(value: object) -> bool:
    return (
        _is_mapping(value)
        and all(isinstance(value.get(key, 0.0), int | float) for key in ("top1", "value"))
        and "top1" in value
        and value.get("weights") in ("raw", "ema")
        and _is_count(value.get("epoch"))
    )


_COUNT = (_is_count, "an integer of at least 0")
_SCHEMA: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (lambda x: _is_mapping(x, Tensor), "a mapping of names to tensors"),
    "ema": (lambda x: x is None or _is_mapping(x, Tensor), "a mapping of names to tensors, or None"),
    "optimizer": (_is_mapping, "a mapping of names to values"),
    "scaler": (lambda x: _is_mapping(x, (int, float)), "a mapping of names to numbers"),
    "step": _COUNT,
    "finished_step": _COUNT,
    "epoch": _COUNT,
    "watched": (_is_watched, "skipped, skipped_in_a_row and losses"),
    "best": (lambda x: x is None or _is_best(x), "None, or top1, weights (raw or ema) and epoch"),
    "config": (_is_config, "a mapping of names to plain values"),
    "class_names": (lambda x: isinstance(x, list) and all(isinstance(n, str) for n in x), "a list of names"),
    "versions": (_is_mapping, "a mapping of names to versions"),
}
"""Check of each value, and its description in an error."""
_OPTIONAL_SCHEMA: dict[str, tuple[Callable[[object], bool], str]] = {
    "epoch_step": _COUNT,
    "train_images": _COUNT,
    "steps_per_epoch": (lambda x: _is_count(x) and x != 0, "an integer of at least 1"),
    "evaluations_since_best": _COUNT,
    "order_version": (
        lambda x: type(x) is int and x in (1, 2),
        "1 or 2; a newer version may have written it",
    ),
    "teacher_digest": (lambda x: x is None or isinstance(x, str), "a text, or None"),
}
"""The same for keys that checkpoints of older versions lack."""


class _DigestWriter(io.RawIOBase):
    """A file object that writes to another and computes the SHA-256; closing it leaves the other open."""

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
        return self._digest.hexdigest()


def write_training_state(path: Path, state: State) -> None:
    """Write a checkpoint to `path`, and its SHA-256 to a file next to it.

    At every moment `path` holds the old content or the new, and its digest matches.

    Raises:
        OSError: the disk is full or the folder is gone; the old file is unchanged.
    """

    def save(file: _DigestWriter) -> None:
        try:
            torch.save(dict(state), file)  # type: ignore[arg-type]
        except RuntimeError as error:  # PyTorch's writer wraps the exceptions of the file object
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

    _write_with_digest(path, save)


def copy_training_state(source: Path, target: Path) -> None:
    """Copy a checkpoint and its digest as `write_training_state` writes them; OSError if it is damaged."""

    def copy(file: _DigestWriter) -> None:
        while chunk := content.read(_CHUNK_BYTES):
            file.write(chunk)
        if file.digest() not in read_digests(source):
            raise OSError(errno.EIO, "the copied file is damaged")

    with open_regular(source) as content:
        _write_with_digest(target, copy)


def _write_with_digest(path: Path, write: Callable[[_DigestWriter], None]) -> None:
    existed = path.exists()
    with replacing(path) as temporary:
        file = _DigestWriter(temporary)
        write(file)
        temporary.flush()
        write_digest(path, file.digest(), keep_old=existed)
    if existed:
        write_digest(path, file.digest())


def read_training_state(path: str | Path, digest_required: bool = False) -> State:
    """Return the content of a checkpoint of train.py; tensors are on the CPU.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of train.py; or lacks a required digest.
    """
    check_digest(Path(path), digest_required)
    content = read_pickle(path)
    state = dict(content) if isinstance(content, Mapping) else {}
    if missing := [key for key in _SCHEMA if key not in state]:
        raise UserError(str(path), f"not a checkpoint of train.py: lacks {', '.join(missing)}")
    if ("train_images" in state) != ("steps_per_epoch" in state):
        raise UserError(str(path), "damaged: has only one of train_images and steps_per_epoch")
    for key, (is_valid, expected) in {**_SCHEMA, **_OPTIONAL_SCHEMA}.items():
        if key in state and not is_valid(state[key]):
            raise UserError(str(path), f"damaged: {key} is not {expected}")
    return state


def select_weights(
    state: Mapping[str, Any], weights: WeightsChoice = "auto"
) -> tuple[Mapping[str, Tensor], WeightsKind]:
    """Return a state dict of a run's checkpoint and its kind.

    `auto` is the kind with the best evaluation, or raw if a continued run no longer keeps an average.
    """
    if weights == "auto":
        weights = state["best"]["weights"] if state["best"] and state["ema"] is not None else "raw"
    if weights == "raw":
        return state["model"], "raw"
    if state["ema"] is None:
        reason = "the checkpoint has no ema weights: its run had no schedule.ema_decay; use raw"
        raise UserError("weights", reason)
    return state["ema"], "ema"


def evaluations_since_best(state: Mapping[str, Any], eval_every: int) -> int:
    """Return the number of evaluations after the best one, 0 before any.

    For a checkpoint of an older version, which does not store it, it is computed from the epochs as if
    `eval_every` had never changed.
    """
    if "evaluations_since_best" in state:
        return int(state["evaluations_since_best"])
    if state["best"] is None or "steps_per_epoch" not in state:
        return 0
    epoch = state["finished_step"] // state["steps_per_epoch"]
    return max(0, int(epoch // eval_every - state["best"]["epoch"] // eval_every))


def is_stopped_early(evaluations: int, patience: int | None) -> bool:
    """Return True if a run ends after this number of evaluations since the best one."""
    return patience is not None and evaluations >= patience


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect the results of a run."""
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    return {"python": platform.python_version(), **{name: str(value) for name, value in versions.items()}}
