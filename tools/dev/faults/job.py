"""Training runs and their processes: start train.py, watch it, send it signals, kill it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 300.0
"""Seconds without progress after which a job counts as stuck."""

_JOB_VARIABLE = "VIL_FAULT_INJECTION_JOB"
"""Environment variable that marks all processes of a job, orphans included."""
_TAIL_BYTES = 1 << 14
_jobs: list[Job] = []


@dataclass
class Run:
    """A run folder, the options of train.py that it is trained with, and a folder for its output."""

    folder: Path
    argv: tuple[str, ...]
    log_folder: Path
    ranks: int = 1

    def start(self, *argv: str, max_restarts: int = 0) -> Job:
        """Start train.py with further options; `max_restarts` is torchrun's."""
        return Job(self, argv, max_restarts)

    def finish(self) -> Job:
        """Start train.py and wait until it exits."""
        job = self.start()
        job.wait()
        return job

    def last_record(self) -> dict[str, Any]:
        """Return the last complete record of metrics.jsonl; empty if there is none."""
        with suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            for line in reversed(file.read().splitlines(keepends=True)):
                with suppress(ValueError):
                    if line.endswith(b"\n"):
                        return dict(json.loads(line))
        return {}

    def last_step(self) -> int:
        """Return the last logged step; 0 if there is none."""
        return int(self.last_record().get("step", 0))

    def unfinished_saves(self) -> set[tuple[str, int]]:
        """Return (name, inode) of the temporary files that saves in progress or killed saves have created."""
        files = set()
        for path in (self.folder / "checkpoints").glob("*.tmp"):
            with suppress(OSError):
                files.add((path.name, path.stat().st_ino))
        return files


class Job:
    """One call of train.py, directly or by torchrun if there are several ranks."""

    def __init__(self, run: Run, argv: tuple[str, ...], max_restarts: int) -> None:
        self.run, self.ranks = run, run.ranks
        self.logs = run.log_folder / str(len(_jobs) + 1)
        self.logs.mkdir(parents=True)
        command = [sys.executable]
        if self.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
            command += [f"--max-restarts={max_restarts}", "--redirects=3", f"--log-dir={self.logs}"]
        command += [str(ROOT / "train.py"), *run.argv, *argv, f"--output={run.folder}"]
        with (self.logs / "stdout.log").open("wb") as out, (self.logs / "stderr.log").open("wb") as err:
            self.process = subprocess.Popen(  # noqa: S603 (the project's own program)
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1", _JOB_VARIABLE: str(self.logs)},
                cwd=ROOT,
                start_new_session=True,
            )
        self.start_time = time.time()
        _jobs.append(self)

    def stdout(self) -> str:
        """Return the standard output of rank 0 so far."""
        return self._read("*/attempt_*/0/stdout.log" if self.ranks > 1 else "stdout.log")

    def stderr(self) -> str:
        """Return the standard error of all ranks so far, without torchrun's own."""
        return self._read("*/attempt_*/*/stderr.log" if self.ranks > 1 else "stderr.log")

    def output_tail(self) -> str:
        """Return the last lines of the output, for messages about problems."""
        lines = [*self.stdout().splitlines()[-2:], *self.stderr().splitlines()[-2:]]
        return f"{' / '.join(lines)[-300:]} ({self.logs})"

    def resumed_steps(self) -> list[int]:
        """Return the steps from which this job says it continued, one for each restart."""
        return [int(step) for step in re.findall(r"^continuing .* after step (\d+)", self.stdout(), re.M)]

    def resumed_step(self) -> int:
        """Return the step from which this job says it continued; 0 for a new run."""
        return (self.resumed_steps() or [0])[0]

    def steps(self) -> int:
        """Return the number of steps that this job has logged."""
        record = self.run.last_record()
        return record["step"] - self.resumed_step() if record.get("time", 0) > self.start_time else 0

    def age(self) -> float:
        """Return the seconds since the start."""
        return time.time() - self.start_time

    def wait_until(
        self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S, poll_s: float = 0.01
    ) -> bool:
        """Wait until `condition` holds or the job has exited; return True if it holds.

        Raise RuntimeError if neither happened within `timeout_s` of the job's last progress.
        """
        progress, deadline = None, time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None:
                return bool(condition())
            if time.monotonic() > deadline:
                last, progress = progress, (self.run.last_step(), self.stdout())
                if progress == last:
                    self.kill()
                    raise RuntimeError(f"no progress for {timeout_s:.0f} s: {self.output_tail()}")
                deadline += timeout_s
            time.sleep(poll_s)
        return True

    def wait_for_step(self, count: int) -> bool:
        """Wait until this job has logged `count` steps."""
        return self.wait_until(lambda: self.steps() >= count)

    def wait_seconds(self, seconds: float) -> None:
        """Wait for a time, or until the job has exited."""
        deadline = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() > deadline, poll_s=0.001)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait until the job has exited; return the exit status of train.py or of torchrun."""
        self.wait_until(lambda: self.process.poll() is not None, timeout_s)
        return int(self.process.wait())

    def send_signal(self, signum: signal.Signals, target: str = "main") -> None:
        """Send a signal to `main` (train.py or torchrun), its process `group`, or `rank0` or `rank1`."""
        if target.startswith("rank"):
            self.rank(int(target.removeprefix("rank"))).send_signal(signum)
        elif self.process.poll() is None:
            (os.killpg if target == "group" else os.kill)(self.process.pid, signum)

    def rank(self, rank: int) -> psutil.Process:
        """Return the process of a rank. Raise LookupError if it does not run."""
        main = psutil.Process(self.process.pid)
        if self.ranks == 1:
            return main
        for process in main.children():
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise LookupError(f"no process of rank {rank}: {self.output_tail()}")

    def has_rank(self, rank: int) -> bool:
        """Return True if the process of a rank runs."""
        with suppress(LookupError, psutil.Error):
            return self.rank(rank).is_running()
        return False

    def processes(self) -> list[psutil.Process]:
        """Return all running processes of this job."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_JOB_VARIABLE) == str(self.logs):
                    processes.append(process)
        return processes

    def kill(self, known: list[psutil.Process] | None = None) -> None:
        """Kill all processes with SIGKILL, those of `known` first."""
        processes = known or self.processes()
        while processes:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.poll()
            time.sleep(0.002)
            processes = self.processes()
        self.process.wait()

    def _read(self, pattern: str) -> str:
        paths = sorted(self.logs.glob(pattern))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def kill_all() -> None:
    """Kill the processes of all jobs."""
    for job in _jobs:
        if job.process.poll() is None or job.ranks > 1:
            job.kill()
