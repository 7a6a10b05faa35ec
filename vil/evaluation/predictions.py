"""What a model predicts, image by image: per-class accuracy, confusion matrix, most confident mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vil.config import ConfigError, Precision
from vil.modes import mode
from vil.training.precision import autocast


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for one of another class.

    Attributes:
        image: (C, H, W) as the model saw it, normalised, on the CPU.
        number: its place in the order of the loader, counted from 0; images that cannot be read have none.
        target: its class.
        predicted: the class it was taken for.
        confidence: probability of the predicted class, 0-1.
        target_probability: probability of its own class, 0-1.
    """

    image: Tensor
    number: int
    target: int
    predicted: int
    confidence: float
    target_probability: float


@dataclass(frozen=True)
class Predictions:
    """Counts over all images, and the worst of the mistakes.

    Attributes:
        images: (classes,) int64, how many images of each class there are.
        confusion: (classes, logits) int64, images of each class (row) by the class they were taken for
            (column). A model with more rows than the data has classes may take an image for one of those. An
            image whose logits hold a NaN is taken for none and stands in no column.
        mistakes: the most confident ones first; of equal ones the earlier image first.
        unreadable: images of the set that could not be read and are not counted above.
    """

    images: Tensor
    confusion: Tensor
    mistakes: list[Mistake]
    unreadable: int

    @property
    def top1(self) -> float:
        """Images that were taken for their own class, in per cent: `vil.evaluation.accuracy`'s Top-1."""
        return 100 * int(self.confusion.diagonal().sum()) / int(self.images.sum())

    @property
    def class_accuracy(self) -> list[float | None]:
        """The same for each class; None for a class without images."""
        correct = self.confusion.diagonal().tolist()
        return [100 * right / count if count else None for right, count in zip(correct, self.images.tolist())]


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    precision: Precision,
    class_count: int,
    class_rows: Sequence[int] | None = None,
    most_mistakes: int = 24,
    progress: bool = False,
) -> Predictions:
    """Runs `model` over all images of the loader, in one process.

    Args:
        model: maps images (B, C, H, W) to logits (B, rows); its mode is the same afterwards as before.
        loader: yields images (B, C, H, W), float, and targets (B,), int64, or (B, 1 + K), whose first column
            is the class, as `vil.evaluation.accuracy.evaluate` takes them.
        device: where the model is.
        precision: of the forward pass; probabilities are computed in float64.
        class_count: number of classes of the data; the model may have more.
        class_rows: the logits that belong to these classes, class 0's first; all others are left out.
        most_mistakes: how many mistakes to keep.
        progress: show a bar.

    Raises:
        ConfigError: there is no image, or the model has fewer classes than the data.
    """
    rows = None if class_rows is None else torch.tensor(class_rows, device=device)
    needed = max(class_rows) + 1 if class_rows else class_count
    images_of = torch.zeros(class_count, dtype=torch.int64)
    confusion: Tensor | None = None
    mistakes: list[Mistake] = []
    seen = 0
    with mode(model, training=False):
        for images, targets in tqdm(
            loader, desc="predict", unit="batch", leave=False, disable=None if progress else True
        ):
            with autocast(precision, device):
                logits = model(images.to(device, non_blocking=True))  # (B, rows)
            if logits.shape[1] < needed:
                reason = f"the model has {logits.shape[1]} classes, the data has {class_count}"
                raise ConfigError("model.num_classes", reason)
            logits = (logits if rows is None else logits[:, rows]).double().cpu()
            targets = targets.view(len(targets), -1)[:, 0].cpu()  # (B,)
            if confusion is None:
                confusion = torch.zeros(class_count, logits.shape[1], dtype=torch.int64)
            images_of += targets.bincount(minlength=class_count)
            decided = ~logits.isnan().any(dim=1)
            first = logits.argmax(dim=1)
            ones = torch.ones(int(decided.sum()), dtype=torch.int64)
            confusion.index_put_((targets[decided], first[decided]), ones, accumulate=True)
            if most_mistakes:
                found = _mistakes(images, logits, targets, decided & (first != targets), seen, most_mistakes)
                mistakes = sorted([*mistakes, *found], key=lambda m: (-m.confidence, m.number))
                del mistakes[most_mistakes:]
            seen += len(targets)
    unreadable = int(getattr(loader, "unreadable", 0))
    if confusion is None:
        reason = f"none of the {unreadable} images can be read" if unreadable else "there is no image"
        raise ConfigError("data", reason)
    return Predictions(images_of, confusion, mistakes, unreadable)


def _mistakes(
    images: Tensor, logits: Tensor, targets: Tensor, wrong: Tensor, seen: int, most: int
) -> list[Mistake]:
    """The most confident of the images of a batch that `wrong` (B,) marks; `seen` images came before it."""
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)  # (B,)
    places = wrong.nonzero()[:, 0]
    order = confidence[places].argsort(descending=True, stable=True)[:most]
    return [
        Mistake(
            images[place].float().cpu().clone(),
            seen + place,
            int(targets[place]),
            int(predicted[place]),
            float(confidence[place]),
            float(probabilities[place, targets[place]]),
        )
        for place in places[order].tolist()
    ]
