"""kill -9: at random moments, inside saves, of a whole group, of one rank, of a process that loads images."""

from __future__ import annotations

import io
import math
import os
import signal
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tools.torturing import evidence
from tools.torturing.lives import Life, Run
from tools.torturing.stage import EPOCHS, SAVE_EVERY, STEPS_PER_EPOCH, Stage, check_end, check_words, go_on
from tools.torturing.table import Row, Trial

INSIDE = 0.2
"""The least share of kills that must have been inside a save."""

FLOAT16 = ("--precision=float16",)


def kill(stage: Stage, ranks: int) -> list[Row]:
    """The run that the tool is named for, with as many kills as asked for."""
    return kill_often(stage, ranks, stage.kills)


def kill_variant(stage: Stage, name: str) -> list[Row]:
    """A tenth of the kills for float16 with its scaling of losses, and for images in a zip archive, which
    two processes of their own load, and with TensorBoard."""
    words: Sequence[str] = FLOAT16
    if name == "zip":
        words = zipped_digits(stage.folder / "zip")
    return kill_often(stage, 1, max(4, stage.kills // 10), name, words)


def kill_often(stage: Stage, ranks: int, kills: int, name: str = "", words: Sequence[str] = ()) -> list[Row]:
    """One run, killed so often, and then left to finish; a row for the kills inside a save, one for others.

    A kill counts as inside a save where it left a temporary file behind. Where too few did, more are tried.
    """
    epochs = max(EPOCHS, math.ceil(7 * kills / STEPS_PER_EPOCH))
    run = stage.run(f"kill_{name or ranks}", ranks, words, epochs)
    draws = stage.random(1, ranks, len(name))
    title = "kill -9" + (" of all ranks" if ranks > 1 else "")
    variant = f", {name}" if name else ""
    rows = {False: Row(f"{title}{variant}", ranks), True: Row(f"{title} in a save{variant}", ranks)}
    before, start_up, fewest = 0, 8.0, math.ceil(INSIDE * kills)
    for count in range(2 * kills + 4):
        missing = fewest - len(rows[True].trials)
        if count >= kills and missing <= 0:
            break
        in_save = missing >= kills - count or draws.random() < 1.5 * INSIDE
        left = run.unfinished()
        life = run.start()
        if in_save:
            strike_in_save(life, draws)
        else:
            strike(life, draws, start_up, most=7 if kills > 2 else 2)
        if life.steps():
            start_up = time.monotonic() - life.began
        life.kill()
        with rows[bool(run.unfinished() - left)].trial() as trial:
            trial.expect_status(life.statuses(), *[-9] * ranks)
            check_words(trial, life)
            trial.expect(life.continued() in (0, before), f"continued from {life.first}, not {before}")
            before = check_folder(trial, run)
        if trial.problems:
            break
    tried = [row for row in rows.values() if row.trials]
    with tried[-1].last_trial(", the end") as trial:
        last = run.finish()
        trial.expect(last.continued() == before, f"continued from {last.first}, not {before}")
        check_end(trial, run, last, stage, epochs)
        if "--tensorboard=true" in words:
            trial.judge(evidence.check_tensorboard(run.folder, epochs * STEPS_PER_EPOCH))
        inside = len(rows[True].trials)
        trial.expect(inside >= fewest, f"only {inside} of {kills} kills were inside a save")
    for row in tried:
        row.trials[-1].identical = trial.identical
    return tried


def strike(life: Life, draws: np.random.Generator, start_up: float, most: int) -> None:
    """Waits for a moment of the start, or for `most` steps at most and then for part of a second."""
    if draws.random() < 0.15:
        seconds = draws.uniform(0, start_up)
        life.until(lambda: time.monotonic() - life.began > seconds)
        return
    life.until_step(int(draws.integers(1, most + 1)))
    until = time.monotonic() + draws.uniform(0, 0.08 * most)
    life.until(lambda: time.monotonic() > until)


def strike_in_save(life: Life, draws: np.random.Generator) -> None:
    """Waits for a temporary file among the checkpoints, and half of the time for some milliseconds more."""
    life.until_step(int(draws.integers(1, 5)))
    life.until(lambda: not life.run.temporary_files(), poll=0.0005)
    life.aim()
    life.until(life.run.temporary_files, poll=0.0005)
    until = time.monotonic() + draws.choice([0, draws.uniform(0, 0.02)])
    life.until(lambda: time.monotonic() > until, poll=0.0005)


def check_folder(trial: Trial, run: Run) -> int:
    """What must hold of a folder after any kill; the step that the run goes on from."""
    step, problems = evidence.chosen(run.folder)
    trial.problems += problems
    trial.problems += evidence.check_files(run.folder)
    trial.problems += evidence.check_steps(run.folder, step, up_to=step)
    trial.lose(max(0, run.last_step() - step))
    trial.expect(run.last_step() - step <= 2 * SAVE_EVERY, f"step {run.last_step()} goes back to {step}")
    return step


def dead_rank(stage: Stage) -> list[Row]:
    """kill -9 of one rank: the other ends with a line, and the same command goes on."""
    row = Row("kill -9 of one rank", 2)
    draws = stage.random(2)
    for number in range(stage.times(2)):
        with row.trial() as trial:
            run = stage.run("dead_rank", 2)
            life = run.start()
            life.until_step(int(draws.integers(3, 8)))
            victim = life.rank(1 - number)
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
            trial.expect_status(life.end(), *([1, -9] if run.forked else [1]))
            check_words(trial, life)
            if number == 0:  # the other one is local rank 0, which speaks
                trial.expect("another rank is gone" in life.complaints(), f"no word of it: {life.tail()}")
            go_on(trial, run, stage)
    return [row]


def restarts(stage: Stage) -> list[Row]:
    """kill -9 of one rank under torchrun --max-restarts: the job restarts by itself, to the same end."""
    row = Row("kill -9 of one rank, --max-restarts=3", 2)
    draws = stage.random(3)
    with row.trial() as trial:
        run = stage.run("restarts", 2)
        life = run.start(restarts=3)
        for number in range(2):
            seen = run.last_step()
            life.until(lambda: run.last_step() >= seen + 4 and life.rank(number) is not None)  # noqa: B023
            seconds = time.monotonic() + draws.uniform(0, 0.5)
            life.until(lambda: time.monotonic() > seconds)  # noqa: B023
            victim = life.rank(number)
            before = run.last_step()
            if victim is not None:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            life.until(lambda: life.said().count(" after step ") > number)  # noqa: B023
            continued = int(life.said().split(" after step ")[-1].partition(",")[0])
            trial.lose(max(0, before - continued))
        trial.expect_status(life.end(), 0)
        check_end(trial, run, life, stage)
    return [row]


def dead_worker(stage: Stage) -> list[Row]:
    """kill -9 of a process that loads images, as a system that is short of memory does."""
    row = Row("kill -9 of a data worker", 1)
    with row.trial() as trial:
        run = stage.run("dead_worker")
        life = run.start("--data.workers=2")
        life.until_step(4)
        workers = life.workers()
        trial.expect(workers, "no workers were found")
        for worker in workers[:1]:
            os.kill(worker, signal.SIGKILL)
        trial.expect_status(life.end(), 1)
        check_words(trial, life)
        go_on(trial, run, stage)
    return [row]


def zipped_digits(folder: Path) -> tuple[str, ...]:
    """Writes the digits into zip archives with maps; the options that train on them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(exist_ok=True)
    for split, numbers in (("train", range(144)), ("val", range(144, 244))):
        lines = []
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for number in numbers:
                picture = Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).resize((32, 32))
                content = io.BytesIO()
                picture.convert("RGB").save(content, "PNG")
                name = f"{digits.target[number]}/{number}.png"
                archive.writestr(name, content.getvalue())
                lines.append(f"{split}.zip@/{name}\t{digits.target[number]}\n")
        (folder / f"{split}_map.txt").write_text("".join(lines), encoding="utf-8")
    return (
        "--data.source=zip", f"--data.root={folder}", "--data.train_fraction=1", "--data.workers=2",
        "--tensorboard=true",
    )  # fmt: skip
