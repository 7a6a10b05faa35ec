import pytest
import torch
from torch.nn import functional as F

from vil.config import ScheduleConfig
from vil.training.loss import build_loss

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
