"""Scenarios of a job on two machines: what is started on each, and how it must end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from tools.dev.machines.network import Machine, torchrun, two_machines, wait_until_ended

_CONFIG = """\
model:
  name: vil
  image_size: 32
  stages:
    - {dim: 24, heads: 2, blocks: 1, patch: 8, window: 2}
    - {dim: 24, heads: 2, blocks: 1, patch: 2, attention: full, global_tokens: 0}
schedule: {epochs: 2, batch_size: 16, warmup_epochs: 0}
data: {source: folder, workers: 0}
precision: float32
log_every: 1
progress: false
loggers: []
attention_every: null
"""
_CLASSES, _IMAGES = 4, 20
_STEPS_BEFORE_FAULT = 3
_SLURM = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}

Pair = tuple[str, ...]
Fault = Callable[[Machine, Machine], None]


@dataclass(frozen=True)
class Scenario:
    """A job on two machines.

    Attributes:
        group: number of the group of scenarios.
        text: its description.
        statuses: exit statuses of the programs on both machines; None if one is still running.
        lines: (index of the machine, regular expression): lines that its output must have.
        absent: regular expressions that no output may have.
        argv: options of train.py on both machines.
        options: options of torchrun; None starts train.py itself.
        environment: variables on both machines.
        hosts: machine → lines of its /etc/hosts.
        mounts: path below the folder of the data, or in the repository → variant that B sees.
        programs: another program than train.py on a machine, by index.
        fault: called after the first steps.
        same_losses: True if the losses must be those of the first scenario.
        max_count: (regular expression, number): most lines that match, on both machines.
    """

    group: str
    text: str
    statuses: tuple[int | None, int | None]
    lines: Sequence[tuple[int, str]]
    absent: Sequence[str] = (r'File ".*/(train|ablate)\.py"',)
    argv: tuple[Pair, Pair] = ((), ())
    options: Sequence[str] | None = ()
    environment: tuple[Mapping[str, str], Mapping[str, str]] = field(default_factory=lambda: ({}, {}))
    hosts: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[str, str] = field(default_factory=dict)
    programs: Mapping[int, Path] = field(default_factory=dict)
    fault: Fault | None = None
    same_losses: bool = False
    max_count: tuple[str, int] | None = None


def kill_agent(first: Machine, second: Machine) -> None:
    """Kill torchrun on the second machine."""
    second.processes("torch.distributed.run")[0].send_signal(signal.SIGKILL)


def cut_network(first: Machine, second: Machine) -> None:
    """Take down the network of the second machine."""
    second.cut_network()


def _slurm(rank: int, **variables: str) -> dict[str, str]:
    hosts = {"SLURM_JOB_NODELIST": "machine-[a,b]", "SLURM_STEP_NODELIST": "machine-[a,b]"}
    ranks = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank)}
    return {**_SLURM, **hosts, **ranks, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"} | (
        variables
    )


def _on_both(pattern: str) -> list[tuple[int, str]]:
    return [(0, pattern), (1, pattern)]


_FINISHED = [(0, "of 80 images")]
_LOOPBACK = {"machine-a": "127.0.1.1 machine-a\n", "machine-b": "127.0.1.1 machine-b\n"}
_LONG = ("--schedule.epochs=2000", "--save_every=2")
_RANK_1 = r"rank 1 \(machine-b\)"

SCENARIOS = {
    "equal": Scenario("–", "equal machines", (0, 0), _FINISHED),
    "train-image-more": Scenario(
        "1",
        "B has one training image more",
        (1, 1),
        _on_both(f"error: .*data.root: {_RANK_1} has 81 training images, rank 0 .machine-a. has 80"),
        mounts={"data/train/class0": "variants/more"},
    ),
    "validation-image-fewer": Scenario(
        "1",
        "B has one validation image fewer",
        (1, 1),
        _on_both(f"error: .*data.root: {_RANK_1} has 79 validation images, rank 0 .machine-a. has"),
        mounts={"data/val/class0": "variants/fewer_val"},
    ),
    "renamed-image": Scenario(
        "1",
        "B has a training image with another name",
        (1, 1),
        _on_both(f"error: .*data.root: {_RANK_1} has different training images .* than rank 0"),
        mounts={"data/train/class0": "variants/renamed"},
    ),
    "other-code": Scenario(
        "1",
        "B has other code",
        (1, 1),
        _on_both(f"error: {_RANK_1} runs different vil code .* than rank 0 .machine-a."),
        mounts={"vil/training/loss.py": "variants/loss.py"},
    ),
    "train-image-fewer": Scenario(
        "2",
        "B has one training image fewer",
        (1, 1),
        _on_both(f"error: .*data.root: {_RANK_1} has 79 training images, rank 0 .machine-a. has 80"),
        mounts={"data/train/class0": "variants/fewer"},
    ),
    "wrong-line": Scenario(
        "3",
        "the line of B has an unknown option",
        (1, 1),
        [(0, f"error: {_RANK_1} failed: .*lrr"), (1, "error: .*schedule.lrr")],
        argv=((), ("--schedule.lrr=1",)),
    ),
    "absent-rank": Scenario(
        "3",
        "the rank of B never comes (start_timeout 25)",
        (1, None),
        [(0, "waiting for rank 1 of 2"), (0, "error: start_timeout: still waiting for rank 1 of 2")],
        argv=(("--start_timeout=25",), ()),
        programs={1: Path("sleep.py")},
    ),
    "slurm": Scenario(
        "4",
        "srun without torchrun",
        (0, 0),
        _FINISHED,
        options=None,
        environment=(_slurm(0), _slurm(1)),
        same_losses=True,
    ),
    "sbatch": Scenario(
        "4",
        "2 tasks in a batch script without srun",
        (2, 2),
        _on_both("error: environment: SLURM_NTASKS: 2, but srun did not start this process"),
        options=None,
        environment=tuple({k: v for k, v in _slurm(i).items() if "STEP" not in k} for i in (0, 1)),  # type: ignore[arg-type]
    ),
    "other-options": Scenario(
        "5",
        "B has other options",
        (1, 1),
        [
            (1, f"error: {key}: {value} of {_RANK_1} differs from {other} of rank 0")
            for key, value, other in (("schedule.lr", "0.5", "0.25"), ("seed", "3", "0"))
        ],
        argv=(("--schedule.lr=0.25",), ("--schedule.lr=0.5", "--seed=3")),
    ),
    "other-root": Scenario(
        "5",
        "the images of B lie in another folder",
        (0, 0),
        _FINISHED,
        argv=((), ("--data.root={folder}/elsewhere", "--data.workers=1")),
        mounts={"data": "variants/empty"},
        same_losses=True,
    ),
    "loopback": Scenario(
        "6",
        "host names resolve to 127.0.1.1",
        (1, 1),
        _on_both(r"error: .*machine-., the host of rank ., resolves to 127\.0\.1\.1.*GLOO_SOCKET_IFNAME"),
        options=("--rdzv_conf=is_host={is_host}",),
        hosts=_LOOPBACK,
    ),
    "loopback-interface": Scenario(
        "6",
        "the same with GLOO_SOCKET_IFNAME",
        (0, 0),
        _FINISHED,
        options=("--rdzv_conf=is_host={is_host}",),
        environment=({"GLOO_SOCKET_IFNAME": "{interface}"}, {"GLOO_SOCKET_IFNAME": "{interface}"}),
        hosts=_LOOPBACK,
        same_losses=True,
    ),
    "cut-network": Scenario(
        "7",
        "the network is cut, hang_action exit (torchrun of B waits for A's store)",
        (1, None),
        _on_both(r"no progress for 8 s .*: exiting; the last checkpoint is .*step_\d+"),
        argv=((*_LONG, "--hang_timeout=8", "--hang_action=exit"),) * 2,
        fault=cut_network,
    ),
    "killed-agent": Scenario(
        "8",
        "torchrun is killed on B",
        (1, -signal.SIGKILL),
        [
            (0, "SIGTERM: saved after step"),
            (1, r"\[rank 1\] torchrun \(process \d+\) has exited: sending SIGTERM"),
        ],
        argv=(_LONG, _LONG),
        fault=kill_agent,
    ),
    "restarts": Scenario(
        "9",
        "a wrong line with --max-restarts=3",
        (1, 1),
        [(0, "schedule.lrr")],
        argv=(("--schedule.lrr=1",),) * 2,
        options=("--max-restarts=3",),
        max_count=(r"^error: ", 2),
    ),
    "late-error-restarts": Scenario(
        "9",
        "a missing folder with --max-restarts=3",
        (1, 1),
        [(0, "error: .*data.root: .*/missing")],
        argv=(("--data.root={folder}/missing",),) * 2,
        options=("--max-restarts=3",),
        max_count=(r"^error: ", 2),
    ),
    "empty-world-size": Scenario(
        "9",
        "an empty WORLD_SIZE=",
        (2, 2),
        [(0, "error: environment: WORLD_SIZE: expected an integer of at least 1, got ''")],
        options=None,
        environment=({"WORLD_SIZE": ""}, {"WORLD_SIZE": ""}),
    ),
    "ablate": Scenario(
        "9",
        "tools/ablate.py under torchrun",
        (1, 1),
        [(0, "error: environment: WORLD_SIZE: tools/ablate.py starts the processes of its runs itself")],
        programs={0: Path("tools/ablate.py"), 1: Path("tools/ablate.py")},
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The end of a scenario: exit statuses, seconds, the lines to report, and what is not as expected."""

    scenario: Scenario
    statuses: Sequence[int | None]
    seconds: float
    message: str
    problems: Sequence[str]

    def row(self) -> dict[str, str]:
        """Return the row of the table."""
        statuses = ", ".join("running" if status is None else str(status) for status in self.statuses)
        return {
            "group": self.scenario.group,
            "scenario": self.scenario.text,
            "exit statuses of A, B": statuses,
            "seconds": f"{self.seconds:.0f}",
            "as expected": "yes" if not self.problems else f"no: {'; '.join(self.problems)}",
            "message": self.message.replace("|", "\\|"),
        }


class ScenarioRunner:
    """Images, configuration and runs in a folder, and the checkout whose programs are run."""

    def __init__(self, folder: Path, repository: Path, timeout_s: float) -> None:
        self.folder, self.repository, self.timeout_s = folder, repository, timeout_s
        (folder / "config.yaml").write_text(_CONFIG, encoding="utf-8")
        (folder / "sleep.py").write_text("import time\ntime.sleep(1000)\n", encoding="utf-8")
        _write_images(folder, repository)

    def run(self, name: str) -> Outcome:
        """Run a scenario on two new machines."""
        scenario, folder = SCENARIOS[name], self.folder / name
        folder.mkdir()
        mounts = {self._path(path): self.folder / source for path, source in scenario.mounts.items()}
        start = time.monotonic()
        with two_machines(folder, scenario.hosts, mounts) as machines:
            processes = [
                machine.start(
                    self._command(scenario, index, folder),
                    folder / f"{machine.name}.log",
                    self.folder,
                    self._environment(scenario, index, machine),
                )
                for index, machine in enumerate(machines)
            ]
            if scenario.fault is not None:
                _wait_for_steps(folder, self.timeout_s)
                start = time.monotonic()
                scenario.fault(*machines)
            never = [index for index, status in enumerate(scenario.statuses) if status is None]
            waited = [process for index, process in enumerate(processes) if index not in never]
            wait_until_ended(waited, self.timeout_s)
            seconds = time.monotonic() - start
            statuses = [process.poll() for process in processes]
            left = []
            if scenario.fault is not None:
                while (left := _ranks(machines[1])) and time.monotonic() - start < self.timeout_s:
                    time.sleep(0.2)
                seconds = time.monotonic() - start
        logs = [(folder / f"{machine.name}.log").read_text(errors="replace") for machine in machines]
        problems = ["the rank of B still runs"] if left else []
        if tuple(statuses) != scenario.statuses:
            problems.append(f"expected the statuses {scenario.statuses}")
        shown, unmet = self._check_output(scenario, folder, logs)
        problems += unmet
        if problems:
            shown += [text.strip().splitlines()[-1] for text in logs if text.strip()]
        return Outcome(scenario, statuses, seconds, " / ".join(dict.fromkeys(shown)), problems)

    def _check_output(
        self, scenario: Scenario, folder: Path, logs: Sequence[str]
    ) -> tuple[list[str], list[str]]:
        """Return the expected lines, and what is not as expected."""
        shown, problems = [], []
        for index, pattern in scenario.lines:
            matching = [line for line in logs[index].splitlines() if re.search(pattern, line)]
            shown += matching[:1]
            if not matching:
                problems.append(f"no line {pattern!r} on {'AB'[index]}")
        problems += [f"{pattern} in the output" for pattern in scenario.absent if _count(pattern, logs)]
        if scenario.max_count is not None:
            pattern, most = scenario.max_count
            if (count := _count(pattern, logs)) > most:
                problems.append(f"{count} lines {pattern!r}")
        if scenario.same_losses and _losses(folder) != _losses(self.folder / "equal"):
            problems.append("other losses than on equal machines")
        return shown, problems

    def _path(self, path: str) -> Path:
        return (self.folder if path.startswith("data") else self.repository) / path

    def _command(self, scenario: Scenario, index: int, folder: Path) -> list[str]:
        program = scenario.programs.get(index, Path("train.py"))
        path = self.repository / program if (self.repository / program).exists() else self.folder / program
        if program.name == "ablate.py":
            argv = [str(self.repository / "configs/ablations/pooling_digits.yaml"), "--output=ablations"]
        elif program.name == "sleep.py":
            argv = []
        else:
            # The working folder of a process on the second machine lies below that machine's mounts.
            argv = [f"--config={self.folder / 'config.yaml'}", "--device=cpu", f"--output={folder / 'run'}"]
            options = [option.format(folder=self.folder) for option in scenario.argv[index]]
            argv += [f"--data.root={self.folder / 'data'}", *options]
        if scenario.options is None:
            return [sys.executable, str(path), *argv]
        options = [option.format(is_host=int(index == 0)) for option in scenario.options]
        return [*torchrun(path, *options), *argv]

    def _environment(self, scenario: Scenario, index: int, machine: Machine) -> dict[str, str]:
        variables = {
            key: value.format(interface=machine.interface)
            for key, value in scenario.environment[index].items()
        }
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.repository), **variables}


def _ranks(machine: Machine) -> list[psutil.Process]:
    """Return the processes of train.py on a machine, without torchrun."""
    agents = machine.processes("torch.distributed.run")
    return [process for process in machine.processes("--device=cpu") if process not in agents]


def _count(pattern: str, logs: Sequence[str]) -> int:
    return sum(bool(re.search(pattern, line)) for log in logs for line in log.splitlines())


def _records(folder: Path) -> list[dict[str, object]]:
    with suppress(OSError):
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return []


def _losses(folder: Path) -> list[object]:
    return [record["loss"] for record in _records(folder)]


def _wait_for_steps(folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while len(_records(folder)) < _STEPS_BEFORE_FAULT and time.monotonic() < deadline:
        time.sleep(0.05)


def _write_images(folder: Path, repository: Path) -> None:
    """Write the data set, a copy of it, and the variants that the second machine may see."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(_CLASSES):
            path = folder / "data" / split / f"class{label}"
            path.mkdir(parents=True)
            for index in range(_IMAGES):
                Image.fromarray(random.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(
                    path / f"{index:02}.png"
                )
    shutil.copytree(folder / "data", folder / "elsewhere")
    variants, train = folder / "variants", folder / "data" / "train" / "class0"
    for name in ("more", "fewer", "renamed"):
        shutil.copytree(train, variants / name)
    shutil.copytree(folder / "data" / "val" / "class0", variants / "fewer_val")
    shutil.copy(train / "00.png", variants / "more" / "99.png")
    (variants / "empty").mkdir()
    (variants / "fewer" / "00.png").unlink()
    (variants / "fewer_val" / "00.png").unlink()
    (variants / "renamed" / "00.png").rename(variants / "renamed" / "00b.png")
    code = (repository / "vil" / "training" / "loss.py").read_text(encoding="utf-8")
    (variants / "loss.py").write_text(f"{code}\n# changed\n", encoding="utf-8")
