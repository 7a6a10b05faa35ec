"""Top-1, Top-5 and loss of a model, exact over any number of ranks.

Every rank evaluates its own slice of the images, without padding, and the counts are summed: each image
counts once whatever the number of ranks, and a rank whose slice is empty adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from vil.config import ConfigError, Precision
from vil.evaluation.modes import mode
from vil.training.distributed import all_reduce_sum
from vil.training.precision import autocast


@dataclass(frozen=True)
class Accuracy:
    """Figures over all images of all ranks.

    Attributes:
        top1, top5: images whose class is the first, or among the first five, in per cent (0-100). With
            fewer than five classes, top5 is over all of them.
        loss: mean cross-entropy, in nats.
        images: how many images were counted.
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    device: torch.device,
    precision: Precision,
    progress: bool = False,
    class_count: int | None = None,
) -> Accuracy:
    """Evaluates `model` over the slices of all ranks; every rank calls this, and all get the same result.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); its mode is the same afterwards as before.
        loader: yields this rank's batches: images (B, C, H, W), float, and targets (B,), int64.
        device: where the model is.
        precision: of the forward pass; the cross-entropy is always computed and summed in float64.
        progress: show a bar; meant for rank 0 alone.
        class_count: number of classes of the data; the model may have more.

    Raises:
        ConfigError: no rank has any image, or the model has fewer classes than the data.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, cross-entropy, images
    refused = torch.zeros(2, dtype=torch.float64, device=device)  # ranks, and the classes of their models
    with mode(model, training=False):
        for images, targets in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
            targets = targets.to(device, non_blocking=True)
            with autocast(precision, device):
                logits = model(images.to(device, non_blocking=True))  # (B, classes)
            if class_count is not None and logits.shape[1] < class_count:
                refused += refused.new_tensor([1, logits.shape[1]])
                break  # a rank without images finds nothing wrong: all hear of it below, and none waits
            sums += _sums(logits.double(), targets)
    top1, top5, cross_entropy, count, ranks, classes = all_reduce_sum(torch.cat([sums, refused])).tolist()
    if ranks:
        reason = f"the model has {classes / ranks:.0f} classes, the data has {class_count}"
        raise ConfigError("model.num_classes", reason)
    if count == 0:
        raise ConfigError("data", "there is no image to evaluate")
    return Accuracy(100 * top1 / count, 100 * top5 / count, cross_entropy / count, int(count))


def _sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(4,): correct in first place, correct in the first five, summed cross-entropy, images.

    An image's place is the number of classes ahead of its own: those with a larger logit, and of those with
    an equal one the earlier classes, as in argmax. A NaN is ahead of everything: never correct.
    """
    count, classes = logits.shape
    own = logits.gather(1, targets[:, None])  # (B, 1)
    earlier = torch.arange(classes, device=logits.device) < targets[:, None]  # (B, classes)
    place = (~(logits <= own) | ((logits == own) & earlier)).sum(dim=1)  # (B,)
    return torch.stack(
        [
            (place < 1).sum(),
            (place < min(5, classes)).sum(),
            F.cross_entropy(logits, targets, reduction="sum"),
            place.new_tensor(count),
        ]
    ).to(torch.float64)
