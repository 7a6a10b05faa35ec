import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_run import STEPS, TinyModel, load_last, make_config, run

from vil.checkpoint_files import step_files
from vil.training.logging import TIMING_FIELDS
from vil.training.signals import InterruptedRun, Signals


class Signalled(TinyModel):
    """Sends its own process a signal in each of some forward passes, in training or in evaluation."""

    def __init__(self, signals: dict[int, int], in_training: bool = True) -> None:
        super().__init__(dropout=0.2)
        self.signals, self.in_training, self.calls = signals, in_training, 0

    def forward(self, x):
        if self.training == self.in_training:
            self.calls += 1
            if self.calls in self.signals:
                os.kill(os.getpid(), self.signals[self.calls])
        return super().forward(x)


def records(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
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
    assert str(caught.value) == f"{name}: saved after step {call}; the same command goes on from there"
    assert signal.getsignal(signum) is handler
    state = load_last(tmp_path)
    assert state["step"] == call
    run(make_config(tmp_path), TinyModel(dropout=0.2), state=state)
    assert records(tmp_path) == records(whole)


def test_an_interrupted_evaluation_is_done_again(tmp_path: Path, whole: Path):
    with pytest.raises(InterruptedRun, match="saved after step 10"):
        run(make_config(tmp_path), Signalled({2: signal.SIGTERM}, in_training=False))
    state = load_last(tmp_path)
    assert (state["step"], state["finished_step"]) == (2 * STEPS, STEPS)
    run(make_config(tmp_path), TinyModel(dropout=0.2), state=state)
    assert records(tmp_path) == records(whole)


def test_an_evaluation_that_the_checkpoint_knows_nothing_of_stands_once(tmp_path: Path, whole: Path):
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


def test_a_second_interrupt_ends_at_once(tmp_path: Path):
    program = (
        "import os, signal, time\n"
        "from vil.training.signals import Signals\n"
        "with Signals().received():\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (130, "interrupted again: not saved\n")


def test_outside_a_main_thread_signals_stay_as_they_are():
    found = []

    def receive() -> None:
        with Signals().received() as signals:
            found.append((signal.getsignal(signal.SIGTERM), signals.agree().stop))

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), 0)]
