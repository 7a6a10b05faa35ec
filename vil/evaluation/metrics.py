"""The metrics of an evaluation: how each is summed over batches and ranks, finalized, and shown.

To add a metric, add an entry to `METRICS`. Evaluation, logs, tables, JSON files and the report page iterate
over it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15
MAX_CONFUSION_CLASSES = 4000
"""Classes of the largest confusion matrix; its 128 MB are allocated for each batch."""


@dataclass(frozen=True)
class EvaluatedBatch:
    """Logits and labels of one batch, and quantities that several metrics share.

    Attributes:
        logits: (B, classes), float64.
        targets: (B,), int64.
        real_labels: (B, K), int64: ReaL labels of each image, padded with -1; K is 0 for images without.
        num_classes: number of classes of the data, at most that of the logits; 0 if unknown.
    """

    logits: Tensor
    targets: Tensor
    real_labels: Tensor
    num_classes: int = 0

    @cached_property
    def predictions(self) -> Tensor:
        """(B,): class with the largest logit; -2, which is not a label, if any logit is NaN."""
        return torch.where(self.logits.isnan().any(dim=1), -2, self.logits.argmax(dim=1))

    @cached_property
    def target_ranks(self) -> Tensor:
        """(B,): number of classes ranked above the target.

        Ties are broken in favor of the lower class index, as in argmax. NaN ranks above everything, so that
        an image with a NaN among its logits is never correct.
        """
        classes = self.logits.shape[1]
        target_logits = self.logits.gather(1, self.targets[:, None])  # (B, 1)
        is_lower_index = torch.arange(classes, device=self.logits.device) < self.targets[:, None]
        is_tie = self.logits == target_logits  # (B, classes)
        return (~(self.logits <= target_logits) | (is_tie & is_lower_index)).sum(dim=1)

    @cached_property
    def probabilities(self) -> Tensor:
        """(B, classes), float64."""
        return self.logits.softmax(dim=1)


@dataclass(frozen=True)
class Metric:
    """A figure over all images of a data set.

    Attributes:
        heading: name in tables and charts, without the unit.
        accumulate: a batch -> sums over its images, (num_sums,), which are added over batches and ranks in
            float64; one sum may be a scalar.
        finalize: the sums over all images, (num_sums,) on the CPU, and the number of images -> the value, or
            None if no image has the labels that the metric needs.
        num_sums: length of the vector of sums; of metrics that share `accumulate` the sums are the same.
        is_per_class: the vector has `num_sums` sums for each class of the data; the metric is omitted if the
            number of classes is unknown.
        unit: of the value.
        format: format specification of the value.
        higher_is_better: direction of improvement.
        shown_in: `table` of eval.py, its `list` of a single result on a narrow terminal, `log` of a run
            (metrics.jsonl and TensorBoard), `page` of the report.
    """

    heading: str
    accumulate: Callable[[EvaluatedBatch], Tensor]
    finalize: Callable[[Tensor, int], float | None]
    num_sums: int = 1
    is_per_class: bool = False
    unit: Literal["", "%"] = ""
    format: str = ".4f"
    higher_is_better: bool = False
    shown_in: frozenset[Literal["table", "list", "log", "page"]] = frozenset({"table", "list", "log"})

    @property
    def heading_with_unit(self) -> str:
        """`Top-1 %`."""
        return f"{self.heading} {self.unit}".rstrip()


def _mean(sums: Tensor, num_images: int) -> float:
    return float(sums[0]) / num_images


def _percentage(sums: Tensor, num_images: int) -> float:
    return 100 * float(sums[0]) / num_images


def _count_real_hits(batch: EvaluatedBatch) -> Tensor:
    """Return (2,): images whose prediction is one of their ReaL labels, images that have such labels."""
    is_hit = (batch.real_labels == batch.predictions[:, None]).any(dim=1)
    is_labeled = (batch.real_labels >= 0).any(dim=1)
    return torch.stack([is_hit.sum(), is_labeled.sum()])


def _finalize_real_top1(sums: Tensor, num_images: int) -> float | None:
    hits, labeled = sums.tolist()
    return 100 * hits / labeled if labeled else None


def _fill_calibration_bins(batch: EvaluatedBatch) -> Tensor:
    """Return (3 * CALIBRATION_BINS,): images, correct ones and summed confidence of each bin.

    Bin m holds confidences in (m / CALIBRATION_BINS, (m + 1) / CALIBRATION_BINS].
    """
    confidence, predictions = batch.probabilities.max(dim=1)  # (B,)
    bins = (confidence.nan_to_num() * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    is_correct = (predictions == batch.targets).to(confidence)
    values = torch.stack([torch.ones_like(confidence), is_correct, confidence])  # (3, B)
    return values.new_zeros(3, CALIBRATION_BINS).index_add_(1, bins, values).flatten()


def _finalize_calibration_error(sums: Tensor, num_images: int) -> float:
    images, correct, confidence = sums.view(3, CALIBRATION_BINS)
    return 100 * float((correct - confidence).abs().sum() / images.sum())


@dataclass(frozen=True)
class ClassMetrics:
    """Precision, recall and F1 of each class, in percent.

    As in scikit-learn with `zero_division=0`: a class that is never predicted has precision 0, a class
    without images recall 0, and F1 is the harmonic mean of both, 0 if either is.

    Attributes:
        images: number of images of each class.
    """

    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    images: tuple[int, ...]

    @classmethod
    def from_counts(cls, counts: Tensor) -> ClassMetrics:
        """Return the metrics of (3, classes): correct images, predictions and images of each class."""
        correct, predicted, images = counts.double()
        return cls(
            precision=tuple((100 * correct / predicted.clamp(min=1)).tolist()),
            recall=tuple((100 * correct / images.clamp(min=1)).tolist()),
            f1=tuple((200 * correct / (predicted + images).clamp(min=1)).tolist()),
            images=tuple(images.long().tolist()),
        )

    def macro(self, key: Literal["precision", "recall", "f1"]) -> float:
        """Return the mean over the classes that have images."""
        values: tuple[float, ...] = getattr(self, key)
        return statistics.fmean(value for value, count in zip(values, self.images) if count)


def count_classes(batch: EvaluatedBatch) -> Tensor:
    """Return (3 * num_classes,): correct images, predictions and images of each class.

    A prediction that is none of the classes of the data, or of an image with a NaN logit, is not counted.
    """
    none = batch.num_classes
    predictions, targets = batch.predictions, batch.targets
    is_class = (predictions >= 0) & (predictions < none)
    labels = [torch.where(predictions == targets, targets, none), torch.where(is_class, predictions, none)]
    offsets = torch.arange(3, device=targets.device)[:, None] * (none + 1)
    bins = (torch.stack([*labels, targets]) + offsets).flatten()  # (3 * B,)
    counts = torch.zeros(3 * (none + 1), dtype=torch.float64, device=targets.device)
    return counts.index_add_(0, bins, counts.new_ones(len(bins))).view(3, -1)[:, :none].flatten()


def count_confusions(batch: EvaluatedBatch) -> Tensor:
    """Return (num_classes * (num_classes + 1),): images by class (row) and prediction (column).

    The last column has the images whose prediction is none of the classes of the data, or a NaN logit.
    """
    columns = batch.num_classes + 1
    is_class = (batch.predictions >= 0) & (batch.predictions < batch.num_classes)
    bins = batch.targets * columns + torch.where(is_class, batch.predictions, batch.num_classes)
    counts = torch.zeros(batch.num_classes * columns, dtype=torch.float64, device=bins.device)
    return counts.index_add_(0, bins, counts.new_ones(len(bins)))


def _macro_metric(
    key: Literal["precision", "recall", "f1"], heading: str, *shown_in: Literal["list", "log"]
) -> Metric:
    """Return the mean of a metric of single classes over all classes that have images."""
    return Metric(
        heading=heading,
        accumulate=count_classes,
        finalize=lambda sums, _: ClassMetrics.from_counts(sums.view(3, -1)).macro(key),
        num_sums=3,
        is_per_class=True,
        unit="%",
        format=".2f",
        higher_is_better=True,
        shown_in=frozenset(shown_in),
    )


METRICS: Mapping[str, Metric] = {
    # Images whose target has the largest logit.
    "top1": Metric(
        heading="Top-1",
        accumulate=lambda batch: (batch.target_ranks < 1).sum(),
        finalize=_percentage,
        unit="%",
        format=".2f",
        higher_is_better=True,
        shown_in=frozenset({"table", "list", "log", "page"}),
    ),
    # Images whose target is among the five largest logits; all images with five classes or fewer.
    "top5": Metric(
        heading="Top-5",
        accumulate=lambda batch: (batch.target_ranks < min(5, batch.logits.shape[1])).sum(),
        finalize=_percentage,
        unit="%",
        format=".2f",
        higher_is_better=True,
    ),
    # Images whose prediction is among their ReaL labels, of those that have any
    # (Beyer et al., https://arxiv.org/abs/2006.07159).
    "real_top1": Metric(
        heading="ReaL",
        accumulate=_count_real_hits,
        finalize=_finalize_real_top1,
        num_sums=2,
        unit="%",
        format=".2f",
        higher_is_better=True,
    ),
    # Mean cross-entropy in nats.
    "loss": Metric(
        heading="loss",
        accumulate=lambda batch: F.cross_entropy(batch.logits, batch.targets, reduction="sum"),
        finalize=_mean,
        shown_in=frozenset({"table", "list", "log", "page"}),
    ),
    # Expected calibration error: |accuracy - confidence|, averaged over bins of equal width of the largest
    # probability (Guo et al., https://arxiv.org/abs/1706.04599, section 2).
    "ece": Metric(
        heading="ECE",
        accumulate=_fill_calibration_bins,
        finalize=_finalize_calibration_error,
        num_sums=3 * CALIBRATION_BINS,
        unit="%",
        format=".2f",
    ),
    # Brier score: squared distance between probabilities and one-hot target, in [0, 2]
    # (Brier, Verification of Forecasts Expressed in Terms of Probability, 1950).
    "brier": Metric(
        heading="Brier",
        accumulate=lambda batch: (
            (batch.probabilities - F.one_hot(batch.targets, batch.logits.shape[1])).square().sum()
        ),
        finalize=_mean,
    ),
    # Mean recall of the classes that have images, equal to the macro recall
    # (Brodersen et al., The Balanced Accuracy and Its Posterior Distribution, 2010).
    "balanced_accuracy": _macro_metric("recall", "balanced accuracy", "list", "log"),
    "macro_precision": _macro_metric("precision", "macro precision", "list"),
    "macro_recall": _macro_metric("recall", "macro recall"),
    "macro_f1": _macro_metric("f1", "macro F1", "list", "log"),
}
"""Key in JSON files and logs -> metric, in the order of the table's columns."""
