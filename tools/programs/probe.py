"""Evaluate frozen features by k-nearest neighbors and logistic regression, on all images and on few.

    python tools/probe.py runs/imagenet --data.root photos --data.source folder     features for other images
    python tools/probe.py runs/digits --json probe.json --csv probe.csv
    python tools/probe.py timm/resnet18 --model.timm_options '{pretrained: true}' --data cifar10.yaml
    python tools/probe.py runs/digits --features features.npz --methods knn --shots 1 10

Features are the input of the head, forward_head(pre_logits=True), of training and validation images under the
evaluation transform of the weights, without augmentation. All Top-1 are on the validation images.

knn: the k training images with the largest cosine similarity s vote for their class with the weight
exp(s / 0.07) (Wu et al., https://arxiv.org/abs/1805.01978, and DINO, https://arxiv.org/abs/2104.14294).
logistic: multinomial logistic regression of scikit-learn on standardized features. --C auto chooses its
inverse regularization among 0.0001 to 100 by the accuracy on a fifth of the training images, then fits all of
them; with fewer than five images of a class it is 1.

Few-shot rows train on --shots images of each class, drawn --draws times; Top-1 is the mean over the draws,
with its 95 % interval (Student's t). Options of eval.py follow the model: --data, --data.images_per_class,
--model.image_size, --weights, --batch_size, --device, ... A timm/<name> without pretrained weights has random
ones.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional as F

from data import (
    build_training_images,
    build_validation,
    check_same_classes,
    dataset_name,
    refuse_images_as_outputs,
)
from tools.ablation.results import estimate
from tools.programs.evaluation_options import check_order, parse_evaluation_options, start_single_process
from vil.command_line import ToolParser, bounded_int
from vil.command_line.stored_model import read_stored, resolve_over_stored
from vil.config import EvalConfig
from vil.errors import COMMAND_LINE, UserError, error_reason, errors_in_option
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, forward_batches
from vil.runtime.console import align, print_line
from vil.runtime.csv_text import csv_text
from vil.runtime.distributed import Process
from vil.runtime.files import check_outputs, check_writable, write_output
from vil.runtime.modes import mode

TEMPERATURE = 0.07
"""Temperature of the weights of the votes of neighbors."""
REGULARIZATION = tuple(10.0**exponent for exponent in range(-4, 3))
"""Inverse regularizations, C of scikit-learn, that `choose_regularization` compares."""
MIN_IMAGES_TO_CHOOSE, HELD_OUT_FRACTION = 5, 0.2
"""Images of every class, and the fraction of the images that is held out, to choose C."""
MAX_ITERATIONS = 1000
"""Limit on the iterations of logistic regression."""
QUERIES_PER_CHUNK = 256
OUTPUTS = ("json", "csv", "features")

_logger = logging.getLogger("vil.probe")


@dataclass(frozen=True)
class Features:
    """Features (N, C), float32, and class indices (N,), int64, of images."""

    values: np.ndarray
    targets: np.ndarray

    def subset(self, indices: np.ndarray) -> Features:
        """Return the features of some images."""
        return Features(self.values[indices], self.targets[indices])


@dataclass(frozen=True)
class Row:
    """Result of a method on a number of training images.

    Attributes:
        method: `knn` or `logistic`.
        k: number of neighbors.
        C: inverse regularization of each draw.
        shots: training images of each class; None for all images.
        top1: mean over the draws, in percent.
        low, high: ends of the 95 % confidence interval of `top1`; None for one draw.
        values: Top-1 of each draw, in percent.
    """

    method: str
    k: int | None
    C: list[float] | None
    shots: int | None
    top1: float
    low: float | None
    high: float | None
    values: list[float]


def main(argv: Sequence[str]) -> None:
    """Compute the features, evaluate them, print a table and write the files."""
    arguments, others = _parser().parse_known_args(argv)
    check_order(argv, [arguments.model], others)
    name = "--model.name" if arguments.model.startswith("timm/") else "--checkpoint"
    more = frozenset({"checkpoint", "model", "weights", "run_checkpoint", "released_config"})
    args = parse_evaluation_options([name, arguments.model, *others], "probe.py", more)
    outputs = {f"--{option}": getattr(arguments, option) for option in OUTPUTS}
    command = args.resolve()
    check_outputs(outputs, [*command.inputs(), arguments.model])
    for option, path in outputs.items():
        if path is not None:
            check_writable(path, option)
    if len(command.config.checkpoint or [""]) > 1:
        raise UserError("--checkpoint", "expected one model", COMMAND_LINE)
    stored = read_stored(arguments.model if name == "--checkpoint" else None, command)
    command = resolve_over_stored(args, stored)
    config = command.config
    check_outputs(outputs, command.inputs())  # also those that the weights name
    refuse_images_as_outputs(outputs, [config.data.root])
    try:
        with start_single_process(config) as process:
            training, validation = build_training_images(config, process), build_validation(config, process)
            check_same_classes(training.class_names, validation.class_names)
            model = stored.build_model(config.model, len(training.class_names), process.device)
            if stored.weights is not None:
                with errors_in_option("checkpoint"):
                    stored.weights.load_into(model, config.model.size)
            network = FeatureModel(model).to(process.device)
            train, val = (
                extract_features(network, images.loader, config, process) for images in (training, validation)
            )
            if arguments.features:
                write_features(arguments.features, train, val, training.class_names)
            rows = evaluate_features(train, val, len(training.class_names), arguments, process.device)
    except UserError as error:
        raise command.locate(error) from error
    summary = {
        "model": config.model.name,
        "checkpoint": stored.weights.path if stored.weights is not None else None,
        "weights": stored.kind,
        "data": dataset_name(config.data),
        "features": train.values.shape[1],
        "train_images": len(train.targets),
        "images": len(val.targets),
        "seed": arguments.seed,
    }
    for line in format_table(rows):
        print_line(line)
    print_line(
        f"{summary['model']}, {summary['weights']} weights, {train.values.shape[1]} features; "
        f"{len(train.targets):,} training and {len(val.targets):,} validation images of {summary['data']}"
    )
    if arguments.json:
        content = {**summary, "results": [asdict(row) for row in rows]}
        write_output(arguments.json, json.dumps(content, indent=2) + "\n", "--json")
    if arguments.csv:
        write_output(arguments.csv, csv_text(csv_rows(summary, rows)), "--csv")


def _parser() -> ToolParser:
    parser = ToolParser(
        prog="probe.py",
        usage="%(prog)s MODEL [OPTION ...] [OPTION OF eval.py ...]",
        description=__doc__,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, bounded_int(1, 1_000_000)
    add("model", help="run folder, checkpoint of train.py, safetensors, published checkpoint, or timm/<name>")
    methods = ("knn", "logistic")
    add("--methods", nargs="+", choices=methods, default=methods, help="default: both")
    add("--k", type=count, nargs="+", default=[10, 20, 100, 200], help="neighbors (default: 10 20 100 200)")
    add("--C", type=_regularization, default=None, metavar="C", help="a number, or auto (default)")
    add(
        "--shots",
        type=count,
        nargs="*",
        default=[1, 5, 10, 25],
        help="default: 1 5 10 25; none: all images only",
    )
    add("--draws", type=bounded_int(1, 1000), default=5, help="draws of few-shot images (default: 5)")
    add(
        "--seed",
        type=bounded_int(0, 2**32 - 1),
        default=0,
        help="of the draws and the choice of C (default: 0)",
    )
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--csv", type=Path, metavar="FILE", help="write a row per result")
    add("--features", type=Path, metavar="FILE", help="write features and class indices as NumPy's npz")
    return parser


def _regularization(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected auto or a number above 0, got {text!r}")
    return value


# --- Features -----------------------------------------------------------------------------------------------


class FeatureModel(nn.Module):
    """The features of a model with timm's `forward_features` and `forward_head`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the input of the head (B, C) for images (B, in_chans, H, W).

        Raises:
            UserError: the model has no such features.
        """
        try:
            model: Any = self.model
            features: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
        except (AttributeError, TypeError, NotImplementedError) as error:
            reason = f"{type(self.model).__name__} has no features before a head: {error_reason(error)}"
            raise UserError("model.name", reason) from error
        if features.dim() != 2:
            reason = (
                f"{type(self.model).__name__} has features of shape {tuple(features.shape[1:])} per image"
            )
            raise UserError("model.name", f"{reason}, expected a vector")
        return features


@torch.no_grad()
def extract_features(
    network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], config: EvalConfig, process: Process
) -> Features:
    """Return the features of all images of a loader, in its order, and their classes."""
    values, targets = [], []
    images = EvaluationDataset("", loader)
    options = EvaluationOptions(process.device, config.precision, config.progress)
    with mode(network, training=False):
        for _, features, classes in forward_batches(network, images, options, "features"):
            values.append(features.float().cpu().numpy())
            targets.append(classes[:, 0].cpu().numpy())
    if not values:
        raise UserError("data", "no images")
    found = np.concatenate(values)
    if not np.isfinite(found).all():
        raise UserError("model", "features are not finite")
    return Features(found, np.concatenate(targets))


def write_features(path: Path, train: Features, val: Features, class_names: Sequence[str]) -> None:
    """Write features, class indices and the names of the classes as npz."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        train_features=train.values,
        train_targets=train.targets,
        val_features=val.values,
        val_targets=val.targets,
        class_names=np.array(class_names),
    )
    write_output(path, buffer.getvalue(), "--features")


# --- Methods ------------------------------------------------------------------------------------------------


def evaluate_features(
    train: Features, val: Features, num_classes: int, arguments: argparse.Namespace, device: torch.device
) -> list[Row]:
    """Return the rows of all methods: on all training images, then on few of each class."""
    subsets: dict[int | None, list[Features]] = {None: [train]}
    class_images = np.bincount(train.targets, minlength=num_classes)
    for shots in sorted(set(arguments.shots)):
        if class_images.min() < shots:
            _logger.info(
                "skipping --shots %d: a class has only %d training images", shots, class_images.min()
            )
            continue
        draws = range(arguments.draws)
        subsets[shots] = [train.subset(draw_images(train.targets, shots, arguments.seed, n)) for n in draws]
    rows = []
    for method in dict.fromkeys(arguments.methods):
        for shots, draws_of_shots in subsets.items():
            if method == "knn":
                sizes = [k for k in sorted(set(arguments.k)) if k <= len(draws_of_shots[0].targets)]
                accuracies = [knn_top1(subset, val, sizes, num_classes, device) for subset in draws_of_shots]
                rows += [_row("knn", shots, [top1[k] for top1 in accuracies], k=k) for k in sizes]
            else:
                fits = [fit_logistic(subset, arguments.C, arguments.seed) for subset in draws_of_shots]
                values = [100 * float(model.score(val.values, val.targets)) for model, _ in fits]
                rows.append(_row("logistic", shots, values, c=[c for _, c in fits]))
    if not rows:
        raise UserError("--k", f"expected at most {len(train.targets)}, the number of training images")
    return rows


def _row(
    method: str, shots: int | None, values: list[float], *, k: int | None = None, c: list[float] | None = None
) -> Row:
    found = estimate(values, (0, 100))
    assert found is not None
    low, high = found.interval or (None, None)
    return Row(method, k, c, shots, found.mean, low, high, values)


def draw_images(targets: np.ndarray, shots: int, seed: int, draw: int) -> np.ndarray:
    """Return the indices of `shots` images of each class, rising: a function of seed, shots and draw."""
    rng = np.random.default_rng([seed, shots, draw])
    drawn = [
        rng.choice(np.flatnonzero(targets == target), shots, replace=False) for target in np.unique(targets)
    ]
    return np.sort(np.concatenate(drawn))


def knn_top1(
    train: Features, val: Features, sizes: Sequence[int], num_classes: int, device: torch.device
) -> dict[int, float]:
    """Return Top-1 in percent for each number of neighbors, computed in float64."""
    if not sizes:
        return {}
    bank = F.normalize(torch.from_numpy(train.values).to(device).double(), dim=1)  # (N, C)
    bank_targets = torch.from_numpy(train.targets).to(device)
    correct = dict.fromkeys(sizes, 0)
    chunks = zip(*(torch.from_numpy(x).split(QUERIES_PER_CHUNK) for x in (val.values, val.targets)))
    for features, targets in chunks:
        similarities = F.normalize(features.to(device).double(), dim=1) @ bank.T  # (B, N)
        nearest, indices = similarities.topk(max(sizes), dim=1)  # (B, K)
        weights, classes = (nearest / TEMPERATURE).exp(), bank_targets[indices]
        for k in sizes:
            votes = weights.new_zeros(len(features), num_classes)
            votes.scatter_add_(1, classes[:, :k], weights[:, :k])
            correct[k] += int((votes.argmax(dim=1) == targets.to(device)).sum())
    return {k: 100 * count / len(val.targets) for k, count in correct.items()}


def fit_logistic(train: Features, c: float | None, seed: int) -> tuple[Pipeline, float]:
    """Fit logistic regression on standardized features; return it with its C, chosen if `c` is None."""
    if c is None:
        c = choose_regularization(train, seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.values, train.targets)
    if model[-1].n_iter_.max() >= MAX_ITERATIONS:
        _logger.warning("warning: logistic regression with C %g has not converged", c)
    return model, c


def choose_regularization(train: Features, seed: int) -> float:
    """Return the C with the best accuracy on held-out training images, the smallest of equal ones."""
    counts = np.unique(train.targets, return_counts=True)[1]
    if counts.min() < MIN_IMAGES_TO_CHOOSE:
        return 1.0
    indices = np.arange(len(train.targets))
    fitted, held_out = train_test_split(
        indices, test_size=HELD_OUT_FRACTION, stratify=train.targets, random_state=seed
    )
    part, rest = train.subset(fitted), train.subset(held_out)
    models = {c: fit_logistic(part, c, seed)[0] for c in REGULARIZATION}
    return max(models, key=lambda c: models[c].score(rest.values, rest.targets))


# --- Output -------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines of aligned text."""
    lines = [("method", "images per class", "Top-1 %", "95 % interval")]
    for row in rows:
        method = f"knn, k {row.k}" if row.C is None else f"logistic, C {_range(row.C)}"
        interval = "" if row.low is None else f"{row.low:.2f} to {row.high:.2f}"
        lines.append((method, "all" if row.shots is None else str(row.shots), f"{row.top1:.2f}", interval))
    return align(lines, left=(0, 3))


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def csv_rows(summary: dict[str, str | int | None], rows: Sequence[Row]) -> list[list[object]]:
    """Return a heading and a row per result; the values of single draws are in the JSON file."""
    columns = ("method", "k", "shots", "top1", "low", "high")
    content = [[*summary.values(), *(getattr(row, column) for column in columns)] for row in rows]
    return [[*summary, *columns], *content]
