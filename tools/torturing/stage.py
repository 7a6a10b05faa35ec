"""Where the faults happen: the folder, the run that they happen to, and the same run undisturbed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tools.torturing import evidence
from tools.torturing.lives import ROOT, Life, Run
from tools.torturing.table import Trial

STEPS_PER_EPOCH, SAVE_EVERY = 9, 3
EPOCHS = 2

_CONFIG = """\
# The digits with everything that draws at random; small, for the faults are many.
model: {neighbors: random, drop_path: 0.2, dropout: 0.1}
schedule:
  batch_size: 16
  accumulation: 2
  warmup_epochs: 1
  ema_decay: 0.9
  clip_grad: 1.0
  augment: {mixup: 0.8, cutmix: 1.0, random_erasing: 0.25}
data: {workers: 0, train_fraction: 0.1}
log_every: 1
save_every: 3
device: cpu
precision: float32
tensorboard: false
progress: false
"""

_SMALLER = (
    "--model.stages=[{dim: 24, heads: 2, blocks: 1, patch: 8, window: 2}, "
    "{dim: 48, heads: 2, blocks: 1, patch: 2, attention: full, global_tokens: 0}]",
)
"""Options of the short version, which is about the faults and not about the model."""

SAME_ON_ANY_RANKS = (
    "--model.neighbors=all", "--model.drop_path=0", "--model.dropout=0",
    "--schedule.augment.mixup=0", "--schedule.augment.cutmix=0",
)  # fmt: skip
"""Options without which nothing is drawn per rank."""


class Stage:
    """Makes runs, each in a folder of its own.

    Args:
        folder: for all of them; exists.
        seed: of all moments that are drawn.
        short: a few trials, in forks of this process.
        kills: how often to kill -9 a run.
    """

    def __init__(self, folder: Path, seed: int, short: bool, kills: int) -> None:
        self.folder, self.seed, self.short, self.kills = folder, seed, short, kills
        self._references: dict[tuple[int, tuple[str, ...]], Run] = {}
        self._halves: dict[int, Run] = {}
        self._count = 0
        (folder / "config.yaml").write_text(_CONFIG, encoding="utf-8")

    def times(self, full: int) -> int:
        """How often to try a fault: once in the short version."""
        return 1 if self.short else full

    def random(self, *keys: int) -> np.random.Generator:
        """Draws of their own for a place named by numbers."""
        return np.random.default_rng(np.random.SeedSequence((self.seed, *keys)))

    def run(self, name: str, ranks: int = 1, words: Sequence[str] = (), epochs: int = EPOCHS) -> Run:
        """A new run, not yet started."""
        self._count += 1
        folder = self.folder / f"{self._count:03}_{name}"
        configs = ROOT / "configs"
        line = [
            f"--model={configs / 'models/vil_32.yaml'}",
            f"--schedule={configs / 'schedules/digits.yaml'}",
        ]
        line += [f"--data={configs / 'data/digits.yaml'}", f"--config={self.folder / 'config.yaml'}"]
        line += [f"--schedule.epochs={epochs}", *(_SMALLER if self.short else ()), *words]
        return Run(folder, tuple(line), self.logs(folder), ranks, self.short)

    def logs(self, folder: Path) -> Path:
        """Where the processes of the run in `folder` say what they say."""
        return self.folder / "logs" / folder.name

    def reference(self, run: Run) -> Path:
        """The folder of the same run, undisturbed."""
        key = run.ranks, run.words
        if key not in self._references:
            self._count += 1
            folder = self.folder / f"{self._count:03}_undisturbed"
            twin = Run(folder, run.words, self.logs(folder), run.ranks, run.forked)
            statuses = twin.finish().statuses()
            if set(statuses) != {0}:
                raise RuntimeError(f"the undisturbed run failed, {statuses}: {twin.lives[0].tail()}")
            self._references[key] = twin
        return self._references[key].folder

    def half(self, name: str, ranks: int = 1) -> Run:
        """A copy of a run that SIGTERM ended in its second epoch."""
        if ranks not in self._halves:
            run = self.run("half", ranks)
            life = run.start()
            life.until_step(STEPS_PER_EPOCH + 1)
            life.tell(signal.SIGTERM)
            life.end()
            self._halves[ranks] = run
        source = self._halves[ranks]
        run = self.run(name, ranks)
        shutil.copytree(source.folder, run.folder)
        return run


def steps(epochs: int = EPOCHS) -> int:
    """How many steps a run has."""
    return epochs * STEPS_PER_EPOCH


def check_end(
    trial: Trial, run: Run, life: Life, stage: Stage, epochs: int = EPOCHS, allow_damaged: bool = False
) -> None:
    """What must hold of every run that a last life brought to its end."""
    trial.expect_status(life.end(), 0)
    trial.problems += evidence.check_steps(run.folder, steps(epochs))
    if not allow_damaged:
        trial.problems += evidence.check_files(run.folder)
    left = [str(p.relative_to(run.folder)) for p in run.folder.rglob("*.tmp")]
    trial.expect(not left, f"left behind: {', '.join(left)}")
    check_words(trial, life)
    trial.judge(evidence.compare(run.folder, stage.reference(run)))


def check_files_unchanged(trial: Trial, run: Run, before: dict[str, str]) -> None:
    """The checkpoints are those of `evidence.listing` before, and nothing is beside them."""
    after = evidence.listing(run.folder)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    trial.expect(not changed, f"the checkpoints changed: {', '.join(changed)}")


def check_words(trial: Trial, life: Life) -> None:
    """No rank may show a traceback, however it ended."""
    trial.expect("Traceback" not in life.complaints(), f"a traceback: {life.tail()}")


def check_one_line(trial: Trial, life: Life, *words: str) -> None:
    """Standard error is one line with all of `words`."""
    lines = life.complaints().splitlines()
    trial.expect(len(lines) == 1, f"{len(lines)} lines on standard error, not one: {life.tail()}")
    for word in words:
        trial.expect(lines and word in lines[-1], f"its last line does not say {word!r}: {life.tail()}")


def go_on(trial: Trial, run: Run, stage: Stage) -> Life:
    """Calls train.py again, which must bring the run to the end of the undisturbed one."""
    before, problems = evidence.chosen(run.folder)
    trial.problems += problems
    trial.lose(max(0, run.last_step() - before))
    life = run.finish()
    trial.expect(life.continued() == before, f"continued from {life.continued()}, not {before}")
    check_end(trial, run, life, stage)
    return life
