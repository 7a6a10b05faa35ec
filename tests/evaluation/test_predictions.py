"""Counts agree with those of vil.evaluation.accuracy; mistakes are the most confident ones, in order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vil.config import ConfigError
from vil.evaluation.accuracy import evaluate
from vil.evaluation.predictions import predict

CPU = torch.device("cpu")
CLASSES, IMAGES = 4, 101


class Logits(nn.Module):
    """A model whose images are their logits, (B, 1, 1, rows), and that says which mode it is in."""

    def forward(self, images):
        assert not self.training
        return images.flatten(1)


def batches(logits, targets, size):
    images = logits[:, None, None]
    return list(zip(images.split(size), targets.split(size)))


def drawn(rows=CLASSES):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, rows, generator=generator).round(decimals=1)  # with ties
    return logits, torch.randint(CLASSES - 1, (IMAGES,), generator=generator)  # the last class has no image


def run(logits, targets, size=16, **options):
    options = {"class_count": CLASSES, "most_mistakes": 5, **options}
    return predict(Logits(), batches(logits, targets, size), device=CPU, precision="float32", **options)


@pytest.mark.parametrize("size", [7, 101])
def test_counts_and_mistakes(size):
    logits, targets = drawn()
    found = run(logits, targets, size)
    exact = evaluate(Logits(), batches(logits, targets, 16), device=CPU, precision="float32")
    assert found.top1 == exact.top1
    assert int(found.confusion.sum()) == int(found.images.sum()) == IMAGES
    probabilities = logits.double().softmax(dim=1).tolist()
    expected = [[0] * CLASSES for _ in range(CLASSES)]
    wrong = []
    for number, (row, target) in enumerate(zip(probabilities, targets.tolist())):
        first = row.index(max(row))
        expected[target][first] += 1
        if first != target:
            wrong.append((-row[first], number, target, first))
    assert found.confusion.tolist() == expected
    shown = [(-m.confidence, m.number, m.target, m.predicted) for m in found.mistakes]
    assert shown == [pytest.approx(mistake) for mistake in sorted(wrong)[:5]]
    for mistake in found.mistakes:
        assert torch.equal(mistake.image.flatten(), logits[mistake.number])
        assert mistake.target_probability == pytest.approx(probabilities[mistake.number][mistake.target])
    for place, accuracy in enumerate(found.class_accuracy[:3]):
        assert accuracy == pytest.approx(100 * expected[place][place] / sum(expected[place]))
    assert found.class_accuracy[3] is None


def test_what_has_no_prediction_stands_in_no_column():
    logits, targets = drawn()
    logits[3, 1] = math.nan
    found = run(logits, targets)
    exact = evaluate(Logits(), batches(logits, targets, 16), device=CPU, precision="float32")
    assert found.top1 == exact.top1
    assert int(found.confusion.sum()) == IMAGES - 1
    assert all(mistake.number != 3 for mistake in found.mistakes)


def test_rows_and_labels_as_evaluate_takes_them():
    logits, targets = drawn(rows=6)
    rows = [5, 0, 2, 3]
    labels = torch.stack([targets, torch.full_like(targets, -1)], dim=1)  # (B, 1 + K)
    chosen, whole = run(logits, labels, class_rows=rows), run(logits, targets)
    assert torch.equal(chosen.confusion, run(logits[:, rows], targets).confusion)
    assert whole.confusion.shape == (CLASSES, 6)
    assert int(whole.confusion[:, CLASSES:].sum()) > 0
    assert run(logits, targets, most_mistakes=0).mistakes == []


def test_what_cannot_be_predicted():
    logits, targets = drawn(rows=2)
    with pytest.raises(ConfigError, match=r"model\.num_classes: the model has 2 classes, the data has 4"):
        run(logits, targets)
    with pytest.raises(ConfigError, match="data: there is no image"):
        predict(Logits(), [], device=CPU, precision="float32", class_count=CLASSES)
