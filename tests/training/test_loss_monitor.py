import pytest
import torch

from vil.training.loss_monitor import HISTORY_SIZE, MIN_HISTORY, LossMonitor

NAN = float("nan")


def monitor_of(losses: list[float], spike_threshold: float | None = 6.0) -> LossMonitor:
    monitor = LossMonitor(torch.device("cpu"), 1, 3, spike_threshold)
    for step, loss in enumerate(losses, 1):
        monitor.add(step, torch.tensor(loss), torch.tensor(loss == loss))
    return monitor


def test_a_report_covers_every_step_since_the_last_one():
    monitor = monitor_of([1.0, NAN, NAN, 3.0, NAN])
    report = monitor.report()
    assert report.losses == pytest.approx([1.0, NAN, NAN, 3.0, NAN], nan_ok=True)
    assert (report.skipped_steps, report.failed_step, report.spikes) == (3, None, [])
    assert monitor.state_dict() == {"skipped": 3, "skipped_in_a_row": 1, "losses": [1.0, 3.0]}
    for step in range(6, 9):
        monitor.add(step, torch.tensor(NAN), torch.tensor(False))
    assert monitor.report().failed_step == 8  # three in a row are allowed
    assert monitor.report().losses == []


def test_a_full_monitor_requests_a_report():
    monitor = LossMonitor(torch.device("cpu"), 1, 3, None)
    is_full = [monitor.add(step, torch.tensor(1.0), torch.tensor(True)) for step in range(1, 1025)]
    assert is_full == [False] * 1023 + [True]
    assert len(monitor.report().losses) == 1024


def test_a_spike_is_compared_with_the_losses_before_it():
    usual = [1.0, 1.2] * (MIN_HISTORY // 2)
    assert monitor_of([*usual[1:], 9.0]).report().spikes == []  # too few losses
    (spike,) = monitor_of([*usual, 9.0, 1.0]).report().spikes
    assert (spike.step, spike.loss) == (MIN_HISTORY + 1, 9.0)
    assert (spike.mean, spike.deviation) == pytest.approx((1.1, 0.1), abs=1e-6)
    assert monitor_of([*usual, 1.69]).report().spikes == []
    assert len(monitor_of([*usual, 1.71]).report().spikes) == 1
    assert monitor_of([*usual, 9.0], spike_threshold=None).report().spikes == []


def test_a_restored_monitor_finds_the_same_spike():
    losses = [1.0 + 0.1 * (step % 3) for step in range(150)] + [9.0]
    whole = monitor_of(losses).report()
    first = monitor_of(losses[:70])
    first.report()
    second = monitor_of([])
    second.load_state_dict(first.state_dict())
    for step, loss in enumerate(losses[70:], 71):
        second.add(step, torch.tensor(loss), torch.tensor(True))
    assert second.report().spikes == whole.spikes != []
    assert len(second.state_dict()["losses"]) == HISTORY_SIZE
