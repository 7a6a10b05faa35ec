"""Signals that ask: SIGTERM, SIGINT once and twice, SIGUSR1; and two runs in a folder."""

from __future__ import annotations

import os
import signal
import time

from tools.torturing import evidence
from tools.torturing.driver import Trouble
from tools.torturing.lives import Run
from tools.torturing.stage import (
    STEPS_PER_EPOCH,
    Stage,
    check_end,
    check_one_line,
    check_words,
    go_on,
    steps,
)
from tools.torturing.table import Row


def end_by(stage: Stage, signum: signal.Signals, everyone: bool) -> list[Row]:
    """SIGTERM, or SIGINT as a terminal sends it: the step is finished and saved, the status is 143 or 130."""
    row = Row(signum.name + (" to the whole group" if everyone else ""), 1)
    draws = stage.random(10, signum)
    for number in range(stage.times(3)):
        with row.trial() as trial:
            run = stage.run(signum.name)
            life = run.start(*(["--data.workers=2"] if number == 2 else []))
            life.until_step(int(draws.integers(2, steps() - 2)))
            until = time.monotonic() + draws.uniform(0, 0.2)
            life.until(lambda: time.monotonic() > until)  # noqa: B023
            life.tell(signum, everyone)
            trial.expect_status(life.end(), 128 + signum)
            check_one_line(trial, life, signum.name, "saved after step")
            step, _ = evidence.chosen(run.folder)
            trial.expect(step == run.last_step(), f"saved after {step}, but step {run.last_step()} was done")
            go_on(trial, run, stage)
    return [row]


def end_while_starting(stage: Stage) -> list[Row]:
    """SIGTERM at moments of the start, before or after train.py heeds it: nothing is lost either way."""
    row = Row("SIGTERM while starting", 1)
    draws = stage.random(11)
    run = stage.half("starting")
    before = evidence.listing(run.folder)
    for _ in range(stage.times(4)):
        with row.trial() as trial:
            life = run.start()
            seconds = draws.uniform(0, 7)
            life.until(lambda: life.steps() or time.monotonic() - life.began > seconds)  # noqa: B023
            had_steps = life.steps() > 0
            life.tell(signal.SIGTERM)
            trial.expect_status(life.end(), 143, *([] if had_steps else [-signal.SIGTERM]))
            check_words(trial, life)
            if not had_steps and life.statuses() == (-signal.SIGTERM,):
                trial.expect(evidence.listing(run.folder) == before, "the checkpoints changed")
            before = evidence.listing(run.folder)
    with row.last_trial(", the end") as trial:
        go_on(trial, run, stage)
    return [row]


def interrupt_twice(stage: Stage) -> list[Row]:
    """A second SIGINT: the process ends at once, in a step that would never end as in any other."""
    row = Row("SIGINT twice", 1)
    draws = stage.random(12)
    for number in range(stage.times(3)):
        with row.trial() as trial:
            run = stage.half("twice")
            step = evidence.chosen(run.folder)[0] + 2
            is_endless = number == 0
            life = run.start(trouble=Trouble("hang", 0, step, step, 3600) if is_endless else None)
            life.until_step(1)
            life.tell(signal.SIGINT, everyone=True)
            until = time.monotonic() + draws.uniform(0.01, 0.05)
            life.until(lambda: time.monotonic() > until)  # noqa: B023
            life.tell(signal.SIGINT, everyone=True)
            trial.expect_status(life.end(20), 130)
            check_words(trial, life)
            words = life.complaints()
            is_said = "not saved" in words or (not is_endless and "saved after step" in words)
            trial.expect(is_said, f"no word of it: {life.tail()}")
            go_on(trial, run, stage)
    return [row]


def end_ranks(stage: Stage) -> list[Row]:
    """SIGTERM to one of two ranks, and to torchrun: both stop after the same step."""
    rows = []
    for title in ("SIGTERM to one rank", "SIGTERM to torchrun")[: 1 if stage.short else 2]:
        row = Row(title, 2)
        with row.trial() as trial:
            run = stage.run("end_ranks", 2)
            life = run.start()
            life.until_step(5)
            if title.endswith("rank"):
                victim = life.rank(1)
                trial.expect(victim is not None, "rank 1 was not found")
                if victim is not None:
                    os.kill(victim, signal.SIGTERM)
            else:
                life.tell(signal.SIGTERM)
            trial.expect_status(life.end(), *([143] if run.forked else [1, 143]))
            check_words(trial, life)
            trial.expect("saved after step" in life.complaints(), f"not saved: {life.tail()}")
            go_on(trial, run, stage)
        rows.append(row)
    return rows


def save_on_demand(stage: Stage, ranks: int) -> list[Row]:
    """SIGUSR1: a checkpoint of that step appears, and the run goes on undisturbed."""
    row = Row("SIGUSR1", ranks)
    draws = stage.random(13, ranks)
    with row.trial() as trial:
        run = stage.run("usr1", ranks)
        life = run.start("--save_every=null")
        asked = int(draws.integers(2, STEPS_PER_EPOCH - 4))
        life.until_step(asked)
        pid = life.rank(0)
        trial.expect(pid is not None, "rank 0 was not found")
        if pid is not None:
            os.kill(pid, signal.SIGUSR1)
        allowed = [run.folder / "checkpoints" / f"step_{step:08}.pt" for step in range(asked, asked + 5)]
        allowed = allowed[: STEPS_PER_EPOCH - asked]  # the end of the epoch is saved anyway
        appeared = life.until(lambda: any(path.exists() for path in allowed))
        trial.expect(appeared, "no checkpoint appeared")
        check_end(trial, run, life, stage)
    return [row]


def two_runs(stage: Stage) -> list[Row]:
    """A second run in the folder of one that works there, and that SIGSTOP halts meanwhile."""
    row = Row("two runs in one folder", 1)
    with row.trial() as trial:
        run = stage.run("two_runs")
        first = run.start()
        first.until_step(3)
        first.tell(signal.SIGSTOP)
        second = Run(run.folder, run.words, run.logs, forked=run.forked, lives=[first]).finish()
        first.tell(signal.SIGCONT)
        trial.expect_status(second.statuses(), 2)
        check_one_line(trial, second, "error: ", "is in use", f"process {first.processes[0].pid} on")
        check_end(trial, run, first, stage)
    return [row]
