"""Predict the classes of images: the most probable classes with their probabilities.

    python tools/predict.py runs/imagenet photo.jpg photos/                   a table
    python tools/predict.py runs/imagenet photos/ --format csv --output predictions.csv
    python tools/predict.py model_best.pth photos/ --released-config config.yaml --top 1 --format json

Folders are searched recursively, in natural order: img2 before img10. Images are preprocessed with the
evaluation transform stored with the weights. Class names are those stored with the weights; ImageNet synsets
(n01440764) are translated, and 1000 classes without stored names are assumed to be ImageNet's.

Images that cannot be read, and those whose logits are not finite, are reported on standard error and in the
output. Exit status: 0 if all images have a prediction, 1 if some have none, 2 for invalid arguments or
weights.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.decoding import UnreadableImageError
from data.image_files import has_image_extension, is_metadata
from data.workers import exit_with_parent, explain_shared_memory, limit_workers
from tools.image_reader import ImageReader
from vil.checkpoints.loading import NOT_FINITE
from vil.checkpoints.open import open_weights
from vil.command_line import ToolParser, bounded_int
from vil.config import Precision
from vil.errors import UserError, error_reason, errors_in_option, printable
from vil.models.timm_models import check_logits
from vil.models.zoo import check_device
from vil.runtime import distributed
from vil.runtime.class_names import check_has_classes
from vil.runtime.console import align, print_line, progress_bar
from vil.runtime.csv_text import csv_text
from vil.runtime.files import check_writable, is_standard_output, refuse_input_as_output, write_output
from vil.runtime.precision import autocast, choose_precision

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ClassName:
    """A class: its row of the head, its stored label, and its description (the label if there is none)."""

    index: int
    label: str
    name: str


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image file, each with its probability, or why there are none."""

    image: str
    classes: tuple[tuple[ClassName, float], ...] = ()
    error: str | None = None


def main(argv: Sequence[str]) -> None:
    """Predict all images and write the predictions; exit with status 1 if an image has none."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.output is not None and os.path.isdir(arguments.output):
        raise UserError("--output", f"{arguments.output} is a folder; expected a file")
    weights = open_weights(
        arguments.checkpoint, arguments.released_config, arguments.run_checkpoint, arguments.weights
    )
    model = weights.build_model()
    check_has_classes(getattr(model, "num_classes", None))
    reader = ImageReader(weights.require_model(), weights.transform, arguments.checkpoint)
    with distributed.start(arguments.device) as process:
        precision = choose_precision(arguments.precision, process.device)
        check_device(model, process.device)
        images = ImageFiles(list(find_images(arguments.images)), reader)
        if arguments.output is not None:
            inputs = [arguments.checkpoint, arguments.released_config, *images.paths]
            refuse_input_as_output(arguments.output, filter(None, inputs), "--output")
            check_writable(arguments.output, "--output")
        loader = DataLoader(
            images,
            arguments.batch_size,
            num_workers=limit_workers(arguments.workers),
            collate_fn=_collate,
            worker_init_fn=exit_with_parent,
            pin_memory=process.device.type == "cuda",
        )
        model = model.to(process.device)
        with errors_in_option(arguments.checkpoint):
            check_logits(model, weights.require_model())
        predictions: list[Prediction] = []
        with progress_bar(desc="predict", total=len(images), unit="image") as bar:
            for prediction in predict(model, loader, weights.class_names, arguments.top, precision):
                predictions.append(prediction)
                bar.update()
                if prediction.error is not None:
                    line = f"{prediction.image}: {failure(prediction.error)}"
                    tqdm.write(printable(line), file=sys.stderr)
    write(FORMATS[arguments.format](predictions), arguments.output)
    if arguments.output is not None:
        count = "1 image" if len(predictions) == 1 else f"{len(predictions):,} images"
        line = f"{arguments.output}: {count}"
        print_line(line, sys.stderr if is_standard_output(arguments.output) else None)
    if any(prediction.error is not None for prediction in predictions):
        raise SystemExit(1)


def _parser() -> ToolParser:
    parser = ToolParser(prog="predict.py", description=__doc__)
    parser.add_checkpoint()
    add, workers = parser.add_argument, min(4, os.cpu_count() or 1)
    add("images", nargs="+", help="image files, or folders of images")
    add("--top", type=bounded_int(1), default=5, metavar="K", help="classes per image (default: 5)")
    add("--format", choices=FORMATS, default="table", help="default: table")
    add("--output", type=Path, metavar="FILE", help="default: standard output")
    add("--batch-size", type=bounded_int(1), default=64, metavar="N", help="default: 64")
    add("--workers", type=bounded_int(0), default=workers, metavar="N", help="processes that load images")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--precision", choices=get_args(Precision), help="default: bfloat16 if the GPU supports it")
    return parser


# --- Images -------------------------------------------------------------------------------------------------


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Yield files as given, and the images below folders in natural order.

    Links to folders are followed, but below a given folder none is entered twice. A folder without images is
    yielded itself, so that it is reported as unreadable.
    """
    for path in paths:
        yield from (os.path.isdir(path) and list(_images_below(path, set()))) or [path]


def _images_below(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        names = os.listdir(folder)
    except OSError:
        yield folder  # reading it reports the error
        return
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for name in sorted(names, key=natural_key):
        path = os.path.join(folder, name)
        if is_metadata(name):
            continue
        if os.path.isdir(path):
            yield from _images_below(path, visited)
        elif has_image_extension(name):
            yield path


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that compares numbers in names by value: img2 before img10."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], name


class ImageFiles(Dataset[Any]):
    """Yield (path, image (C, H, W)) or (path, reason why it cannot be read)."""

    def __init__(self, paths: list[str], reader: ImageReader) -> None:
        self.paths = paths
        self.reader = reader

    def __len__(self) -> int:
        """Return the number of files, including unreadable ones."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | str]:
        try:
            return self.paths[index], self.reader(self.paths[index])
        except UnreadableImageError as error:
            return self.paths[index], str(error)


Batch = tuple[list[tuple[str, str | None]], Tensor | None]
"""(path, reason or None) of all images, and the readable ones (B, C, H, W), or None without any."""


def _collate(samples: list[tuple[str, Tensor | str]]) -> Batch:
    images = [image for _, image in samples if isinstance(image, Tensor)]
    files = [(path, image if isinstance(image, str) else None) for path, image in samples]
    return files, torch.stack(images) if images else None


# --- Predictions --------------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader[Any], names: Sequence[str] | None, top: int, precision: Precision
) -> Iterator[Prediction]:
    """Yield one prediction per file of a loader of `ImageFiles`, with `top` classes at most."""
    device = next(model.parameters()).device
    for files, images in explain_shared_memory(loader):
        top_classes: Iterator[tuple[tuple[ClassName, float], ...]] = iter(())
        if images is not None:
            with autocast(precision, device):
                logits = model(images.to(device, non_blocking=True))  # (B, classes)
            classes = name_classes(logits.shape[1], names)
            probabilities, indices = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
            rows = zip(indices.tolist(), probabilities.tolist(), logits.isfinite().all(dim=1).tolist())
            top_classes = (
                tuple((classes[i], p) for i, p in zip(row, values)) if is_finite else ()
                for row, values, is_finite in rows
            )
        for path, error in files:
            found = next(top_classes) if error is None else ()
            yield Prediction(path, found, error or (None if found else NOT_FINITE))


def name_classes(count: int, names: Sequence[str] | None) -> list[ClassName]:
    """Return the classes of a head with `count` rows.

    Stored names label the first rows; further rows are labeled by their index. Without stored names, 1000
    classes have the ImageNet synsets in the order of the challenge, as in timm.
    """
    imagenet = ImageNetInfo("imagenet-1k")
    if names is None and count == IMAGENET_CLASSES:
        names = imagenet.label_names()
    labels = [*(names or ()), *map(str, range(len(names or ()), count))][:count]
    synsets = set(imagenet.label_names())
    return [
        ClassName(index, label, imagenet.label_name_to_description(label) if label in synsets else label)
        for index, label in enumerate(labels)
    ]


def failure(error: str) -> str:
    """Return a line on an image without prediction."""
    return error if error == NOT_FINITE else f"cannot be read: {error}"


# --- Output -------------------------------------------------------------------------------------------------


def as_table(predictions: Sequence[Prediction]) -> str:
    """Return one line per image and class; only the first line of an image names it."""
    lines = [("image", "class", "probability", "name")]
    for prediction in predictions:
        image = printable(prediction.image)
        if prediction.error is not None:
            lines.append((image, "", "", printable(failure(prediction.error))))
        for rank, (class_name, probability) in enumerate(prediction.classes):
            percent = f"{100 * probability:.2f} %"
            name = printable(class_name.name)
            lines.append(("" if rank else image, str(class_name.index), percent, name))
    return "".join(f"{line}\n" for line in align(lines, left=(0, 3)))


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Return one row per image and class: image, rank, class, label, name, probability, error.

    Texts that a spreadsheet would execute as a formula are prefixed with an apostrophe.
    """
    rows: list[list[Any]] = [["image", "rank", "class", "label", "name", "probability", "error"]]
    for prediction in predictions:
        image = _as_utf8(prediction.image)
        if prediction.error is not None:
            rows.append([image, "", "", "", "", "", _as_utf8(prediction.error)])
        for rank, (class_name, probability) in enumerate(prediction.classes, 1):
            label, name = _as_utf8(class_name.label), _as_utf8(class_name.name)
            rows.append([image, rank, class_name.index, label, name, f"{probability:.6g}", ""])
    return csv_text(rows)


def as_json(predictions: Sequence[Prediction]) -> str:
    """Return a JSON list of {image, classes: [{class, label, name, probability}]}, or {image, error}."""
    entries: list[dict[str, Any]] = []
    for prediction in predictions:
        if prediction.error is not None:
            entries.append({"image": prediction.image, "error": prediction.error})
            continue
        classes = [
            {"class": c.index, "label": c.label, "name": c.name, "probability": probability}
            for c, probability in prediction.classes
        ]
        entries.append({"image": prediction.image, "classes": classes})
    return json.dumps(entries, indent=1) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


def write(text: str, path: Path | None) -> None:
    """Write to a file, or to standard output, where control characters are escaped if it is a terminal."""
    if path is not None:
        write_output(path, text, "--output")
        return
    if sys.stdout.isatty():
        text = "".join(f"{printable(line)}\n" for line in text.splitlines())
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing raises at the end again
        if not isinstance(error, BrokenPipeError):  # as of a reader such as head that has ended
            reason = f"standard output cannot be written: {error_reason(error)}"
            raise UserError("--output", reason) from None


def _as_utf8(text: str) -> str:
    """Escape the bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
