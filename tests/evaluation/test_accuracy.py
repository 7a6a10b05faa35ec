"""Accuracy: against scikit-learn, at its edges, and the same for any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import evaluation_ranks
import numpy as np
import pytest
import torch
import torch.multiprocessing
from evaluation_ranks import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn

from vil.config import ConfigError
from vil.evaluation.accuracy import evaluate

CPU = torch.device("cpu")
AS_GIVEN = nn.Identity()  # "images" that are the logits themselves


@settings(deadline=None, max_examples=30)
@given(
    images=st.integers(1, 40), classes=st.integers(6, 20), seed=st.integers(0, 999), batch=st.integers(1, 17)
)
def test_agrees_with_scikit_learn(images: int, classes: int, seed: int, batch: int) -> None:
    logits, targets = drawn(images, classes, seed)
    loader = zip(logits.split(batch), targets.split(batch))
    found = evaluate(AS_GIVEN, loader, device=CPU, precision="float32")
    labels = np.arange(classes)
    assert found.images == images
    assert found.top1 == pytest.approx(100 * top_k_accuracy_score(targets, logits, k=1, labels=labels))
    assert found.top5 == pytest.approx(100 * top_k_accuracy_score(targets, logits, k=5, labels=labels))
    expected = log_loss(targets, logits.double().softmax(dim=1), labels=labels)
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_top5_with_three_classes_takes_all_of_them() -> None:
    found = evaluate(AS_GIVEN, [drawn(10, 3)], device=CPU, precision="float32")
    assert found.top5 == 100
    assert found.top1 < 100


def test_equal_logits_are_not_all_correct() -> None:
    loader = [(torch.zeros(10, 10), torch.arange(10))]
    found = evaluate(AS_GIVEN, loader, device=CPU, precision="float32")
    assert (found.top1, found.top5) == (10, 50)
    assert found.loss == pytest.approx(math.log(10), abs=1e-12)


@pytest.mark.parametrize("classes", [3, 10])
def test_nan_is_never_correct(classes: int) -> None:
    loader = [(torch.full((4, classes), math.nan), torch.arange(4) % classes)]
    found = evaluate(AS_GIVEN, loader, device=CPU, precision="float32")
    assert (found.top1, found.top5) == (0, 0)
    assert math.isnan(found.loss)


def test_loss_is_summed_in_double_precision() -> None:
    logits = torch.tensor([[0.0, 20.0]])  # cross-entropy 2e-9 for class 1, which float32 rounds to 0
    loader = [(logits, torch.tensor([1]))]
    found = evaluate(AS_GIVEN, loader, device=CPU, precision="float32")
    assert found.loss == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_modes_of_modules_are_put_back() -> None:
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.training or torch.is_grad_enabled())
            return super().forward(x)

    model = nn.Sequential(Spy(6, 6), nn.BatchNorm1d(6))
    model.train()
    model[1].eval()  # frozen
    statistics = model[1].running_mean.clone()
    evaluate(model, [drawn(5, 6)], device=CPU, precision="float32")
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(model[1].running_mean, statistics)


def test_forward_pass_runs_in_the_precision() -> None:
    kinds = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x)
            kinds.append(result.dtype)
            return result

    evaluate(Spy(6, 6), [drawn(5, 6)], device=CPU, precision="bfloat16")
    evaluate(Spy(6, 6), [drawn(5, 6)], device=CPU, precision="float32")
    assert kinds == [torch.bfloat16, torch.float32]


def test_calibration_error_by_its_definition() -> None:
    # Two classes, so that a logit is the log-odds of the confidence: 4 images at 0.8, 2 at 0.6.
    confidence = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.6, 0.6], dtype=torch.float64)
    logits = torch.stack([(confidence / (1 - confidence)).log(), torch.zeros(6)], dim=1)
    targets = torch.tensor([0, 0, 1, 1, 0, 0])  # half of the first four are correct, and both others
    found = evaluate(AS_GIVEN, [(logits, targets)], device=CPU, precision="float32")
    assert found.ece == pytest.approx(100 * (4 / 6 * abs(0.5 - 0.8) + 2 / 6 * abs(1 - 0.6)), rel=1e-6)


def test_calibration_error_against_plain_loops() -> None:
    logits, targets = drawn(500, 10)
    probability = (3 * logits.double()).softmax(dim=1).numpy()
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == targets.numpy()
    expected = 0.0
    for edge in range(15):
        inside = (confidence > edge / 15) & (confidence <= (edge + 1) / 15)
        if inside.any():
            expected += inside.sum() / 500 * abs(correct[inside].mean() - confidence[inside].mean())
    loader = zip((3 * logits).split(7), targets.split(7))
    found = evaluate(AS_GIVEN, loader, device=CPU, precision="float32")
    assert found.ece == pytest.approx(100 * expected, rel=1e-6)


def test_only_the_logits_of_the_classes_are_compared() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 0.0, 1.0, 5.0]])
    found = evaluate(
        AS_GIVEN, [(logits, torch.tensor([0, 0]))], device=CPU, precision="float32", class_rows=[2, 1]
    )
    rest = evaluate(AS_GIVEN, [(logits[:, [2, 1]], torch.tensor([0, 0]))], device=CPU, precision="float32")
    assert found == rest
    assert found.top1 == 100
    with pytest.raises(ConfigError, match="the model has 4 classes, the data has 6"):
        evaluate(AS_GIVEN, [drawn(4, 4)], device=CPU, precision="float32", class_rows=[2, 5])


def test_real_labels_count_images_that_have_any() -> None:
    logits = torch.eye(4)
    targets = torch.tensor([[0, 0, 3], [0, 2, 1], [3, -1, -1], [3, 2, -1]])  # class, then ReaL labels
    found = evaluate(AS_GIVEN, [(logits, targets)], device=CPU, precision="float32")
    assert found.top1 == 50
    assert found.real_top1 == pytest.approx(100 * 2 / 3)
    broken = evaluate(AS_GIVEN, [(logits * math.nan, targets)], device=CPU, precision="float32")
    assert broken.real_top1 == 0


def test_unreadable_images_are_counted() -> None:
    class Loader(list[tuple[torch.Tensor, torch.Tensor]]):
        unreadable = 3

    found = evaluate(AS_GIVEN, Loader([drawn(4, 4)]), device=CPU, precision="float32")
    assert (found.images, found.unreadable) == (4, 3)
    with pytest.raises(ConfigError, match="none of the 3 images can be read"):
        evaluate(AS_GIVEN, Loader([]), device=CPU, precision="float32")


def test_no_image_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no image"):
        evaluate(AS_GIVEN, [], device=CPU, precision="float32")


def test_too_few_classes_in_the_model_are_an_error() -> None:
    with pytest.raises(ConfigError, match="the model has 10 classes, the data has 12"):
        evaluate(AS_GIVEN, [drawn(4, 10)], device=CPU, precision="float32", class_count=12)
    evaluate(AS_GIVEN, [drawn(4, 10)], device=CPU, precision="float32", class_count=8)


def test_any_number_of_ranks_counts_each_image_once(tmp_path: Path) -> None:
    # Three processes; with three ranks the slices of 2 images are of 1, 1 and 0 images.
    torch.multiprocessing.spawn(evaluation_ranks.evaluate_in_worlds, (str(tmp_path),), nprocs=3)
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    for images in evaluation_ranks.IMAGES:
        results = [result for result in found if result["images"] == images]
        assert len(results) == 1 + 2 + 3
        assert len({(result["top1"], result["top5"]) for result in results}) == 1
        for key in ("loss", "ece"):
            assert [result[key] for result in results] == pytest.approx([results[0][key]] * 6, rel=1e-6)
    assert len(found) == 12
    refused = [path.read_text() for path in sorted(tmp_path.glob("*.refused"))]
    assert refused == ["model.num_classes: the model has 12 classes, the data has 13"] * 3
