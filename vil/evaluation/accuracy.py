"""Evaluate a model on images that are divided among ranks.

Every rank evaluates its own slice without padding, and one all-reduce adds the sums of all metrics
(`vil.evaluation.metrics`): each image counts once on any number of ranks, and an empty slice adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vil.config import Precision
from vil.errors import UserError
from vil.evaluation.batch_halving import BatchHalving
from vil.evaluation.metrics import (
    MAX_CONFUSION_CLASSES,
    METRICS,
    ClassMetrics,
    EvaluatedBatch,
    count_classes,
    count_confusions,
)
from vil.runtime.console import progress_bar
from vil.runtime.distributed import all_reduce_sum
from vil.runtime.modes import mode
from vil.runtime.precision import autocast
from vil.runtime.signals import InterruptedEvaluation


@dataclass(frozen=True)
class EvaluationDataset:
    """Images to evaluate a model on.

    Attributes:
        name: name in the results.
        loader: batches of this rank: images (B, C, H, W), float, and targets (B,), int64, or (B, 1 + K): the
            target and up to K ReaL labels, padded with -1. Its attribute `unreadable`, if any, counts images
            left out because they cannot be read.
        class_names: classes in the order of the targets; the model may have more. None omits the metrics of
            single classes and their means, and does not check the number of classes.
        logit_indices: index of each class's logit; all other logits are ignored. None compares all logits,
            logit k for class k.
    """

    name: str
    loader: Iterable[tuple[Tensor, Tensor]]
    class_names: Sequence[str] | None = None
    logit_indices: Sequence[int] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if they are unknown."""
        return len(self.class_names or ())

    @property
    def min_logits(self) -> int:
        """Number of logits that a model needs."""
        return max(self.logit_indices) + 1 if self.logit_indices else self.num_classes

    def no_images_error(self, unreadable: float) -> UserError:
        """Return the error for a data set of which no image could be evaluated."""
        reason = f"none of the {unreadable:.0f} images can be read" if unreadable else "no images"
        return UserError("data", reason)


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        device: device of the model.
        precision: precision of the forward pass; metrics are computed and summed in float64.
        progress: show a progress bar in a terminal; for rank 0 alone.
        has_confusion: count the confusion matrix, if the classes are known.
        should_stop: called after each batch; if it returns True on any rank, no rank gets a result.
        halving: size of the parts in which batches are evaluated, kept for later evaluations.
    """

    device: torch.device
    precision: Precision
    progress: bool = False
    has_confusion: bool = False
    should_stop: Callable[[], bool] = lambda: False
    halving: BatchHalving = field(default_factory=BatchHalving)


class TooFewClassesError(UserError):
    """A model with `num_logits` logits has fewer classes than a data set."""

    def __init__(self, num_logits: float, dataset: EvaluationDataset) -> None:
        num_classes = dataset.num_classes or dataset.min_logits
        reason = f"the model has {num_logits:.0f} classes, the data has {num_classes}"
        super().__init__("model.num_classes", reason)
        self.num_logits = num_logits


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics over all images of all ranks.

    Attributes:
        values: key of `METRICS` -> value, without the metrics that these images do not have.
        images: number of evaluated images.
        unreadable: number of images that could not be read, which are not evaluated.
        classes: metrics of each class; None if the number of classes is unknown.
        confusion: number of images by class (row) and prediction (column), (classes, classes + 1); the last
            column has predictions that are none of the classes of the data. None if not requested.
    """

    values: Mapping[str, float]
    images: int
    unreadable: int = 0
    classes: ClassMetrics | None = None
    confusion: Sequence[Sequence[int]] | None = None

    def logged(self, prefix: str = "") -> dict[str, float]:
        """Return the values for the log of a run, with `prefix` in front of their keys."""
        return {f"{prefix}{key}": self.values[key] for key in self.values if "log" in METRICS[key].shown_in}


def forward_batches(
    model: nn.Module, dataset: EvaluationDataset, options: EvaluationOptions, title: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images, logits (B, classes), float64, and targets (B, 1 + K) of each batch, on the device.

    The images stay where the loader left them. `title` is that of the progress bar.

    Raises:
        TooFewClassesError: the model has fewer classes than the data.
    """
    device, indices = options.device, dataset.logit_indices
    columns = None if indices is None else torch.tensor(indices, device=device)
    hidden = not options.progress
    for images, targets in progress_bar(dataset.loader, desc=title, unit="batch", is_hidden=hidden):
        with autocast(options.precision, device):
            logits = options.halving.forward(model, images.to(device, non_blocking=True))
        if logits.shape[1] < dataset.min_logits:
            raise TooFewClassesError(logits.shape[1], dataset)
        logits = (logits if columns is None else logits[:, columns]).double()
        yield images, logits, targets.to(device, non_blocking=True).view(len(targets), -1)


@torch.no_grad()
def evaluate(model: nn.Module, dataset: EvaluationDataset, options: EvaluationOptions) -> EvaluationResult:
    """Evaluate `model` on the slices of all ranks; every rank calls this and gets the same result.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes), on the device; its mode is restored.
        dataset: the data set.
        options: precision, progress bar, and what else to count.

    Raises:
        InterruptedEvaluation: on every rank, if `should_stop` returned True on any.
        UserError: no rank has an image, the model has fewer classes than the data, or the data has more than
            `MAX_CONFUSION_CLASSES` for a confusion matrix.
    """
    device, classes = options.device, dataset.num_classes
    has_confusion = options.has_confusion and classes > 0
    if has_confusion and classes > MAX_CONFUSION_CLASSES:
        reason = f"the data has {classes:,} classes; a matrix of at most {MAX_CONFUSION_CLASSES:,} is counted"
        raise UserError("confusion_csv", reason)
    metrics = {key: metric for key, metric in METRICS.items() if classes or not metric.is_per_class}
    lengths = {m.accumulate: m.num_sums * (classes if m.is_per_class else 1) for m in metrics.values()}
    if has_confusion:
        lengths[count_confusions] = classes * (classes + 1)
    sums = {f: torch.zeros(n, dtype=torch.float64, device=device) for f, n in lengths.items()}
    # Images and unreadable images; interrupted ranks; ranks that refuse the model, sum of its classes there.
    counts = torch.zeros(5, dtype=torch.float64, device=device)
    with mode(model, training=False):
        try:
            for _, logits, targets in forward_batches(model, dataset, options, "evaluate"):
                batch = EvaluatedBatch(logits, targets[:, 0], targets[:, 1:], classes)
                for accumulate, metric_sums in sums.items():
                    metric_sums += accumulate(batch)
                counts[0] += len(logits)
                if options.should_stop():
                    counts[2] += 1
                    break
        except TooFewClassesError as error:
            # All ranks raise after the all-reduce: a rank without images would not raise here.
            counts[3:] += counts.new_tensor([1, error.num_logits])
    counts[1] = getattr(dataset.loader, "unreadable", 0)
    totals = all_reduce_sum(torch.cat([counts, *sums.values()])).cpu()
    counts, *parts = totals.split([len(counts), *lengths.values()])
    sums = dict(zip(sums, parts))
    num_images, num_unreadable, num_interrupted, num_refusing, their_classes = counts.tolist()
    if num_interrupted:
        raise InterruptedEvaluation
    if num_refusing:
        raise TooFewClassesError(their_classes / num_refusing, dataset)
    if num_images == 0:
        raise dataset.no_images_error(num_unreadable)
    finalized = {key: m.finalize(sums[m.accumulate], int(num_images)) for key, m in metrics.items()}
    return EvaluationResult(
        {key: value for key, value in finalized.items() if value is not None},
        int(num_images),
        int(num_unreadable),
        ClassMetrics.from_counts(sums[count_classes].view(3, -1)) if classes else None,
        sums[count_confusions].view(classes, -1).long().tolist() if has_confusion else None,
    )
