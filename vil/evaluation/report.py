"""What an evaluation found: one flat object per model and data set, as a table or as JSON."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vil.config import ConfigError, Precision
from vil.evaluation.accuracy import evaluate
from vil.evaluation.benchmark import images_per_second, measure_memory
from vil.evaluation.complexity import measure_complexity
from vil.runtime import files
from vil.training.distributed import from_main
from vil.training.precision import check_precision

Result = dict[str, Any]
Measured = TypeVar("Measured")

_logger = logging.getLogger(__name__)

_COLUMNS: dict[str, tuple[str, float | None, str]] = {  # heading: key, divisor of a number, format
    "model": ("model", None, ""),
    "checkpoint": ("checkpoint", None, ""),
    "weights": ("weights", None, ""),
    "data": ("data", None, ""),
    "size": ("image_size", 1, ".0f"),
    "classes": ("classes", 1, ",.0f"),
    "images": ("images", 1, ",.0f"),
    "unreadable": ("unreadable", 1, ",.0f"),
    "Top-1 %": ("top1", 1, ".2f"),
    "Top-5 %": ("top5", 1, ".2f"),
    "ReaL %": ("real_top1", 1, ".2f"),
    "mCE %": ("mce", 1, ".1f"),
    "loss": ("loss", 1, ".4f"),
    "ECE %": ("ece", 1, ".2f"),
    "params M": ("params", 1e6, ".2f"),
    "FLOPs G": ("flops", 1e9, ".3f"),
    "train MB": ("train_memory_mb", 1, ".1f"),
    "eval MB": ("eval_memory_mb", 1, ".1f"),
    "images/s": ("images_per_second", 1, ".1f"),
}

_ACCURACY = ("top1", "top5", "loss", "images", "ece", "real_top1", "unreadable")
_COST = (
    "params", "flops", "train_memory_mb", "eval_memory_mb", "memory", "train_precision", "images_per_second"
)  # fmt: skip


def evaluate_model(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]] | None,
    *,
    image_size: int,
    in_chans: int,
    device: torch.device,
    precision: Precision,
    checkpoint: str | None,
    model_name: str,
    weights: str | None = None,
    data: str | None = None,
    batch_size: int = 128,
    class_count: int | None = None,
    class_rows: Sequence[int] | None = None,
    progress: bool = False,
    cost: Result | None = None,
) -> Result:
    """Accuracy, parameters, FLOPs, memory and speed of `model`; every rank calls this and gets the same.

    Cost and speed are taken on rank 0 while the others wait. Training memory is that of the precision that
    train.py chooses on this device.

    Args:
        model: maps images (B, in_chans, image_size, image_size) to logits (B, classes); is on `device` and
            stays as it is.
        loader: this rank's images and targets; None leaves the accuracy out.
        precision: of the forward pass.
        checkpoint: the file the weights come from; None for weights that were not trained.
        model_name, weights, data: written into the result: architecture, raw or ema, and data set.
        batch_size: images per pass when memory and speed are measured on a GPU; speed on a CPU takes 16 at
            most.
        class_count: number of classes of the data; the model may have more.
        class_rows: the logits of these classes, where the others are to be left out.
        progress: show a bar; meant for rank 0 alone.
        cost: an earlier result of this model, whose cost and speed are not measured again.

    Returns:
        top1, top5, ece (per cent), loss (nats), images, unreadable, and real_top1 (per cent) with ReaL
        labels, all None without a loader; classes, how many logits were compared, None for all; params; flops
        (multiply-adds of one image); train_memory_mb and eval_memory_mb (10^6 bytes per image) and memory,
        how they were found; images_per_second of inference (each None where it cannot be
        measured, as where a GPU cannot hold one image);
        device, precision, train_precision, image_size, model, checkpoint, weights, data.

    Raises:
        ConfigError: as `evaluate`, or a batch size below 1.
    """
    if batch_size < 1:
        raise ConfigError("batch_size", f"expected at least 1, got {batch_size}")
    result: Result = dict.fromkeys(_ACCURACY)
    if loader is not None:
        accuracy = evaluate(
            model,
            loader,
            device=device,
            precision=precision,
            progress=progress,
            class_count=class_count,
            class_rows=class_rows,
        )
        result = {key: getattr(accuracy, key) for key in _ACCURACY}
    if cost is None:
        cost = from_main(lambda: _cost(model, image_size, in_chans, device, precision, batch_size))
    result |= {key: cost[key] for key in _COST}
    result |= {
        "classes": None if class_rows is None else len(class_rows),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "image_size": image_size,
        "model": model_name,
        "checkpoint": checkpoint,
        "weights": weights,
        "data": data,
    }
    return result


def _cost(
    model: nn.Module,
    image_size: int,
    in_chans: int,
    device: torch.device,
    precision: Precision,
    batch_size: int,
) -> Result:
    train_precision = check_precision(None, device)
    complexity = _attempt("FLOPs", lambda: measure_complexity(model, image_size, in_chans))
    memory = _attempt(
        "memory",
        lambda: measure_memory(
            model,
            image_size,
            in_chans,
            device=device,
            train_precision=train_precision,
            eval_precision=precision,
            batch_size=batch_size,
        ),
    )
    speed = _attempt(
        "images per second",
        lambda: images_per_second(
            model,
            image_size,
            in_chans,
            device=device,
            precision=precision,
            batch_size=batch_size if device.type == "cuda" else min(batch_size, 16),
        ),
    )
    return {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "flops": complexity and complexity.flops,
        "train_memory_mb": memory and _megabytes(memory.train),
        "eval_memory_mb": memory and _megabytes(memory.eval),
        "memory": memory.kind if memory else "not measured",
        "train_precision": train_precision,
        "images_per_second": speed,
    }


def _attempt(what: str, measure: Callable[[], Measured]) -> Measured | None:
    """Return what `measure` finds; None with a warning if it fails, which must not lose the accuracy."""
    try:
        return measure()
    except Exception as error:  # of whatever kind: any model of timm is measured
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _logger.warning("warning: %s cannot be measured: %s", what, reason)
        return None


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def table(results: Sequence[Result]) -> str:
    """The results as aligned text, without the columns that none of them fills, then machine and units."""
    columns = []
    for heading, (key, divisor, form) in _COLUMNS.items():
        values = [result.get(key) for result in results]
        if any(value is not None for value in values) and (key != "unreadable" or any(values)):
            cells = [heading, *(_cell(value, divisor, form) for value in values)]
            width = max(map(len, cells))
            columns.append([cell.rjust(width) if divisor else cell.ljust(width) for cell in cells])
    rows = ["  ".join(row).rstrip() for row in zip(*columns)]
    notes = [
        f"{r['device']}, {r['precision']}. FLOPs: multiply-adds of one image. "
        f"MB: 10^6 bytes per image, {r['memory']}, training in {r['train_precision']}."
        for r in results
    ]
    return "\n".join([*rows, *dict.fromkeys(notes)])


def _cell(value: Any, divisor: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value / divisor if divisor else value, form)


def check_writable(path: str | Path) -> None:
    """Finds out before the work whether `write_json` will be able to write there.

    Raises:
        ConfigError: it will not.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if files.is_stream(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError("json", f"{path} cannot be written: {error.strerror or error}") from None


def write_json(path: str | Path, results: Sequence[Result]) -> None:
    """Writes the results as a JSON list; `path` holds the old content or all of the new, whatever happens.

    JSON knows no NaN and no infinity: such a figure is written as null.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = Path(path)
    finite = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        for result in results
    ]
    try:
        files.write_output(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError("json", f"{path} cannot be written: {error.strerror or error}") from None
