import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vil.training.guards import FEWEST, REMEMBERED, FiniteSteps, StepWatch, Watchdog, spreading

ROOT = Path(__file__).parents[2]


def watch_of(losses: list[float], spike: float | None = 6.0) -> StepWatch:
    watch = StepWatch(torch.device("cpu"), 1, 3, spike)
    for step, loss in enumerate(losses, 1):
        watch.add(step, torch.tensor(loss), torch.tensor(loss == loss))
    return watch


def test_gradients_of_a_loss_that_is_not_finite_are_nan():
    for value, expected in ((2.0, 1.0), (float("inf"), float("nan")), (float("nan"), float("nan"))):
        found = spreading(torch.tensor(value)).item()
        assert found == expected or expected != found != found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_fused_optimiser_skips_without_being_asked(momentum: float):
    """On the device, that is, from the first step on, or from the second where a first one makes momentum."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum, fused=True)
    steps = FiniteSteps(optimizer, model)
    for number, is_finite in enumerate((True, False, True)):
        before = model.weight.detach().clone()
        model.weight.grad = torch.full_like(model.weight, 1.0 if is_finite else torch.nan)
        steps.begin()
        steps.take(torch.tensor(is_finite))
        assert torch.equal(before, model.weight) != is_finite
        assert isinstance(optimizer.found_inf, torch.Tensor) == (number > 0 or not momentum)


def test_a_look_tells_of_every_step_since_the_last_one():
    nan = float("nan")
    watch = watch_of([1.0, nan, nan, 3.0, nan])
    look = watch.look()
    assert [str(loss) for loss in look.losses] == ["1.0", "nan", "nan", "3.0", "nan"]
    assert (look.skipped, look.too_many, look.spikes) == (3, None, [])
    assert watch.state() == {"skipped": 3, "skipped_in_a_row": 1, "losses": [1.0, 3.0]}
    for step in range(6, 9):
        watch.add(step, torch.tensor(nan), torch.tensor(False))
    assert watch.look().too_many == 8  # three in a row are allowed
    assert watch.look().losses == []


def test_a_full_memory_asks_for_a_look():
    watch = StepWatch(torch.device("cpu"), 1, 3, None)
    added = [watch.add(step, torch.tensor(1.0), torch.tensor(True)) for step in range(1, 1025)]
    assert added == [False] * 1023 + [True]
    assert len(watch.look().losses) == 1024


def test_a_spike_is_judged_by_the_losses_before_it():
    usual = [1.0, 1.2] * (FEWEST // 2)
    assert watch_of([*usual[1:], 9.0]).look().spikes == []  # too few to tell
    (spike,) = watch_of([*usual, 9.0, 1.0]).look().spikes
    assert (spike.step, spike.loss) == (FEWEST + 1, 9.0)
    assert spike.mean == pytest.approx(1.1, abs=1e-6)
    assert spike.deviation == pytest.approx(0.1, abs=1e-6)
    assert watch_of([*usual, 1.69]).look().spikes == []
    assert len(watch_of([*usual, 1.71]).look().spikes) == 1
    assert watch_of([*usual, 9.0], spike=None).look().spikes == []


def test_what_it_remembers_goes_on():
    losses = [1.0 + 0.1 * (number % 3) for number in range(150)] + [9.0]
    whole = watch_of(losses).look()
    first = watch_of(losses[:70])
    first.look()
    second = StepWatch(torch.device("cpu"), 1, 3, 6.0)
    second.restore(first.state())
    for step, loss in enumerate(losses[70:], 71):
        second.add(step, torch.tensor(loss), torch.tensor(True))
    assert second.look().spikes == whole.spikes != []
    assert len(second.state()["losses"]) == REMEMBERED


def test_a_watchdog_names_the_rank_and_the_place_once(capsys: pytest.CaptureFixture[str]):
    watchdog = Watchdog(3, 0.2, 60, stop=lambda: 0)
    with watchdog.watching():
        watchdog.at("computing step 7")
        time.sleep(0.8)
        watchdog.at("computing step 8")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(
        "[rank 3] no progress for 0 s while computing step 7, at tests/training/test_guards"
    )
    assert said[0].endswith(" in test_a_watchdog_names_the_rank_and_the_place_once")
    assert all(thread.name != "watchdog" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("signals", "status", "line"),
    [
        (["SIGTERM"], 143, "[rank 1] told to end 1 s ago and still computing step 5: ends unsaved"),
        (["SIGINT", "SIGINT"], 130, "interrupted again: not saved"),
    ],
)
def test_a_process_in_c_code_is_ended(signals: list[str], status: int, line: str):
    """Python's handlers would run when it is back, which is never."""
    program = (
        "import ctypes, os, signal, threading, time\n"
        "from vil.training.guards import Watchdog\n"
        "from vil.training.signals import Signals\n"
        "def send():\n"
        f"    for name in {signals}:\n"
        "        time.sleep(0.5)\n"
        "        os.kill(os.getpid(), getattr(signal, name))\n"
        "signals = Signals()\n"
        "with signals.received(), Watchdog(1, 60, 1, stop=signals.seen).watching() as watchdog:\n"
        "    watchdog.at('computing step 5')\n"
        "    threading.Thread(target=send, daemon=True).start()\n"
        "    mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)\n"
        "    for _ in range(2):\n"
        "        libc.pthread_mutex_lock(mutex)  # the second waits, whatever signals come\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (status, line + "\n")
