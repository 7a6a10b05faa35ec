"""The metrics of an evaluation: how each is summed over batches and ranks, finalized, and shown.

To add a metric, add an entry to `METRICS`. Evaluation, logs, tables, JSON files and the report page iterate
over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class EvaluatedBatch:
    """Logits and labels of one batch, and quantities that several metrics share.

    Attributes:
        logits: (B, classes), float64.
        targets: (B,), int64.
        real_labels: (B, K), int64: ReaL labels of each image, padded with -1; K is 0 for images without.
    """

    logits: Tensor
    targets: Tensor
    real_labels: Tensor

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
        num_sums: length of the vector of sums.
        unit: of the value.
        format: format specification of the value.
        higher_is_better: direction of improvement.
        shown_in: `table` of eval.py, `log` of a run (metrics.jsonl and TensorBoard), `page` of the report.
    """

    heading: str
    accumulate: Callable[[EvaluatedBatch], Tensor]
    finalize: Callable[[Tensor, int], float | None]
    num_sums: int = 1
    unit: Literal["", "%"] = ""
    format: str = ".4f"
    higher_is_better: bool = False
    shown_in: frozenset[Literal["table", "log", "page"]] = frozenset({"table", "log"})

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


METRICS: Mapping[str, Metric] = {
    # Images whose target has the largest logit.
    "top1": Metric(
        heading="Top-1",
        accumulate=lambda batch: (batch.target_ranks < 1).sum(),
        finalize=_percentage,
        unit="%",
        format=".2f",
        higher_is_better=True,
        shown_in=frozenset({"table", "log", "page"}),
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
        shown_in=frozenset({"table", "log", "page"}),
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
}
"""Key in JSON files and logs -> metric, in the order of the table's columns."""
