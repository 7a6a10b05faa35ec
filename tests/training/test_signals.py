import json
import os
import signal
import threading
from pathlib import Path

import pytest
from helpers.run_files import records
from helpers.tiny_run import STEPS, TinyModel, load_last, make_config, run

from vil.checkpoints.checkpoint_files import step_files
from vil.runtime.signals import InterruptedRun, SignalHandler


class Signalled(TinyModel):
    """Send signals to this process in forward passes, counted from 1, of training or of evaluation."""

    def __init__(self, signals: dict[int, int], in_training: bool = True) -> None:
        super().__init__(dropout=0.2)
        self.signals, self.in_training, self.calls = signals, in_training, 0

    def forward(self, x):
        if self.training == self.in_training:
            self.calls += 1
            if self.calls in self.signals:
                os.kill(os.getpid(), self.signals[self.calls])
        return super().forward(x)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    folder = tmp_path_factory.mktemp("whole")
    run(make_config(folder), TinyModel(dropout=0.2))
    return folder


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [1, STEPS + 2, 2 * STEPS])
def test_a_run_is_saved_after_the_step_of_the_signal(tmp_path: Path, whole: Path, signum: int, call: int):
    handler = signal.getsignal(signum)
    with pytest.raises(InterruptedRun) as caught:
        run(make_config(tmp_path), Signalled({call: signum}))
    assert caught.value.signum == signum
    name = signal.Signals(signum).name
    assert str(caught.value) == f"{name}: saved after step {call}; run the same command to continue"
    assert signal.getsignal(signum) is handler
    state = load_last(tmp_path)
    assert state["step"] == call
    run(make_config(tmp_path), TinyModel(dropout=0.2), state=state)
    assert records(tmp_path) == records(whole)


def test_an_interrupted_evaluation_is_repeated(tmp_path: Path, whole: Path):
    with pytest.raises(InterruptedRun, match="saved after step 10"):
        run(make_config(tmp_path), Signalled({2: signal.SIGTERM}, in_training=False))
    state = load_last(tmp_path)
    assert (state["step"], state["finished_step"]) == (2 * STEPS, STEPS)
    run(make_config(tmp_path), TinyModel(dropout=0.2), state=state)
    assert records(tmp_path) == records(whole)


def test_a_repeated_last_evaluation_saves_the_same_optimizer(tmp_path: Path, whole: Path):
    with pytest.raises(InterruptedRun, match="saved after step 15"):
        run(make_config(tmp_path), Signalled({3: signal.SIGTERM}, in_training=False))
    run(make_config(tmp_path), TinyModel(dropout=0.2), state=load_last(tmp_path))
    groups, expected = (load_last(folder)["optimizer"]["param_groups"] for folder in (tmp_path, whole))
    assert groups == expected  # with the learning rate of the last step


def test_an_evaluation_that_was_logged_but_not_saved_is_logged_once(tmp_path: Path, whole: Path):
    """Killed after the evaluation was logged and before it was saved."""
    with pytest.raises(InterruptedRun):
        run(make_config(tmp_path), Signalled({2: signal.SIGTERM}, in_training=False))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "validation", "step": 2 * STEPS, "epoch": 2}) + "\n")
    run(make_config(tmp_path), TinyModel(dropout=0.2), state=load_last(tmp_path))
    assert records(tmp_path) == records(whole)


def test_checkpoints_on_demand_and_every_few_steps(tmp_path: Path, whole: Path):
    run(
        make_config(tmp_path, save_every=4, keep_checkpoints=99),
        Signalled({3: signal.SIGUSR1, 7: signal.SIGUSR1}),
    )
    assert [step for step, _ in step_files(tmp_path)] == [15, 12, 10, 8, 7, 5, 4, 3]
    assert records(tmp_path) == records(whole)
    run(make_config(tmp_path / "few", save_every=4, keep_checkpoints=3), TinyModel(dropout=0.2))
    assert [step for step, _ in step_files(tmp_path / "few")] == [15, 12, 10]


def test_handlers_are_installed_in_the_main_thread_only():
    found: list[object] = []

    def receive() -> None:
        with SignalHandler().installed() as handler:
            found.append((signal.getsignal(signal.SIGTERM), handler.synchronize().stop))

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), 0)]
