"""Scenarios of fault injection: what happens to a run, and what must hold afterwards."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tools.dev.faults import checks
from tools.dev.faults.experiment import (
    EPOCHS,
    SAVE_EVERY,
    STEPS_PER_EPOCH,
    Experiment,
    check_no_traceback,
    check_one_line,
)
from tools.dev.faults.job import Job, Run
from tools.dev.faults.report import Trial

MIN_SHARE_IN_SAVE = 0.2
"""Share of kills that must hit a save."""
DISK_MB = 90
"""Size of the disk that is filled: the checkpoints of a run and some more."""
HANG_TIMEOUT_S = 3


# --- kill -9 ------------------------------------------------------------------------------------------------


def kill(experiment: Experiment, ranks: int = 1, is_float16: bool = False) -> None:
    """Kill a run again and again, then let it finish.

    A kill counts as inside a save if it leaves a temporary file. If too few do, there are more kills.
    """
    argv = ("--precision=float16", "--data.workers=2") if is_float16 else ()
    kills = max(4, experiment.kills // 10) if is_float16 else experiment.kills
    epochs = max(EPOCHS, math.ceil(7 * kills / STEPS_PER_EPOCH))
    run = experiment.new_run("kill", ranks, argv, epochs)
    random = experiment.random(1, ranks, is_float16)
    fault = "kill -9" + (" of all ranks" if ranks > 1 else "")
    suffix = ", float16 and data workers" if is_float16 else ""
    required, max_kills = math.ceil(MIN_SHARE_IN_SAVE * kills), 2 * kills + 4
    step, kills_in_save, startup_s = 0, 0, 8.0
    trials: list[Trial] = []
    is_last = False
    while not is_last and not (trials and trials[-1].problems):
        with experiment.report.trial(fault + suffix, ranks) as trial:
            trials.append(trial)
            must_hit_save = required - kills_in_save > kills - len(trials)
            leftovers, job = run.unfinished_saves(), run.start()
            if must_hit_save or random.random() < 1.5 * MIN_SHARE_IN_SAVE:
                _kill_in_save(job, random)
            else:
                _wait_for_random_moment(job, random, startup_s)
                job.kill()
            startup_s = job.age() if job.steps() else startup_s
            if run.unfinished_saves() - leftovers:
                kills_in_save += 1
                trial.fault = f"{fault} in a save{suffix}"
            trial.check_status(job.wait(), -signal.SIGKILL)
            check_no_traceback(trial, job)
            resumed = job.resumed_step()
            trial.check(resumed in (0, step), f"continued from {resumed}, not {step}")
            step = _check_killed_run(trial, run)
            is_last = (len(trials) >= kills and kills_in_save >= required) or len(trials) == max_kills
            if is_last:
                trial.check(kills_in_save >= required, f"{kills_in_save} kills in a save, not {required}")
                experiment.resume(trial, run)
    for trial in trials:
        trial.is_identical = trials[-1].is_identical


def _wait_for_random_moment(job: Job, random: np.random.Generator, startup_s: float) -> None:
    """Wait for a moment of the start, or for up to 7 steps and then for a part of a second."""
    if random.random() < 0.15:
        job.wait_seconds(random.uniform(0, startup_s))
    else:
        job.wait_for_step(int(random.integers(1, 8)))
        job.wait_seconds(random.uniform(0, 0.5))


def _kill_in_save(job: Job, random: np.random.Generator) -> None:
    """Kill a job when a temporary file appears among the checkpoints, or up to 20 ms later."""
    job.wait_for_step(int(random.integers(1, 5)))
    job.wait_until(lambda: not job.run.unfinished_saves(), poll_s=0.0005)
    processes = job.processes()
    job.wait_until(job.run.unfinished_saves, poll_s=0.0005)
    job.wait_seconds(random.choice([0, random.uniform(0, 0.02)]))
    job.kill(processes)


def _check_killed_run(trial: Trial, run: Run) -> int:
    """Check the folder of a killed run, and return the step that it must continue from."""
    step, last = checks.newest_step(run.folder), run.last_step()
    trial.problems += checks.check_digests(run.folder)
    logged = checks.logged_steps(run.folder)[:step]
    trial.check(logged == list(range(1, step + 1)), f"the log up to step {step} has the steps {logged}")
    trial.add_lost_steps(max(0, last - step))
    trial.check(last - step <= 2 * SAVE_EVERY, f"the checkpoint of step {step} is behind step {last}")
    return step


def kill_rank(experiment: Experiment) -> None:
    """Kill one rank: the other one exits with one line, and the same command continues the run."""
    random = experiment.random(2)
    for rank in (1, 0):
        with experiment.report.trial("kill -9 of one rank", 2) as trial:
            run = experiment.new_run("kill_rank", 2)
            job = run.start()
            job.wait_for_step(int(random.integers(3, 8)))
            job.send_signal(signal.SIGKILL, f"rank{rank}")
            trial.check_status(job.wait(), 1)
            check_no_traceback(trial, job)
            if rank == 1:  # rank 0 is the one that prints
                trial.check("another rank" in job.stderr(), f"no message of rank 0: {job.output_tail()}")
            experiment.resume(trial, run)


def restart_rank(experiment: Experiment) -> None:
    """Kill both ranks in turn under `torchrun --max-restarts`: the job restarts itself and finishes."""
    random = experiment.random(3)
    with experiment.report.trial("kill -9 of one rank, --max-restarts=3", 2) as trial:
        run = experiment.new_run("restart_rank", 2)
        job = run.start(max_restarts=3)
        for rank in range(2):
            next_step = run.last_step() + 4
            job.wait_until(lambda: run.last_step() >= next_step and job.has_rank(rank))  # noqa: B023 (called at once)
            job.wait_seconds(random.uniform(0, 0.5))
            last = run.last_step()
            job.send_signal(signal.SIGKILL, f"rank{rank}")
            job.wait_until(lambda: len(job.resumed_steps()) > rank)  # noqa: B023 (called at once)
            trial.add_lost_steps(max(0, last - job.resumed_steps()[-1]))
        experiment.check_finished(trial, run, job)


def kill_worker(experiment: Experiment) -> None:
    """Kill a data worker, as Linux does if memory is short."""
    with experiment.report.trial("kill -9 of a data worker") as trial:
        run = experiment.new_run("kill_worker")
        job = run.start("--data.workers=2")
        job.wait_for_step(4)
        job.rank(0).children()[0].kill()
        trial.check_status(job.wait(), 1)
        check_no_traceback(trial, job)
        experiment.resume(trial, run)


# --- Signals ------------------------------------------------------------------------------------------------


def stop(
    experiment: Experiment, signum: signal.Signals, target: str = "main", ranks: int = 1, trials: int = 3
) -> None:
    """Send SIGTERM or SIGINT: the step is finished and saved, and all ranks exit with 128 + the signal."""
    random = experiment.random(10, signum, ranks)
    recipient = {"group": "the whole group", "rank1": "one rank"}.get(target, "torchrun" if ranks > 1 else "")
    fault = f"{signum.name} to {recipient}" if recipient else signum.name
    for number in range(trials):
        with experiment.report.trial(fault, ranks) as trial:
            run = experiment.new_run(signum.name, ranks)
            job = run.start(*(["--data.workers=2"] if number == 2 else []))
            job.wait_for_step(int(random.integers(2, EPOCHS * STEPS_PER_EPOCH - 2)))
            job.wait_seconds(random.uniform(0, 0.2))
            job.send_signal(signum, target)
            trial.check_status(job.wait(), *((128 + signum,) if ranks == 1 else (1, 128 + signum)))
            if ranks == 1:
                check_one_line(trial, job, signum.name)
            check_no_traceback(trial, job)
            step = checks.newest_step(run.folder)
            trial.check(step == run.last_step(), f"saved after {step}, but step {run.last_step()} was done")
            experiment.resume(trial, run)


def stop_at_start(experiment: Experiment) -> None:
    """Send SIGTERM at moments of the start, before or after train.py handles it: nothing is lost."""
    random, count = experiment.random(11), 4
    run = experiment.interrupted_run("stop_at_start")
    for number in range(count):
        with experiment.report.trial("SIGTERM while starting") as trial:
            before = checks.folder_digests(run.folder)
            job = run.start()
            deadline_s = random.uniform(0, 7)
            job.wait_until(lambda: job.steps() or job.age() > deadline_s)  # noqa: B023 (called at once)
            job.send_signal(signal.SIGTERM)
            trial.check_status(job.wait(), 143, *(() if job.steps() else (-signal.SIGTERM,)))
            check_no_traceback(trial, job)
            if job.wait() < 0:
                trial.check(checks.folder_digests(run.folder) == before, "the checkpoints changed")
            if number == count - 1:
                experiment.resume(trial, run)


def interrupt_twice(experiment: Experiment) -> None:
    """Send SIGINT twice: the process exits at once, without or with the save of the first one."""
    random = experiment.random(12)
    for _ in range(3):
        with experiment.report.trial("SIGINT twice") as trial:
            run = experiment.interrupted_run("interrupt_twice")
            job = run.start()
            job.wait_for_step(1)
            job.send_signal(signal.SIGINT, "group")
            job.wait_seconds(random.uniform(0.01, 0.05))
            job.send_signal(signal.SIGINT, "group")
            trial.check_status(job.wait(timeout_s=20), 130)
            check_no_traceback(trial, job)
            trial.check(re.search("saved|without saving", job.stderr()), f"no message: {job.output_tail()}")
            experiment.resume(trial, run)


def save_on_demand(experiment: Experiment, ranks: int = 1) -> None:
    """Send SIGUSR1: a checkpoint of that step appears, and the run continues undisturbed."""
    with experiment.report.trial("SIGUSR1", ranks) as trial:
        run = experiment.new_run("usr1", ranks)
        job = run.start("--save_every=null")
        step = int(experiment.random(13, ranks).integers(2, STEPS_PER_EPOCH - 4))
        job.wait_for_step(step)
        job.send_signal(signal.SIGUSR1, "rank0")
        steps = range(step, min(step + 5, STEPS_PER_EPOCH))  # the end of the epoch is saved anyway
        files = [run.folder / "checkpoints" / f"step_{number:08}.pt" for number in steps]
        trial.check(job.wait_until(lambda: any(file.exists() for file in files)), "no checkpoint appeared")
        experiment.check_finished(trial, run, job)


# --- Folders and disks --------------------------------------------------------------------------------------


def fill_disk(experiment: Experiment, is_freed: bool) -> None:
    """Fill the disk of a run, a small tmpfs; free it after the first warning, or after the run has failed."""
    with _tmpfs(experiment.folder / "disk") as disk:
        if disk is None:
            experiment.report.skipped["full disk"] = "mounting is not allowed"
            return
        with experiment.report.trial("full disk, then freed" if is_freed else "full disk") as trial:
            run = experiment.interrupted_run("full_disk")
            shutil.move(run.folder, disk / "run")
            run = replace(run, folder=disk / "run")
            _fail_storage(experiment, trial, run, partial(_fill, disk / "filler"), is_freed)


def rename_folder(experiment: Experiment, is_restored: bool) -> None:
    """Rename a run folder during the run, and back after the first warning, or after the run has failed."""
    fault = "vanished folder, then restored" if is_restored else "vanished folder"
    with experiment.report.trial(fault) as trial:
        run = experiment.interrupted_run("vanished")
        _fail_storage(experiment, trial, run, partial(_rename, run.folder), is_restored)


def _fail_storage(
    experiment: Experiment,
    trial: Trial,
    run: Run,
    inject: Callable[[], Callable[[], None]],
    is_restored: bool,
) -> None:
    """Resume a run, and make its storage fail after a step; `inject` returns the function that restores it.

    Restored after the first warning, the run ends as if undisturbed. Otherwise it exits with status 1 and one
    line, the checkpoints are unchanged, and it continues from them later.
    """
    before = checks.folder_digests(run.folder)
    # No checkpoint is written before the fault, or in the middle of it: the next is that of the epoch's end.
    job = run.start("--loggers=tensorboard", "--save_every=null")
    job.wait_for_step(1)
    restore = inject()
    try:
        has_warned = job.wait_until(lambda: "cannot be written" in job.stdout())
        trial.check(has_warned, f"no warning: {job.output_tail()}")
        if is_restored:
            restore()
            experiment.check_finished(trial, run, job)
            return
        trial.check_status(job.wait(), 1)
    finally:
        restore()
    check_one_line(trial, job, "error: ", "cannot be written")
    trial.check(checks.folder_digests(run.folder) == before, "the checkpoints changed")
    experiment.resume(trial, run)


def _fill(path: Path) -> Callable[[], None]:
    """Fill the disk of `path` to the last byte."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    return lambda: path.unlink(missing_ok=True)


def _rename(folder: Path) -> Callable[[], None]:
    """Rename a folder."""
    renamed = folder.rename(folder.with_name(f"{folder.name}.renamed"))

    def restore() -> None:
        if renamed.exists():
            renamed.rename(folder)

    return restore


@contextmanager
def _tmpfs(folder: Path) -> Iterator[Path | None]:
    """Mount a small file system in memory; None if this user may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0  # noqa: S603
    try:
        yield folder if is_mounted else None
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # noqa: S603, S607


# --- Several ranks ------------------------------------------------------------------------------------------


def suspend_rank(experiment: Experiment) -> None:
    """Suspend rank 1 in a step: rank 0 prints where it waits, and the run then continues undisturbed."""
    with experiment.report.trial("hanging rank", 2) as trial:
        run = experiment.new_run("suspend_rank", 2)
        job = run.start(f"--hang_timeout={HANG_TIMEOUT_S}")
        job.wait_for_step(5)
        job.send_signal(signal.SIGSTOP, "rank1")
        message = rf"\[rank 0\] no progress for {HANG_TIMEOUT_S} s .*, at \S+:\d+"
        has_message = job.wait_until(lambda: re.search(message, job.stderr()), timeout_s=30)
        job.send_signal(signal.SIGCONT, "rank1")
        trial.check(has_message, f"no message of rank 0: {job.output_tail()}")
        experiment.check_finished(trial, run, job)


SCENARIOS: dict[str, Callable[[Experiment], None]] = {
    "kill": kill,
    "kill-float16": partial(kill, is_float16=True),
    "kill-worker": kill_worker,
    "sigterm": partial(stop, signum=signal.SIGTERM),
    "sigterm-group": partial(stop, signum=signal.SIGTERM, target="group"),
    "sigterm-start": stop_at_start,
    "sigint": partial(stop, signum=signal.SIGINT, target="group"),
    "sigint-twice": interrupt_twice,
    "sigusr1": save_on_demand,
    "full-disk-freed": partial(fill_disk, is_freed=True),
    "full-disk": partial(fill_disk, is_freed=False),
    "folder-restored": partial(rename_folder, is_restored=True),
    "folder-vanished": partial(rename_folder, is_restored=False),
    "kill-2-ranks": partial(kill, ranks=2),
    "kill-rank": kill_rank,
    "restart-rank": restart_rank,
    "sigterm-rank": partial(stop, signum=signal.SIGTERM, target="rank1", ranks=2, trials=1),
    "sigterm-torchrun": partial(stop, signum=signal.SIGTERM, ranks=2, trials=1),
    "sigusr1-2-ranks": partial(save_on_demand, ranks=2),
    "hang": suspend_rank,
}
