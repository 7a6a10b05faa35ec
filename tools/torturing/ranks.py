"""What one rank of two can do to the other, and another number of ranks."""

from __future__ import annotations

import re
import signal

from tools.torturing import evidence
from tools.torturing.driver import Trouble
from tools.torturing.stage import (
    SAME_ON_ANY_RANKS,
    Stage,
    check_end,
    check_one_line,
    check_words,
    steps,
)
from tools.torturing.table import Row

NEVER = 10**9


def nan_on_one_rank(stage: Stage) -> list[Row]:
    """The images of rank 1 are NaN in one step: it is skipped on both ranks, and counted."""
    row = Row("NaN on one rank", 2)
    with row.trial() as trial:
        run = stage.run("nan", 2)
        life = run.finish(trouble=Trouble("nan", rank=1, first=7, last=7))
        trial.expect_status(life.statuses(), 0)
        check_words(trial, life)
        trial.problems += evidence.check_steps(run.folder, steps())
        skipped = {
            r["step"]: r["skipped_steps"] for r in evidence.records(run.folder)[0] if r["kind"] == "train"
        }
        expected = {step: int(step >= 7) for step in range(1, steps() + 1)}
        trial.expect(skipped == expected, f"skipped steps are counted as {skipped}")
        weights = dict(re.findall(r"\[rank (\d)\] weights (\w+)", life.complaints()))
        trial.expect(len(weights) == 2, f"the ranks did not tell of their weights: {life.tail()}")
        trial.expect(len(set(weights.values())) == 1, "the ranks have other weights")
    return [row]


def nan_for_ever(stage: Stage) -> list[Row]:
    """NaN without end: status 1, and a line with step, learning rate and the last good checkpoint."""
    row = Row("NaN for ever", 1)
    with row.trial() as trial:
        run = stage.half("nan_for_ever")
        first = evidence.chosen(run.folder)[0] + 1
        life = run.finish(
            "--max_skipped_steps=2", "--save_every=null", trouble=Trouble("nan", 0, first, NEVER)
        )
        trial.expect_status(life.statuses(), 1)
        path = run.folder / f"checkpoints/step_{first - 1:08}.pt"
        check_one_line(trial, life, f"error: step {first + 2}:", "at learning rate", f"checkpoint is {path}")
        trial.problems += evidence.check_files(run.folder)
        trial.lose(run.last_step() - first + 1)
        check_end(trial, run, run.start(), stage)
    return [row]


def hang(stage: Stage) -> list[Row]:
    """Rank 1 sleeps in a step: both ranks say where they wait, and the run then goes on undisturbed."""
    row = Row("hanging rank", 2)
    with row.trial() as trial:
        run = stage.run("hang", 2)
        life = run.finish("--hang_timeout=3", trouble=Trouble("hang", 1, first=6, last=6, seconds=10))
        words = life.complaints()
        for rank in range(2):
            said = re.search(
                rf"\[rank {rank}\] no progress for 3 s while computing step 6, at \S+:\d+", words
            )
            trial.expect(said, f"rank {rank} did not say where it hangs: {life.tail()}")
        check_end(trial, run, life, stage)
    return [row]


def other_number(stage: Stage) -> list[Row]:
    """One rank, then two, then one again: nothing is drawn per rank, and losses agree within 1e-4."""
    row = Row("ranks 1 → 2 → 1", 2)
    with row.trial() as trial:
        run = stage.run("other_number", 1, SAME_ON_ANY_RANKS)
        for ranks in (1, 2):
            life = run.start(ranks=ranks)
            life.until_step(4)
            pid = life.rank(0)
            trial.expect(pid is not None, "rank 0 was not found")
            life.tell(signal.SIGTERM)
            trial.expect_status(life.end(), *([143] if ranks == 1 or run.forked else [1, 143]))
            trial.expect("saved after step" in life.complaints(), f"not saved: {life.tail()}")
        trial.expect_status(run.finish().statuses(), 0)
        trial.problems += evidence.check_steps(run.folder, steps())
        own, others = (
            [r["loss"] for r in evidence.records(folder)[0] if r["kind"] == "train"]
            for folder in (run.folder, stage.reference(run))
        )
        most = max((abs(mine - other) for mine, other in zip(own, others)), default=float("inf"))
        row.note = f"losses within {most:.1e}"
        trial.expect(len(own) == len(others) and most < 1e-4, f"the losses differ by {most:.1e}")
    return [row]
