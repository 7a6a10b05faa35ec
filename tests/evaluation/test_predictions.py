"""Counts agree with vil.evaluation.accuracy; mistakes are the most confident ones, in order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vil.errors import UserError
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.evaluation.predictions import predict

CPU = torch.device("cpu")
CLASSES, IMAGES = 4, 101


class Logits(nn.Module):
    """A model whose images are its logits, (B, 1, 1, logits)."""

    def forward(self, images):
        assert not self.training
        return images.flatten(1)


def batches(logits, targets, size):
    return list(zip(logits[:, None, None].split(size), targets.split(size)))


def draw(num_logits=CLASSES):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, num_logits, generator=generator).round(decimals=1)  # with ties
    return logits, torch.randint(CLASSES - 1, (IMAGES,), generator=generator)  # the last class has no image


def dataset(batches, logit_indices=None):
    return EvaluationDataset("random", batches, [*"abcd"], logit_indices)


def run(logits, targets, size=16, logit_indices=None, max_mistakes=5):
    images = dataset(batches(logits, targets, size), logit_indices)
    return predict(Logits(), images, EvaluationOptions(CPU, "float32"), max_mistakes)


def evaluated(logits, targets):
    return evaluate(Logits(), dataset(batches(logits, targets, 16)), EvaluationOptions(CPU, "float32"))


def top1(logits, targets):
    return evaluated(logits, targets).values["top1"]


@pytest.mark.parametrize("num_logits", [CLASSES, CLASSES + 2])
def test_metrics_of_each_class_are_those_of_the_evaluation(num_logits):
    logits, targets = draw(num_logits)
    assert run(logits, targets).classes == evaluated(logits, targets).classes


@pytest.mark.parametrize("size", [7, 101])
def test_counts_and_mistakes(size):
    logits, targets = draw()
    found = run(logits, targets, size)
    assert found.top1 == top1(logits, targets)
    assert int(found.confusion.sum()) == int(found.images.sum()) == IMAGES
    confusion = [[0] * CLASSES for _ in range(CLASSES)]
    wrong = []
    for index, (row, target) in enumerate(zip(logits.double().softmax(dim=1).tolist(), targets.tolist())):
        first = row.index(max(row))
        confusion[target][first] += 1
        if first != target:
            wrong.append((-row[first], index, target, first, row[target]))
    assert found.confusion.tolist() == confusion
    mistakes = [(-m.confidence, m.index, m.target, m.predicted, m.target_probability) for m in found.mistakes]
    assert mistakes == [pytest.approx(mistake) for mistake in sorted(wrong)[:5]]
    assert all(torch.equal(m.image.flatten(), logits[m.index]) for m in found.mistakes)
    expected = [100 * confusion[k][k] / sum(confusion[k]) for k in range(3)]
    assert found.class_accuracy == [*map(pytest.approx, expected), None]


def test_an_image_with_nan_has_no_prediction():
    logits, targets = draw()
    logits[3, 1] = math.nan
    found = run(logits, targets)
    assert found.top1 == top1(logits, targets)
    assert int(found.confusion.sum()) == IMAGES - 1
    assert all(mistake.index != 3 for mistake in found.mistakes)


def test_logit_indices_and_real_labels():
    logits, targets = draw(num_logits=6)
    indices = [5, 0, 2, 3]
    labels = torch.stack([targets, torch.full_like(targets, -1)], dim=1)  # (B, 1 + K)
    chosen, whole = run(logits, labels, logit_indices=indices), run(logits, targets)
    assert torch.equal(chosen.confusion, run(logits[:, indices], targets).confusion)
    assert whole.confusion.shape == (CLASSES, 6)
    assert int(whole.confusion[:, CLASSES:].sum()) > 0
    assert run(logits, targets, max_mistakes=0).mistakes == []


def test_errors():
    logits, targets = draw(num_logits=2)
    with pytest.raises(UserError) as caught:
        run(logits, targets)
    assert str(caught.value) == "model.num_classes: the model has 2 classes, the data has 4"
    with pytest.raises(UserError) as caught:
        predict(Logits(), dataset([]), EvaluationOptions(CPU, "float32"))
    assert str(caught.value) == "data: no images"
