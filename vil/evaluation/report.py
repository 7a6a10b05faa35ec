"""Results of evaluations: one flat object per model and data set, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vil.config import EvalConfig, Tree
from vil.evaluation.accuracy import evaluate
from vil.evaluation.cost import Cost, measure_cost
from vil.evaluation.metrics import METRICS
from vil.runtime.distributed import Process, call_on_main
from vil.runtime.files import write_output

Result = Tree
"""An object of eval.py's JSON."""


@dataclass(frozen=True)
class EvaluationDataset:
    """Images to evaluate a model on.

    Attributes:
        name: name in the results.
        loader: batches of this rank, as for `vil.evaluation.accuracy.evaluate`.
        num_classes: number of classes; the model may have more. None does not check it.
        logit_indices: index of each class's logit; None for logit k of class k.
    """

    name: str
    loader: Iterable[tuple[Tensor, Tensor]]
    num_classes: int | None = None
    logit_indices: Sequence[int] | None = None


@dataclass(frozen=True)
class _Column:
    """A column of the table; numbers have a format and are divided by `scale`, texts have no format."""

    heading: str
    key: str
    format: str = ""
    scale: float = 1

    def text(self, value: str | float | None) -> str:
        """Return the text of a value of JSON."""
        if isinstance(value, int | float) and self.format:
            return format(value / self.scale, self.format)
        return "-" if value is None else str(value)


_COLUMNS = (
    _Column("model", "model"),
    _Column("checkpoint", "checkpoint"),
    _Column("weights", "weights"),
    _Column("data", "data"),
    _Column("size", "image_size", ".0f"),
    _Column("classes", "classes", ",.0f"),
    _Column("images", "images", ",.0f"),
    _Column("unreadable", "unreadable", ",.0f"),
    *(
        _Column(metric.heading_with_unit, key, metric.format)
        for key, metric in METRICS.items()
        if "table" in metric.shown_in
    ),
    _Column("mCE %", "mce", ".1f"),
    _Column("params M", "params", ".2f", 1e6),
    _Column("FLOPs G", "flops", ".3f", 1e9),
    _Column("train MB", "train_memory_mb", ".1f"),
    _Column("eval MB", "eval_memory_mb", ".1f"),
    _Column("images/s", "images_per_second", ".1f"),
)


def evaluate_model(
    model: nn.Module,
    datasets: list[EvaluationDataset],
    config: EvalConfig,
    process: Process,
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
) -> list[Result]:
    """Evaluate `model` on data sets and measure its cost; every rank calls this and gets the same results.

    The cost is measured once, on rank 0 while the others wait.

    Args:
        model: maps images (B, in_chans, image_size, image_size) to logits (B, classes); moved to the device
            of the process, otherwise unchanged.
        datasets: emptied, so that the worker processes of one data set end before those of the next start.
            An empty list gives one result with the cost alone.
        config: name, image size and channels of the model; precision of the forward pass; images of a batch
            when memory and speed are measured; progress bar of rank 0.
        process: this process.
        checkpoint: file of the weights, for the results; None for untrained weights.
        weights: kind of the weights, for the results.

    Returns:
        For each data set: the keys of `METRICS`, images and unreadable, None without data; classes, the
        number of logits that were compared, None for all; the keys of `Cost`; device, precision, image_size,
        model, checkpoint, weights, data.

    Raises:
        UserError: as `vil.evaluation.accuracy.evaluate`.
    """
    model.to(process.device)
    device = process.device
    metadata = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": config.precision,
        "image_size": config.model.image_size,
        "model": config.model.name,
        "checkpoint": checkpoint,
        "weights": weights,
    }
    per_dataset: list[Result] = []
    while datasets:
        per_dataset.append(_evaluate_dataset(model, datasets.pop(0), config, process))
    no_metrics: Result = dict.fromkeys([*METRICS, "images", "unreadable", "classes", "data"])
    cost: Cost = call_on_main(lambda: measure_cost(model, config, device))
    return [
        {**no_metrics, **metrics, **dataclasses.asdict(cost), **metadata}
        for metrics in per_dataset or [no_metrics]
    ]


def _evaluate_dataset(
    model: nn.Module, dataset: EvaluationDataset, config: EvalConfig, process: Process
) -> Result:
    result = evaluate(
        model,
        dataset.loader,
        device=process.device,
        precision=config.precision,
        progress=config.progress and process.is_main,
        num_classes=dataset.num_classes,
        logit_indices=dataset.logit_indices,
    )
    return {
        **result.values,
        "images": result.images,
        "unreadable": result.unreadable,
        "classes": None if dataset.logit_indices is None else len(dataset.logit_indices),
        "data": dataset.name,
    }


def table(results: Sequence[Result]) -> str:
    """Return the results as aligned text, without empty columns, then a line about device and units."""
    columns = []
    for column in _COLUMNS:
        values = [result.get(column.key) for result in results]
        if all(value is None for value in values) or (column.key == "unreadable" and not any(values)):
            continue
        cells = [column.heading, *map(column.text, values)]
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if column.format else cell.ljust(width) for cell in cells])
    rows = ["  ".join(row).rstrip() for row in zip(*columns)]
    notes = [
        f"{result['device']}, {result['precision']}. FLOPs: multiply-adds of one image. "
        f"MB: 10^6 bytes per image, {result['memory']}, training in {result['train_precision']}."
        for result in results
    ]
    return "\n".join([*rows, *dict.fromkeys(notes)])


def write_json(path: str | Path, results: Sequence[Result]) -> None:
    """Write the results as a JSON list, atomically; NaN and infinity, which JSON lacks, become null.

    Raises:
        UserError: the file cannot be written.
    """
    finite = [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in result.items()
        }
        for result in results
    ]
    write_output(Path(path), json.dumps(finite, indent=2, allow_nan=False) + "\n", "json")
