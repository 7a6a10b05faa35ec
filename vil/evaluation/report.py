"""Results of evaluations: one object per model and data set, as a table, as JSON or as CSV."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vil.config import EvalConfig, Size, Tree, format_size
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.evaluation.cost import Cost, measure_cost
from vil.evaluation.metrics import METRICS, ClassMetrics
from vil.evaluation.tta import build_tta_model, count_views, describe_tta
from vil.runtime.compiler import check_compiler
from vil.runtime.console import align, text_width
from vil.runtime.csv_text import csv_text
from vil.runtime.distributed import Process, call_on_main
from vil.runtime.files import write_output

Result = Tree
"""An object of eval.py's JSON."""
CLASS_KEYS = ("class", "precision", "recall", "f1", "images")
"""Keys of the objects of `per_class`."""
CONFUSION_KEYS = ("confusion", "class_names")
"""Keys of a result that JSON and CSV files of results lack."""
NO_CLASS = "(no class)"
"""Column of a confusion matrix for predictions that are none of the classes of the data."""
_RESULT_KEYS = ("model", "checkpoint", "weights", "data")


@dataclass(frozen=True)
class _Column:
    """A column of the table; numbers have a format and are divided by `scale`, texts have no format.

    `is_in_table` is False for values that the list of a single result has alone.
    """

    heading: str
    key: str
    format: str = ""
    scale: float = 1
    is_in_table: bool = True

    def text(self, value: str | float | Size | None) -> str:
        """Return the text of a value of JSON."""
        if isinstance(value, list | tuple):
            return format_size(value)
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
        _Column(metric.heading_with_unit, key, metric.format, is_in_table="table" in metric.shown_in)
        for key, metric in METRICS.items()
        if "list" in metric.shown_in
    ),
    _Column("mCE %", "mce", ".1f"),
    _Column("TTA", "tta"),
    _Column("views", "views", ",.0f"),
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
        model: maps images (B, in_chans, H, W) to logits (B, classes); moved to the device of the process,
            with `config.channels_last` in that order, otherwise unchanged.
        datasets: emptied, so that the worker processes of one data set end before those of the next start.
            An empty list gives one result with the cost alone.
        config: name, image size and channels of the model; precision of the forward pass; `compile`;
            test-time augmentation, whose crops the batches hold; images of a batch when memory and speed are
            measured; progress bar of rank 0; `confusion_csv`.
        process: this process.
        checkpoint: file of the weights, for the results; None for untrained weights.
        weights: kind of the weights, for the results.

    Returns:
        For each data set: the keys of `METRICS`, images and unreadable, None without data; classes, the
        number of logits that were compared, None for all; the keys of `Cost`; device, precision, image_size,
        model, checkpoint, weights, data; tta and views, the number of forward passes per image, None without
        test-time augmentation; per_class, a list of objects with class, precision, recall, f1 (in
        percent) and images; with `config.confusion_csv` also confusion, (classes, classes + 1) lists of
        numbers of images, as in `EvaluationResult`.

    Raises:
        UserError: as `vil.evaluation.accuracy.evaluate`.
    """
    model.to(process.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    network = model
    if config.compile:
        check_compiler(process.device)
        network = torch.compile(model)  # type: ignore[assignment]
    device, views, tta = process.device, count_views(config), describe_tta(config)
    metadata = {
        "tta": tta,
        "views": None if tta is None else views,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": config.precision,
        "image_size": config.model.image_size,
        "model": config.model.name,
        "checkpoint": checkpoint,
        "weights": weights,
    }
    options = EvaluationOptions(
        device,
        config.precision,
        progress=config.progress and process.is_main,
        has_confusion=config.confusion_csv is not None,
    )
    per_dataset: list[Result] = []
    augmented = build_tta_model(network, config)
    while datasets:
        per_dataset.append(_evaluate_dataset(augmented, datasets.pop(0), options))
    no_metrics: Result = dict.fromkeys([*METRICS, "images", "unreadable", "classes", "data", "per_class"])
    cost: Cost = call_on_main(lambda: measure_cost(model, config, device, network))
    cost = dataclasses.replace(
        cost,
        flops=None if cost.flops is None else cost.flops * views,
        images_per_second=None if cost.images_per_second is None else cost.images_per_second / views,
    )
    return [
        {**no_metrics, **metrics, **dataclasses.asdict(cost), **metadata}
        for metrics in per_dataset or [no_metrics]
    ]


def _evaluate_dataset(model: nn.Module, dataset: EvaluationDataset, options: EvaluationOptions) -> Result:
    names, result = dataset.class_names, evaluate(model, dataset, options)
    found: Result = {
        **result.values,
        "images": result.images,
        "unreadable": result.unreadable,
        "classes": None if dataset.logit_indices is None else len(dataset.logit_indices),
        "data": dataset.name,
    }
    if names is not None and result.classes is not None:
        found["per_class"] = _class_objects(names, result.classes)
    if names is not None and result.confusion is not None:
        found["confusion"] = result.confusion
        found["class_names"] = list(names)
    return found


def _class_objects(names: Sequence[str], classes: ClassMetrics) -> list[Result]:
    columns = [getattr(classes, key) for key in CLASS_KEYS[1:]]
    return [dict(zip(CLASS_KEYS, row)) for row in zip(names, *columns, strict=True)]


def _relative(name: str) -> str:
    """Return the name of a data set with its paths in the working folder relative to it.

    Runs store the absolute path of their data.
    """
    try:
        folder = os.getcwd()
    except OSError:  # it was removed
        return name
    return name if folder == os.sep else re.sub(rf"(^|[: ]){re.escape(folder + os.sep)}", r"\1", name)


def table(results: Sequence[Result], width: int | None = None) -> str:
    """Return the results as aligned text, without empty columns, then a line about device and units.

    Paths of data sets in the working folder are relative. A single result whose table is wider than `width`
    columns is a list with one name and value per line.
    """
    shown = []
    for column in _COLUMNS:
        values = [result.get(column.key) for result in results]
        if any(value is not None for value in values) and (column.key != "unreadable" or any(values)):
            texts = [column.text(value) for value in values]
            shown.append((column, [_relative(text) for text in texts] if column.key == "data" else texts))
    in_table = [(column, texts) for column, texts in shown if column.is_in_table]
    left = [index for index, (column, _) in enumerate(in_table) if not column.format]
    rows = align(list(zip(*([column.heading, *texts] for column, texts in in_table))), left)
    if len(results) == 1 and width is not None and max(map(text_width, rows)) > width:
        rows = align([(column.heading, text) for column, (text,) in shown], left=(0, 1))
    notes = [
        f"{result['device']}, {result['precision']}. FLOPs: multiply-adds of one image"
        f"{'' if result.get('tta') is None else ' with all of its views'}. "
        f"MB: 10^6 bytes per image, {result['memory']}, training in {result['train_precision']}."
        for result in results
    ]
    return "\n".join([*rows, *dict.fromkeys(notes)])


def write_json(path: str | Path, results: Sequence[Result]) -> None:
    """Write the results as a JSON list, atomically; NaN and infinity, which JSON lacks, become null.

    The list per_class is the last value of a result; the confusion matrix is left out.

    Raises:
        UserError: the file cannot be written.
    """
    finite = []
    for result in results:
        items = sorted(result.items(), key=lambda item: item[0] == "per_class")
        finite.append({key: _finite(value) for key, value in items if key not in CONFUSION_KEYS})
    write_output(Path(path), json.dumps(finite, indent=2, allow_nan=False) + "\n", "json")


def write_csv(path: str | Path, results: Sequence[Result]) -> None:
    """Write one row per result, with the names and values of the JSON file; null is an empty field.

    The image size of images that are not square is e.g. 160×224.

    The columns that tell the rows apart are the first ones.

    Raises:
        UserError: the file cannot be written.
    """
    keys = dict.fromkeys([*_RESULT_KEYS, *(key for result in results for key in result)])
    columns = [key for key in keys if key not in ("per_class", *CONFUSION_KEYS)]
    shown = [{**result, "image_size": _size_text(result.get("image_size"))} for result in results]
    rows = [[_finite(result.get(key)) for key in columns] for result in shown]
    _write_rows(path, [columns, *rows], "csv")


def write_per_class_csv(path: str | Path, results: Sequence[Result]) -> None:
    """Write one row per result and class: precision, recall and F1 in percent, number of images.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [
        [*(result[key] for key in _RESULT_KEYS), *(row[key] for key in CLASS_KEYS)]
        for result in results
        for row in result["per_class"] or ()
    ]
    _write_rows(path, [[*_RESULT_KEYS, *CLASS_KEYS], *rows], "per_class_csv")


def write_confusion_csv(path: str | Path, results: Sequence[Result]) -> None:
    """Write the confusion matrix of a single result: a row per class of the images, a column per prediction.

    The first column names the class. A column `(no class)`, if it is not empty, has predictions that are
    none of the classes of the data.

    Raises:
        UserError: the file cannot be written.
    """
    (result,) = results
    names, rows = result["class_names"], result["confusion"]
    columns = [*names, NO_CLASS] if any(row[-1] for row in rows) else names
    content = [[name, *row[: len(columns)]] for name, row in zip(names, rows)]
    _write_rows(path, [["class", *columns], *content], "confusion_csv")


def _write_rows(path: str | Path, rows: Sequence[Sequence[object]], option: str) -> None:
    write_output(Path(path), csv_text(rows), option)


def _size_text(value: object) -> object:
    return format_size((value[0], value[1])) if isinstance(value, tuple) else value


def _finite(value: object) -> object:
    """Return None for NaN and infinity, other values unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
