import pytest
import torch
from torch.nn import functional as F

from vil.config import AugmentConfig, ScheduleConfig
from vil.errors import UserError
from vil.training.loss import build_loss, class_weights, image_weights

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
TARGETS = torch.tensor([0, 1])
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0]])


def test_cross_entropy_smooths_class_numbers_only():
    loss = build_loss(ScheduleConfig(label_smoothing=0.1))
    smooth = 0.9 * F.one_hot(TARGETS, 3) + 0.1 / 3
    assert loss(LOGITS, TARGETS).item() == pytest.approx(-(smooth * LOGITS.log_softmax(1)).sum().item() / 2)
    assert loss(LOGITS, SOFT).item() == pytest.approx(-(SOFT * LOGITS.log_softmax(1)).sum().item() / 2)


def test_binary_cross_entropy_without_smoothing_counts_mixed_classes_fully():
    loss = build_loss(ScheduleConfig(loss="bce", label_smoothing=0.0))
    full = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.equal(loss(LOGITS, SOFT), F.binary_cross_entropy_with_logits(LOGITS, full))
    one_hot = F.one_hot(TARGETS, 3).float()
    assert torch.equal(loss(LOGITS, TARGETS), F.binary_cross_entropy_with_logits(LOGITS, one_hot))


def test_binary_cross_entropy_with_smoothing_keeps_targets_soft():
    loss = build_loss(ScheduleConfig(loss="bce", label_smoothing=0.3))
    assert torch.equal(loss(LOGITS, SOFT), F.binary_cross_entropy_with_logits(LOGITS, SOFT))
    smooth = 0.7 * F.one_hot(TARGETS, 3) + 0.1
    assert torch.allclose(loss(LOGITS, TARGETS), F.binary_cross_entropy_with_logits(LOGITS, smooth))


def test_a_threshold_of_bce_replaces_the_rules_for_soft_targets():
    for smoothing in (0.0, 0.3):
        loss = build_loss(ScheduleConfig(loss="bce", label_smoothing=smoothing, bce_threshold=0.5))
        above = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        for targets in (SOFT, TARGETS):
            assert torch.equal(loss(LOGITS, targets), F.binary_cross_entropy_with_logits(LOGITS, above))
    with pytest.raises(UserError) as refused:
        build_loss(ScheduleConfig(bce_threshold=0.5))
    assert str(refused.value) == "schedule.bce_threshold: needs schedule.loss bce"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_jensen_shannon_loss_and_gradients_in_float64(smoothing: float):
    """Hendrycks et al. (2020): cross-entropy of the first views + 12 · mean KL(view, mean of the views)."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    targets = torch.tensor([0, 3, 1, 1, 2])

    def expected(clean: torch.Tensor, *augmented: torch.Tensor) -> torch.Tensor:
        smooth = (1 - smoothing) * F.one_hot(targets, 4) + smoothing / 4
        entropy = -(smooth * (clean - clean.logsumexp(1, keepdim=True))).sum() / 5
        probabilities = [logits.exp() / logits.exp().sum(1, keepdim=True) for logits in (clean, *augmented)]
        mixture = sum(probabilities) / 3
        divergence = sum((p * (p / mixture).log()).sum() / 5 for p in probabilities) / 3
        return entropy + 12 * divergence

    loss = build_loss(ScheduleConfig(label_smoothing=smoothing, augment=AugmentConfig(aug_splits=3)))
    logits = torch.cat(views).requires_grad_()
    parts = [view.clone().requires_grad_() for view in views]
    found, by_hand = loss(logits, targets), expected(*parts)
    torch.testing.assert_close(found, by_hand)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.cat(torch.autograd.grad(by_hand, parts)))


def test_jensen_shannon_loss_refuses_other_losses_and_class_weights():
    augment = AugmentConfig(aug_splits=3)
    for options, weights, message in (
        ({"loss": "bce"}, None, "schedule.loss: schedule.augment.aug_splits needs cross_entropy"),
        ({"bce_threshold": 0.2}, None, "schedule.bce_threshold: needs schedule.loss bce"),
        ({}, WEIGHTS, "schedule.class_weights: cannot be combined with schedule.augment.aug_splits"),
        (
            {"distillation": "soft"},
            None,
            "schedule.distillation: cannot be combined with schedule.augment.aug_splits",
        ),
    ):
        with pytest.raises(UserError) as refused:
            build_loss(ScheduleConfig(augment=augment, **options), weights)
        assert str(refused.value) == message


WEIGHTS = torch.tensor([0.5, 3.0, 1.0])


def normalized(loss, targets: torch.Tensor) -> float:
    return (loss(LOGITS, targets) / image_weights(targets, WEIGHTS).mean()).item()


def test_class_weights_are_those_of_torch():
    for smoothing in (0.0, 0.1):
        loss = build_loss(ScheduleConfig(label_smoothing=smoothing), WEIGHTS)
        expected = F.cross_entropy(LOGITS, TARGETS, WEIGHTS, label_smoothing=smoothing)
        assert normalized(loss, TARGETS) == pytest.approx(expected.item())


def test_soft_targets_are_weighted_by_their_distribution():
    loss = build_loss(ScheduleConfig(label_smoothing=0.1), WEIGHTS)
    assert image_weights(SOFT, WEIGHTS).tolist() == pytest.approx([0.7 * 0.5 + 0.3 * 3.0, 3.0])
    expected = -(SOFT * WEIGHTS * LOGITS.log_softmax(1)).sum() / (SOFT * WEIGHTS).sum()
    assert normalized(loss, SOFT) == pytest.approx(expected.item())
    by_number_of_images = F.cross_entropy(LOGITS, SOFT, WEIGHTS)
    assert loss(LOGITS, SOFT).item() == pytest.approx(by_number_of_images.item())
    one_hot = F.one_hot(TARGETS, 3).float()
    hard = build_loss(ScheduleConfig(label_smoothing=0.0), WEIGHTS)
    assert normalized(loss, one_hot) == pytest.approx(normalized(hard, TARGETS))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_binary_cross_entropy_weights_images(smoothing: float):
    loss = build_loss(ScheduleConfig(loss="bce", label_smoothing=smoothing), WEIGHTS)
    plain = build_loss(ScheduleConfig(loss="bce", label_smoothing=smoothing))
    for targets in (TARGETS, SOFT):
        weights = image_weights(targets, WEIGHTS)
        each = torch.stack([plain(LOGITS[i : i + 1], targets[i : i + 1]) for i in range(2)])
        assert normalized(loss, targets) == pytest.approx(((weights * each).sum() / weights.sum()).item())


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_class_weights_keep_32_bits_in_autocast(name: str):
    weights = torch.tensor([1.001, 3.003, 1.0])  # bfloat16 rounds to 1, 3 and 1
    loss = build_loss(ScheduleConfig(loss=name, label_smoothing=0.0), weights)
    logits = LOGITS.bfloat16()
    for targets in (TARGETS, SOFT, SOFT.bfloat16()):
        exact = targets.float() if targets.is_floating_point() else targets
        expected, expected_weights = loss(logits.float(), exact), image_weights(exact, weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert image_weights(targets, weights).dtype == torch.float32
            torch.testing.assert_close(image_weights(targets, weights), expected_weights)
            torch.testing.assert_close(loss(logits, targets), expected)


def test_balanced_weights_are_inverse_to_the_counts():
    assert class_weights("none", [8, 4, 0], 3) is None
    # 12 images in two classes; the third has none, the model one logit more.
    assert class_weights("balanced", [8, 4, 0], 4) == [12 / (2 * 8), 12 / (2 * 4), 1.0, 1.0]
    assert class_weights([1, 2.5, 3], [8, 4, 0], 4) == [1.0, 2.5, 3.0, 1.0]


def test_a_list_of_another_length_is_refused():
    with pytest.raises(UserError) as refused:
        class_weights([1.0, 2.0], [8, 4, 0], 3)
    assert str(refused.value) == "schedule.class_weights: 2 weights, the data has 3 classes"
