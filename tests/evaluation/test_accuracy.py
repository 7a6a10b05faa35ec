"""Metrics: against scikit-learn and their definitions, at their edges, and equal on any number of ranks."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from torch import nn
from torch.multiprocessing.spawn import start_processes

from vil.errors import UserError
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, EvaluationResult, evaluate
from vil.evaluation.metrics import MAX_CONFUSION_CLASSES, ClassMetrics

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def draw(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (images, classes) and targets (images,)."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(images, classes)).astype(np.float32))
    return logits, torch.from_numpy(rng.integers(0, classes, images))


def evaluate_logits(
    logits: torch.Tensor, targets: Any, batch: int = 1000, **options: Any
) -> EvaluationResult:
    """Evaluate a model whose images are its logits."""
    loader = zip(logits.split(batch), torch.as_tensor(targets).split(batch))
    return evaluate_batches(list(loader), **options)


def evaluate_batches(
    batches: Batches,
    model: nn.Module | None = None,
    precision: str = "float32",
    num_classes: int | None = None,
    logit_indices: list[int] | None = None,
    has_confusion: bool = False,
) -> EvaluationResult:
    names = None if num_classes is None else [str(index) for index in range(num_classes)]
    options = EvaluationOptions(torch.device("cpu"), precision, has_confusion=has_confusion)
    dataset = EvaluationDataset("random", batches, names, logit_indices)
    return evaluate(model or nn.Identity(), dataset, options)


@settings(deadline=None, max_examples=30)
@given(
    images=st.integers(1, 40), classes=st.integers(6, 20), seed=st.integers(0, 999), batch=st.integers(1, 17)
)
def test_top1_top5_and_loss_agree_with_scikit_learn(images: int, classes: int, seed: int, batch: int) -> None:
    logits, targets = draw(images, classes, seed)
    found = evaluate_logits(logits, targets, batch)
    labels = np.arange(classes)
    assert (found.images, found.unreadable) == (images, 0)
    for key, k in (("top1", 1), ("top5", 5)):
        expected = 100 * top_k_accuracy_score(targets, logits, k=k, labels=labels)
        assert found.values[key] == pytest.approx(expected)
    expected = log_loss(targets, logits.double().softmax(dim=1), labels=labels)
    assert found.values["loss"] == pytest.approx(expected, rel=1e-6)


def test_top5_of_three_classes_is_100() -> None:
    found = evaluate_logits(*draw(10, 3)).values
    assert found["top5"] == 100 > found["top1"]


def test_of_equal_logits_the_first_is_the_prediction() -> None:
    found = evaluate_logits(torch.zeros(10, 10), torch.arange(10)).values
    assert (found["top1"], found["top5"]) == (10, 50)
    assert found["loss"] == pytest.approx(math.log(10), abs=1e-12)


@pytest.mark.parametrize("classes", [3, 10])
def test_nan_is_never_correct(classes: int) -> None:
    found = evaluate_logits(torch.full((4, classes), math.nan), torch.arange(4) % classes).values
    assert (found["top1"], found["top5"]) == (0, 0)
    assert math.isnan(found["loss"])


def test_loss_is_computed_in_float64() -> None:
    found = evaluate_logits(torch.tensor([[0.0, 20.0]]), [1])  # float32 rounds this loss to 0
    assert found.values["loss"] == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_modes_and_statistics_are_restored_and_precision_is_that_of_the_forward_pass() -> None:
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = super().forward(x)
            seen.append((self.training, torch.is_grad_enabled(), result.dtype))
            return result

    model = nn.Sequential(Spy(6, 6), nn.BatchNorm1d(6))
    model.train()
    model[1].eval()  # frozen
    statistics = model[1].running_mean.clone()
    for precision in ("float32", "bfloat16"):
        evaluate_batches([draw(5, 6)], model, precision)
    assert seen == [(False, False, torch.float32), (False, False, torch.bfloat16)]
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(model[1].running_mean, statistics)


def test_calibration_error_by_its_definition() -> None:
    # With two classes a logit is the log-odds of the confidence: 4 images at 0.8, 2 at 0.6.
    confidence = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.6, 0.6], dtype=torch.float64)
    logits = torch.stack([(confidence / (1 - confidence)).log(), torch.zeros(6)], dim=1)
    found = evaluate_logits(logits, [0, 0, 1, 1, 0, 0])  # half of the first four and both others are correct
    expected = 100 * (4 / 6 * abs(0.5 - 0.8) + 2 / 6 * abs(1 - 0.6))
    assert found.values["ece"] == pytest.approx(expected, rel=1e-6)


def test_calibration_error_agrees_with_a_plain_loop_over_bins() -> None:
    logits, targets = draw(500, 10)
    probability = (3 * logits.double()).softmax(dim=1).numpy()
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == targets.numpy()
    expected = 0.0
    for edge in range(15):
        inside = (confidence > edge / 15) & (confidence <= (edge + 1) / 15)
        if inside.any():
            expected += inside.sum() / 500 * abs(correct[inside].mean() - confidence[inside].mean())
    found = evaluate_logits(3 * logits, targets, batch=7)
    assert found.values["ece"] == pytest.approx(100 * expected, rel=1e-6)


def test_calibration_error_keeps_the_first_and_the_last_two_bins_apart() -> None:
    """One image in each: errors of opposite sign would cancel in a common bin."""
    confidence = torch.tensor([0.06, 0.1, 0.9, 0.98], dtype=torch.float64)
    others = ((1 - confidence) / 19).log()[:, None].expand(-1, 19)
    logits = torch.cat([confidence.log()[:, None], others], dim=1)  # (4, 20), class 0 is the prediction
    found = evaluate_logits(logits, [0, 1, 1, 0])
    assert found.values["ece"] == pytest.approx(100 * (0.94 + 0.1 + 0.9 + 0.02) / 4)


def test_brier_score() -> None:
    certain = torch.tensor([[99.0, 0.0, 0.0, 0.0]])
    for target, expected in ((0, 0), (1, 2)):
        assert evaluate_logits(certain, [target]).values["brier"] == pytest.approx(expected, abs=1e-12)
    assert evaluate_logits(torch.zeros(1, 4), [2]).values["brier"] == pytest.approx(0.75**2 + 3 * 0.25**2)
    logits, targets = draw(50, 10)
    distance = logits.double().softmax(dim=1).numpy() - np.eye(10)[targets]
    found = evaluate_logits(logits, targets, batch=7)
    assert found.values["brier"] == pytest.approx((distance**2).sum(axis=1).mean(), rel=1e-12)


def test_logit_indices_ignore_all_other_logits() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 0.0], [9.0, 0.0, 1.0, 5.0]])
    found = evaluate_logits(logits, [0, 0], logit_indices=[2, 1])
    assert found == evaluate_logits(logits[:, [2, 1]], [0, 0])
    assert found.values["top1"] == 100


def test_real_labels_count_images_that_have_any() -> None:
    logits = torch.eye(4)
    targets = [[0, 0, 3], [0, 2, 1], [3, -1, -1], [3, 2, -1]]  # target, then ReaL labels
    found = evaluate_logits(logits, targets).values
    assert (found["top1"], found["real_top1"]) == (50, pytest.approx(100 * 2 / 3))
    assert evaluate_logits(logits * math.nan, targets).values["real_top1"] == 0
    assert "real_top1" not in evaluate_logits(logits, [0, 0, 3, 3]).values


def test_logged_values_have_a_prefix() -> None:
    found = evaluate_logits(*draw(4, 4), num_classes=4)
    logged = {
        key: value for key, value in found.values.items() if key not in ("macro_precision", "macro_recall")
    }
    assert found.logged("ema_") == {f"ema_{key}": value for key, value in logged.items()}


def draw_predictions(classes: int, logits: int, seed: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """Logits (30, logits), their predictions, and targets, which lack some of the classes."""
    rng = np.random.default_rng(seed)
    present = rng.choice(classes, size=int(rng.integers(1, classes + 1)), replace=False)
    predictions, targets = rng.integers(0, logits, 30), rng.choice(present, 30)
    return 5 * torch.eye(logits)[torch.from_numpy(predictions)], predictions.tolist(), targets.tolist()


@pytest.mark.parametrize("logits", [0, 3])
@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_metrics_of_each_class_agree_with_scikit_learn(classes: int, logits: int, seed: int) -> None:
    """Classes without images, classes that are never predicted, logits of no class of the data."""
    images, predictions, targets = draw_predictions(classes, classes + logits, seed)
    found = evaluate_logits(images, targets, batch=7, num_classes=classes, has_confusion=True)
    labels, present = list(range(classes)), sorted(set(targets))

    def scikit_learn(labels: list[int], average: str | None = None) -> tuple[Any, ...]:
        return precision_recall_fscore_support(
            targets, predictions, labels=labels, average=average, zero_division=0
        )

    *expected, support = scikit_learn(labels)
    assert found.classes is not None
    assert list(found.classes.images) == support.tolist()
    for key, values in zip(("precision", "recall", "f1"), expected):
        assert getattr(found.classes, key) == pytest.approx(100 * values)
    for key, value in zip(("macro_precision", "macro_recall", "macro_f1"), scikit_learn(present, "macro")):
        assert found.values[key] == pytest.approx(100 * value)
    balanced = 100 * balanced_accuracy_score(targets, predictions)
    assert found.values["balanced_accuracy"] == pytest.approx(balanced)
    none = np.where(np.array(predictions) < classes, predictions, classes)
    matrix = confusion_matrix(targets, none, labels=[*labels, classes])
    assert found.confusion == matrix[:-1].tolist()


def test_a_nan_logit_is_a_prediction_of_no_class() -> None:
    logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, 1.0]])
    found = evaluate_logits(logits, [0, 0, 1], num_classes=2, has_confusion=True)
    assert found.classes == ClassMetrics(
        precision=(100, 100), recall=(50, 100), f1=(pytest.approx(200 / 3), 100), images=(2, 1)
    )
    assert found.confusion == [[1, 0, 1], [0, 1, 0]]


def test_top5_of_two_classes_is_100_and_top1_is_the_accuracy() -> None:
    found = evaluate_logits(
        torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [0, 1, 1], num_classes=2
    ).values
    assert (found["top1"], found["top5"]) == (pytest.approx(200 / 3), 100)
    assert (found["balanced_accuracy"], found["macro_precision"]) == (75, 75)


def test_macro_averages_are_omitted_if_the_classes_are_unknown() -> None:
    found = evaluate_logits(*draw(4, 4))
    assert found.classes is None
    assert not {"balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"} & set(found.values)


class Unreadable(list):
    unreadable = 3


def test_unreadable_images_are_counted() -> None:
    found = evaluate_batches(Unreadable([draw(4, 4)]))
    assert (found.images, found.unreadable) == (4, 3)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "data: no images"),
        (Unreadable(), {}, "data: none of the 3 images can be read"),
        ([draw(4, 4)], {"num_classes": 6}, "model.num_classes: the model has 4 classes, the data has 6"),
        (
            [draw(4, 4)],
            {"logit_indices": [2, 5]},
            "model.num_classes: the model has 4 classes, the data has 6",
        ),
    ],
)
def test_errors(batches: Batches, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate_batches(batches, **options)
    assert str(caught.value) == message


def test_a_model_may_have_more_classes_than_the_data() -> None:
    assert evaluate_batches([draw(4, 10)], num_classes=8).images == 4


IMAGES = (11, 2)


def evaluate_in_worlds(rank: int, folder: str) -> None:
    """Evaluate a fixed linear model as one rank of 1, 2 and 3; write the results of this rank."""
    torch.set_num_threads(1)
    model = nn.Linear(12, 12)
    with torch.no_grad():
        model.weight.copy_(draw(12, 12, seed=1)[0])
        model.bias.zero_()
    for world_size in range(rank + 1, 4):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous_{world_size}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        for images in IMAGES:
            features, targets = draw(images, 12)
            slice_ = slice(rank, None, world_size)
            batches = list(zip(features[slice_].split(2), targets[slice_].split(2))) if rank < images else []
            found = evaluate_batches(batches, model, num_classes=12, has_confusion=True)
            Path(f"{folder}/{images}_{world_size}_{rank}.json").write_text(
                json.dumps(dataclasses.asdict(found))
            )
            if world_size == 3 and images == 2:  # the last rank has no image
                with pytest.raises(UserError) as caught:
                    evaluate_batches(batches, model, num_classes=13)
                Path(f"{folder}/{rank}.error").write_text(str(caught.value))
        dist.destroy_process_group()


def test_any_number_of_ranks_counts_each_image_once(tmp_path: Path) -> None:
    # Forked, so that PyTorch is not imported again. On three ranks, 2 images are slices of 1, 1 and 0.
    start_processes(evaluate_in_worlds, (str(tmp_path),), nprocs=3, start_method="fork")
    for images in IMAGES:
        found = [json.loads(path.read_text()) for path in tmp_path.glob(f"{images}_*.json")]
        assert [result["images"] for result in found] == [images] * (1 + 2 + 3)
        for key, value in found[0]["values"].items():
            rel = 1e-6 if key in ("loss", "ece", "brier") else 0
            assert [result["values"][key] for result in found] == pytest.approx([value] * 6, rel=rel)
        for key in ("classes", "confusion"):
            assert [result[key] for result in found] == [found[0][key]] * 6
        assert sum(map(sum, found[0]["confusion"])) == images
    errors = [path.read_text() for path in tmp_path.glob("*.error")]
    assert errors == ["model.num_classes: the model has 12 classes, the data has 13"] * 3


def test_a_confusion_matrix_of_too_many_classes_is_refused():
    classes = MAX_CONFUSION_CLASSES + 1
    batches = [(torch.eye(classes)[:2], torch.tensor([0, 1]))]
    assert evaluate_batches(batches, num_classes=classes).values["top1"] == 100
    with pytest.raises(UserError) as refused:
        evaluate_batches(batches, num_classes=classes, has_confusion=True)
    reason = "the data has 4,001 classes; a matrix of at most 4,000 is counted"
    assert str(refused.value) == f"confusion_csv: {reason}"
