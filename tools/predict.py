"""Predicts the classes of images: the most probable ones, with their probabilities.

    python tools/predict.py runs/imagenet photo.jpg photos/                   a table
    python tools/predict.py runs/imagenet photos/ --format csv --output predictions.csv
    python tools/predict.py model_best.pth photos/ --released-config config.yaml --top 1 --format json

Folders are read with everything below them, in natural order: img2 before img10. Images go through the
evaluation transform stored with the weights. Classes have the names stored with them; synsets of ImageNet
(n01440764) are explained, and where nothing is stored, 1000 classes are ImageNet's.

An image that cannot be read is named on standard error and in the output, and the others are done. Exit
status: 0 when every image was read, 1 when some were not, 2 for arguments or weights that cannot be used.
"""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.decoding import Mode, UnreadableImageError
from data.image_files import has_image_extension, is_metadata
from data.loaders import end_with_parent, explain_shared_memory
from data.transforms import Transform
from tools.opening import check_channels, open_checkpoint, read_picture
from vil.command_line import ToolParser, main, write_output
from vil.config import ConfigError, Precision, printable
from vil.models.zoo import check_device
from vil.runtime.csv_text import csv_text
from vil.runtime.files import refuse_input_as_output
from vil.training import distributed
from vil.training.precision import autocast, check_precision

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Class:
    """A class: its row of the head, its name as stored, and in words (the same where nothing is known)."""

    index: int
    label: str
    name: str


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, or why there are none.

    Attributes:
        image: its path.
        classes: (class, probability), the most probable first.
        error: why the image could not be read.
    """

    image: str
    classes: tuple[tuple[Class, float], ...] = ()
    error: str | None = None


def predict(words: Sequence[str]) -> None:
    """Reads the model, predicts all images, and writes. Exits with status 1 where some were unreadable."""
    parser = ToolParser(prog="predict.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_checkpoint()
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image; default: 5")
    parser.add_argument("--format", choices=FORMATS, default="table", help="of the output; default: table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass; default: 64")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                        help="processes that load images; default: one per core, at most 4")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"),
                        help="default: bfloat16 on a GPU that computes it, else float32")  # fmt: skip
    arguments = parser.parse_intermixed_args(words)  # images may also follow the options
    for option, least in (("top", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(arguments, option) < least:
            raise ConfigError(f"--{option.replace('_', '-')}", f"must be at least {least}")
    if arguments.output is not None and arguments.output.is_dir():
        raise ConfigError("--output", f"{arguments.output} is a folder; expected a file")
    opened = open_checkpoint(
        arguments.checkpoint,
        released_config=arguments.released_config,
        weights=arguments.weights,
        which=arguments.which,
    )
    check_channels(opened.config, arguments.checkpoint)
    with distributed.start(arguments.device) as process:
        precision = check_precision(arguments.precision, process.device)
        check_device(opened.model, process.device)
        images = Images(list(find_images(arguments.images)), opened.transform(), opened.mode)
        if arguments.output is not None:
            inputs = [arguments.checkpoint, arguments.released_config, *images.paths]
            refuse_input_as_output(arguments.output, filter(None, inputs), "--output")
        loader = DataLoader(
            images, arguments.batch_size, num_workers=arguments.workers, collate_fn=_collate,
            worker_init_fn=end_with_parent, pin_memory=process.device.type == "cuda",
        )  # fmt: skip
        found: list[Prediction] = []
        # Without a terminal there is no bar; a line about an unreadable image goes above it.
        with tqdm(total=len(images), unit="image", disable=None, file=sys.stderr, leave=False) as bar:
            predictions = predict_images(
                opened.model.to(process.device), loader, images.paths, opened.class_names,
                top=arguments.top, device=process.device, precision=precision,
            )  # fmt: skip
            for prediction in predictions:
                found.append(prediction)
                bar.update()
                if prediction.error is not None:
                    line = f"{prediction.image}: cannot be read: {prediction.error}"
                    tqdm.write(printable(line), file=sys.stderr)
    write(FORMATS[arguments.format](found), arguments.output)
    if any(prediction.error is not None for prediction in found):
        raise SystemExit(1)


def find_images(paths: Sequence[str]) -> Iterator[str]:
    """Files as they are given, and of folders the images below them, in natural order.

    Links to folders are followed, but no folder is entered twice below one that is given. A folder without
    images is given back itself, so that it is reported as what cannot be read.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        images = list(_images_below(path, set()))
        yield from images or [path]


def _images_below(folder: str, entered: set[tuple[int, int]]) -> Iterator[str]:
    try:
        status = os.stat(folder)
        names = os.listdir(folder)
    except OSError:
        yield folder  # which says, when it is read, why it cannot be
        return
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    for name in sorted(names, key=natural_key):
        path = os.path.join(folder, name)
        if is_metadata(name):
            continue
        if os.path.isdir(path):
            yield from _images_below(path, entered)
        elif has_image_extension(name):
            yield path


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """What sorts img2 before img10: numbers by their value; equal ones as they are written."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(parts)], name


class Images(Dataset[Any]):
    """Files as a model sees them: each one's place, and (C, H, W) normalised, or why it cannot be read."""

    def __init__(self, paths: list[str], transform: Transform, mode: Mode) -> None:
        self.paths = paths
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        """Number of files, also those that cannot be read."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.transform(read_picture(self.paths[index], self.mode))
        except UnreadableImageError as error:
            return index, str(error)


def _collate(samples: list[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, dict[int, str]]:
    """The places of a batch's readable images, these (B, C, H, W), and what is wrong with the others."""
    readable = {index: image for index, image in samples if isinstance(image, Tensor)}
    wrong = {index: reason for index, reason in samples if isinstance(reason, str)}
    return [*readable], torch.stack([*readable.values()]) if readable else None, wrong


@torch.inference_mode()
def predict_images(
    model: nn.Module,
    loader: DataLoader[Any],
    paths: Sequence[str],
    class_names: Sequence[str] | None,
    *,
    top: int,
    device: torch.device,
    precision: Precision,
) -> Iterator[Prediction]:
    """One prediction per path, in their order.

    Args:
        model: in eval mode, on the device.
        loader: batches of `Images`.
        paths: of the images.
        class_names: as stored with the weights.
        top: classes per image; fewer where the model has fewer.
        device: where to compute.
        precision: of the forward pass.
    """
    classes: list[Class] | None = None
    for places, images, wrong in explain_shared_memory(loader):
        rows = {}
        if images is not None:
            with autocast(precision, device):
                logits = model(images.to(device, non_blocking=True))
            classes = classes or named_classes(logits.shape[1], class_names)
            probable = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
            rows = dict(zip(places, zip(probable.indices.tolist(), probable.values.tolist())))
        for place in sorted([*places, *wrong]):
            if place in wrong:
                yield Prediction(paths[place], error=wrong[place])
            else:
                assert classes is not None
                indices, shares = rows[place]
                yield Prediction(
                    paths[place], tuple((classes[i], share) for i, share in zip(indices, shares))
                )


def named_classes(count: int, names: Sequence[str] | None) -> list[Class]:
    """The classes of a head with `count` rows.

    Where names are stored, they are the labels of the first rows, and numbers those of rows that no class
    has; else the labels of 1000 classes are ImageNet's synsets, in the order of the challenge, as timm has
    them, and of any other number the rows' own.
    """
    imagenet = ImageNetInfo("imagenet-1k")
    if names is not None:
        labels = [*names, *map(str, range(len(names), count))][:count]
    elif count == IMAGENET_CLASSES:
        labels = imagenet.label_names()
    else:
        labels = [str(index) for index in range(count)]
    known = set(imagenet.label_names())
    return [
        Class(index, label, imagenet.label_name_to_description(label) if label in known else label)
        for index, label in enumerate(labels)
    ]


def table(predictions: Sequence[Prediction]) -> str:
    """One line per image and class; the image stands on its first."""
    lines = [("image", "class", "probability", "name")]
    for prediction in predictions:
        image = printable(prediction.image)
        if prediction.error is not None:
            lines.append((image, "", "", f"cannot be read: {printable(prediction.error)}"))
        for rank, (class_, share) in enumerate(prediction.classes):
            lines.append(
                ("" if rank else image, str(class_.index), f"{100 * share:.2f} %", printable(class_.name))
            )
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "".join(
        f"{image:{widths[0]}}  {index:>{widths[1]}}  {share:>{widths[2]}}  {name}".rstrip() + "\n"
        for image, index, share, name in lines
    )


def comma_separated(predictions: Sequence[Prediction]) -> str:
    """Return CSV, one row per image and class: image, rank, class, label, name, probability, error.

    Texts that a spreadsheet could take for a formula have an apostrophe in front.
    """
    rows: list[list[Any]] = [["image", "rank", "class", "label", "name", "probability", "error"]]
    for prediction in predictions:
        image = _encodable(prediction.image)
        if prediction.error is not None:
            rows.append([image, "", "", "", "", "", _encodable(prediction.error)])
        for rank, (class_, share) in enumerate(prediction.classes, 1):
            label, name = _encodable(class_.label), _encodable(class_.name)
            rows.append([image, rank, class_.index, label, name, f"{share:.6g}", ""])
    return csv_text(rows)


def as_json(predictions: Sequence[Prediction]) -> str:
    """A JSON list of {image, classes: [{class, label, name, probability}]}, or {image, error}."""
    entries: list[dict[str, Any]] = []
    for prediction in predictions:
        if prediction.error is not None:
            entries.append({"image": prediction.image, "error": prediction.error})
            continue
        classes = [
            {"class": class_.index, "label": class_.label, "name": class_.name, "probability": share}
            for class_, share in prediction.classes
        ]
        entries.append({"image": prediction.image, "classes": classes})
    return json.dumps(entries, indent=1) + "\n"


FORMATS = {"table": table, "csv": comma_separated, "json": as_json}


def write(text: str, path: Path | None) -> None:
    """Write to a file, which holds the old content or the new, or to standard output while someone reads it.

    What could steer a terminal is escaped where standard output is one.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        if sys.stdout.isatty():
            text = "".join(f"{printable(line)}\n" for line in text.splitlines())
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:  # a reader as head, which has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    write_output(path, text, "--output")


def _encodable(text: str) -> str:
    """Text as UTF-8 can hold it: other bytes of a file's name as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    main(predict)
