"""Top-1, Top-5, loss and calibration of a model, exact over any number of ranks.

Every rank evaluates its own slice of the images, without padding, and the counts are summed: each image
counts once whatever the number of ranks, and a rank whose slice is empty adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vil.config import ConfigError, Precision
from vil.modes import mode
from vil.training.distributed import all_reduce_sum
from vil.training.precision import autocast
from vil.training.signals import InterruptedEvaluation

BINS = 15
"""Of the confidence, for the calibration error."""


@dataclass(frozen=True)
class Accuracy:
    """Figures over all images of all ranks.

    Attributes:
        top1, top5: images whose class is the first, or among the first five, in per cent (0-100). With
            fewer than five classes, top5 is over all of them.
        loss: mean cross-entropy, in nats.
        images: how many images were counted.
        ece: expected calibration error in per cent, over 15 bins of equal width of the largest probability
            (Guo et al., https://arxiv.org/abs/1706.04599, section 2).
        real_top1: images whose first class is among their ReaL labels, in per cent of those that have any
            (Beyer et al., https://arxiv.org/abs/2006.07159); None without such labels.
        unreadable: images of the set that could not be read, and are not counted above.
    """

    top1: float
    top5: float
    loss: float
    images: int
    ece: float
    real_top1: float | None = None
    unreadable: int = 0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    device: torch.device,
    precision: Precision,
    progress: bool = False,
    class_count: int | None = None,
    class_rows: Sequence[int] | None = None,
    is_told_to_end: Callable[[], bool] = lambda: False,
) -> Accuracy:
    """Evaluates `model` over the slices of all ranks; every rank calls this, and all get the same result.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); its mode is the same afterwards as before.
        loader: yields this rank's batches: images (B, C, H, W), float, and targets (B,), int64, or
            (B, 1 + K): each image's class, then its K or fewer ReaL labels, filled up with -1. Its attribute
            `unreadable`, where it has one, counts the images that it had to leave out.
        device: where the model is.
        precision: of the forward pass; the cross-entropy is always computed and summed in float64.
        progress: show a bar where someone looks at a terminal; meant for rank 0 alone.
        class_count: number of classes of the data; the model may have more.
        class_rows: the logits that belong to these classes, class 0's first; all others are left out. None
            takes logit i for class i, and leaves none out.
        is_told_to_end: asked after each batch; once it is true on one rank, no rank has a result.

    Raises:
        InterruptedEvaluation: on every rank, when one was told to end.
        ConfigError: no rank has any image, or the model has fewer classes than the data.
    """
    needed = max(class_rows) + 1 if class_rows else class_count
    rows = None if class_rows is None else torch.tensor(class_rows, device=device)
    sums = torch.zeros(6, dtype=torch.float64, device=device)  # as _sums
    bins = torch.zeros(3, BINS, dtype=torch.float64, device=device)  # as _bins
    refused = torch.zeros(2, dtype=torch.float64, device=device)  # ranks, and the classes of their models
    ended = torch.zeros(1, dtype=torch.float64, device=device)  # ranks
    with mode(model, training=False):
        for images, targets in tqdm(
            loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True
        ):
            targets = targets.to(device, non_blocking=True)
            with autocast(precision, device):
                logits = model(images.to(device, non_blocking=True))  # (B, classes)
            if needed is not None and logits.shape[1] < needed:
                refused += refused.new_tensor([1, logits.shape[1]])
                break  # a rank without images finds nothing wrong: all hear of it below, and none waits
            logits = (logits if rows is None else logits[:, rows]).double()
            sums += _sums(logits, targets)
            bins += _bins(logits, targets[:, 0] if targets.ndim == 2 else targets)
            if is_told_to_end():
                ended += 1
                break
    unreadable = sums.new_tensor([getattr(loader, "unreadable", 0)])
    total = all_reduce_sum(torch.cat([sums, unreadable, refused, ended, bins.flatten()])).cpu()
    top1, top5, cross_entropy, count, real, of_real, lost, ranks, classes, ends = total[:10].tolist()
    if ends:
        raise InterruptedEvaluation
    if ranks:
        reason = f"the model has {classes / ranks:.0f} classes, the data has {class_count or needed}"
        raise ConfigError("model.num_classes", reason)
    if count == 0:
        reason = f"none of the {lost:.0f} images can be read" if lost else "there is no image to evaluate"
        raise ConfigError("data", reason)
    return Accuracy(
        100 * top1 / count,
        100 * top5 / count,
        cross_entropy / count,
        int(count),
        100 * float(_calibration_error(total[10:].view(3, BINS))),
        100 * real / of_real if of_real else None,
        int(lost),
    )


def _sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(6,): correct in first place, correct in the first five, summed cross-entropy, images; images whose
    first class is among their ReaL labels, images that have such labels.

    An image's place is the number of classes ahead of its own: those with a larger logit, and of those with
    an equal one the earlier classes, as in argmax. A NaN is ahead of everything: never correct.
    """
    count, classes = logits.shape
    labels, targets = targets.view(count, -1)[:, 1:], targets.view(count, -1)[:, 0]
    first = torch.where(logits.isnan().any(dim=1), -2, logits.argmax(dim=1))  # (B,); -1 fills up labels
    own = logits.gather(1, targets[:, None])  # (B, 1)
    earlier = torch.arange(classes, device=logits.device) < targets[:, None]  # (B, classes)
    place = (~(logits <= own) | ((logits == own) & earlier)).sum(dim=1)  # (B,)
    return torch.stack(
        [
            (place < 1).sum(),
            (place < min(5, classes)).sum(),
            F.cross_entropy(logits, targets, reduction="sum"),
            place.new_tensor(count),
            (labels == first[:, None]).any(dim=1).sum(),
            (labels >= 0).any(dim=1).sum(),
        ]
    ).to(torch.float64)


def _bins(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(3, BINS): images, correct ones, and summed confidence in each bin of the confidence.

    Bin m holds confidences above m / BINS, up to (m + 1) / BINS.
    """
    confidence, first = logits.softmax(dim=1).max(dim=1)  # (B,)
    place = (confidence.nan_to_num() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    values = torch.stack([torch.ones_like(confidence), (first == targets).to(confidence), confidence])
    return values.new_zeros(3, BINS).index_add_(1, place, values)


def _calibration_error(bins: torch.Tensor) -> torch.Tensor:
    """The difference between accuracy and confidence, averaged over the images by their bins (3, BINS)."""
    images, correct, confidence = bins
    return (correct - confidence).abs().sum() / images.sum()
