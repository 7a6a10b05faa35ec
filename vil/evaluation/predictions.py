"""Predictions of a model on each image: confusion matrix, accuracy by class, most confident mistakes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, forward_batches
from vil.evaluation.metrics import ClassMetrics
from vil.runtime.modes import mode


@dataclass(frozen=True)
class Mistake:
    """A misclassified image.

    Attributes:
        image: (C, H, W), the normalized input of the model, on the CPU.
        index: position in the order of the loader, which skips images that cannot be read.
        target: index of its class.
        predicted: index of the predicted class.
        confidence: probability of the predicted class, in [0, 1].
        target_probability: probability of the target, in [0, 1].
    """

    image: Tensor
    index: int
    target: int
    predicted: int
    confidence: float
    target_probability: float


@dataclass(frozen=True)
class Predictions:
    """Counts over all images, and the most confident mistakes.

    Attributes:
        images: (classes,) int64, number of images of each class.
        confusion: (classes, logits) int64, number of images by class (row) and prediction (column). A model
            with more logits than the data has classes may predict any of them. Images with a NaN among their
            logits have no prediction and are in no column.
        mistakes: by descending confidence; of equal ones the earlier image first.
        unreadable: number of images that could not be read, which are not counted above.
    """

    images: Tensor
    confusion: Tensor
    mistakes: list[Mistake]
    unreadable: int

    @property
    def top1(self) -> float:
        """Top-1 in percent, as in `vil.evaluation.metrics`."""
        return 100 * int(self.confusion.diagonal().sum()) / int(self.images.sum())

    @property
    def classes(self) -> ClassMetrics:
        """Precision, recall and F1 of each class."""
        classes = len(self.images)
        predicted = self.confusion.sum(dim=0)[:classes]
        return ClassMetrics.from_counts(torch.stack([self.confusion.diagonal(), predicted, self.images]))

    @property
    def class_accuracy(self) -> list[float | None]:
        """Top-1 of each class in percent; None for a class without images."""
        correct = self.confusion.diagonal().tolist()
        return [100 * hits / count if count else None for hits, count in zip(correct, self.images.tolist())]


@torch.no_grad()
def predict(
    model: nn.Module, dataset: EvaluationDataset, options: EvaluationOptions, max_mistakes: int = 24
) -> Predictions:
    """Run `model` on all images of a data set whose classes are known, in one process.

    Args:
        model, dataset, options: as in `vil.evaluation.accuracy.evaluate`; probabilities are computed in
            float64.
        max_mistakes: number of mistakes to keep.

    Raises:
        UserError: there are no images, or the model has fewer classes than the data.
    """
    num_classes = dataset.num_classes
    class_images = torch.zeros(num_classes, dtype=torch.int64)
    confusion: Tensor | None = None
    mistakes: list[Mistake] = []
    images_seen = 0
    with mode(model, training=False):
        for images, logits, targets in forward_batches(model, dataset, options, "predict"):
            logits, targets = logits.cpu(), targets[:, 0].cpu()  # (B, logits), (B,)
            if confusion is None:
                confusion = torch.zeros(num_classes, logits.shape[1], dtype=torch.int64)
            class_images += targets.bincount(minlength=num_classes)
            has_prediction = ~logits.isnan().any(dim=1)
            predicted = logits.argmax(dim=1)
            ones = torch.ones(int(has_prediction.sum()), dtype=torch.int64)
            confusion.index_put_((targets[has_prediction], predicted[has_prediction]), ones, accumulate=True)
            if max_mistakes:
                is_wrong = has_prediction & (predicted != targets)
                mistakes += _find_mistakes(images, logits, targets, is_wrong, images_seen, max_mistakes)
                mistakes.sort(key=lambda mistake: (-mistake.confidence, mistake.index))
                del mistakes[max_mistakes:]
            images_seen += len(targets)
    unreadable = int(getattr(dataset.loader, "unreadable", 0))
    if confusion is None:
        raise dataset.no_images_error(unreadable)
    return Predictions(class_images, confusion, mistakes, unreadable)


def _find_mistakes(
    images: Tensor, logits: Tensor, targets: Tensor, is_wrong: Tensor, first_index: int, max_mistakes: int
) -> list[Mistake]:
    """Return the most confident mistakes of a batch; `first_index` is the index of its first image."""
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)  # (B,)
    wrong = is_wrong.nonzero()[:, 0]
    order = confidence[wrong].argsort(descending=True, stable=True)[:max_mistakes]
    return [
        Mistake(
            image=images[index].float().cpu().clone(),
            index=first_index + index,
            target=int(targets[index]),
            predicted=int(predicted[index]),
            confidence=float(confidence[index]),
            target_probability=float(probabilities[index, targets[index]]),
        )
        for index in wrong[order].tolist()
    ]
