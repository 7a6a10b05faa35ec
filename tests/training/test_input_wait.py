"""A run that waits for images says so once, with a remedy that is one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run
import torch
from tiny_run import TinyTrainLoader, make_config, run

from vil.config import DataConfig
from vil.training import input_wait
from vil.training.input_wait import InputWait, input_bound_warning


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(tiny_run, "STEPS", 30)
    batches = TinyTrainLoader.epoch

    def epoch(
        self: TinyTrainLoader, epoch: int, start: int = 0
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches(self, epoch, start):
            time.sleep(seconds)
            yield batch

    monkeypatch.setattr(TinyTrainLoader, "epoch", epoch)


def test_an_input_bound_run_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(input_wait, "cores_per_rank", lambda: 8)
    slowed(monkeypatch, 0.05)
    run(make_config(tmp_path, epochs=2, data=DataConfig(workers=2)))
    lines = [line for line in capsys.readouterr().out.splitlines() if "input-bound" in line]
    assert len(lines) == 1
    assert "raise data.workers, now 2, up to 8" in lines[0]


def test_an_epoch_too_short_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slowed(monkeypatch, 0.01)
    monkeypatch.setattr(tiny_run, "STEPS", 10)
    run(make_config(tmp_path, epochs=1))
    assert "input-bound" not in capsys.readouterr().out


def test_the_first_wait_of_an_epoch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    wait = InputWait()
    for epoch in range(2):
        wait.begin()
        wait.add(100.0)
        for _ in range(21):
            wait.step()
            now += 1.0
            wait.add(0.25)
        assert wait.share() == pytest.approx(0.25), epoch


def test_the_remedy_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_wait, "cores_per_rank", lambda: 4)
    assert input_bound_warning(0.19, DataConfig(workers=1)) is None
    assert "now 1, up to 4" in str(input_bound_warning(0.5, DataConfig(workers=1)))
    assert "data.source ffcv" in str(input_bound_warning(0.5, DataConfig(source="folder", workers=4)))
    full = str(input_bound_warning(0.5, DataConfig(source="ffcv", workers=4)))
    assert full.startswith("input-bound: 50 % of the time")
    assert "write_ffcv.py" in full


def test_cores_are_divided_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_wait.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert input_wait.cores_per_rank() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert input_wait.cores_per_rank() == 1
