import os
import time
from pathlib import Path

import pytest
from helpers import tiny_run
from helpers.tiny_run import TinyTrainLoader, make_config, run

from vil.config import DataConfig
from vil.training import step_timer
from vil.training.step_timer import StepTimer, input_bound_warning


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock that advances only by calls of the fixture."""
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    return advance


def test_averages_cover_the_steps_since_the_last_call(clock):
    timer = StepTimer()
    timer.begin_epoch()
    for steps in (2, 3):
        for _ in range(steps):
            with timer.waiting():
                clock(0.5)
            clock(1.5)
            timer.end_step()
        assert timer.averages() == {"step_time": 2.0, "data_wait": 0.5}


def test_the_first_step_of_an_epoch_does_not_count(clock):
    timer = StepTimer()
    for _ in range(2):
        timer.begin_epoch()
        with timer.waiting():
            clock(100.0)
        for step in range(21):
            timer.end_step()
            assert (timer.waiting_share() > 0) == (step == 20)  # of a shorter epoch, 0
            with timer.waiting():
                clock(0.25)
            clock(0.75)
        assert timer.waiting_share() == pytest.approx(0.25)


def test_an_epoch_of_seconds_is_not_judged(clock):
    """As one of the demo, where a moment of other load is a fifth of the time."""
    timer = StepTimer()
    for seconds, share in ((0.1, 0.0), (0.5, 0.5)):
        timer.begin_epoch()
        timer.end_step()
        for _ in range(30):
            with timer.waiting():
                clock(seconds / 2)
            clock(seconds / 2)
            timer.end_step()
        assert timer.waiting_share() == pytest.approx(share)


def test_an_input_bound_run_prints_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock
):
    epoch = TinyTrainLoader.epoch

    def slow_epoch(*arguments: int):
        for batch in epoch(*arguments):
            clock(1.0)
            yield batch

    monkeypatch.setattr(tiny_run, "STEPS", 25)
    monkeypatch.setattr(TinyTrainLoader, "epoch", slow_epoch)
    monkeypatch.setattr(step_timer, "cores_per_rank", lambda: 8)
    run(make_config(tmp_path, epochs=2, data=DataConfig(workers=2)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("input-bound")]
    assert lines == [
        "input-bound: 100 % of the time is spent waiting for images; "
        "raise data.workers (now 2) up to 8, the cores per rank"
    ]


def test_advice_depends_on_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert input_bound_warning(0.19, workers=1) is None
    assert "raise data.workers (now 1) up to 4, the cores per rank" in str(input_bound_warning(0.5, 1))
    assert "all 4 cores per rank load images" in str(input_bound_warning(0.5, workers=4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert "all 1 cores per rank" in str(input_bound_warning(0.5, workers=4))
