"""The runs into which faults are injected, and the fault-free runs that they are compared with."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np

from tools.dev.faults import checks
from tools.dev.faults.job import ROOT, Job, Run
from tools.dev.faults.report import Report, Trial

STEPS_PER_EPOCH, SAVE_EVERY, EPOCHS = 9, 3, 2

_CONFIG = f"""\
# The digits with everything that draws random numbers.
model:
  stages:
    - {{dim: 24, heads: 2, blocks: 1, patch: 8, window: 2}}
    - {{dim: 48, heads: 2, blocks: 1, patch: 2, attention: full, global_tokens: 0}}
  neighbors: random
  drop_path: 0.2
  dropout: 0.1
schedule:
  batch_size: 16
  accumulation: 2
  warmup_epochs: 1
  ema_decay: 0.9
  clip_grad: 1.0
  augment: {{mixup: 0.8, cutmix: 1.0, random_erasing: 0.25}}
data: {{workers: 0, train_fraction: 0.1}}
log_every: 1
save_every: {SAVE_EVERY}
device: cpu
precision: float32
loggers: []
progress: false
"""


class Experiment:
    """Create runs, each in its folder below the existing, empty `folder`; `kills` is that of kill -9."""

    def __init__(self, folder: Path, seed: int, kills: int) -> None:
        self.folder, self.seed, self.kills = folder, seed, kills
        self.report = Report()
        self._references: dict[tuple[int, tuple[str, ...]], Path] = {}
        self._interrupted: Path | None = None
        self._count = 0
        (folder / "config.yaml").write_text(_CONFIG, encoding="utf-8")

    def random(self, *keys: int) -> np.random.Generator:
        """Return a generator of random numbers for a scenario, which is identified by numbers."""
        return np.random.default_rng(np.random.SeedSequence((self.seed, *keys)))

    def new_run(self, name: str, ranks: int = 1, argv: tuple[str, ...] = (), epochs: int = EPOCHS) -> Run:
        """Return a run that has not been started."""
        self._count += 1
        folder, configs = self.folder / f"{self._count:03}_{name}", ROOT / "configs"
        options = (
            f"--model={configs / 'models/vil_32.yaml'}",
            f"--schedule={configs / 'schedules/digits.yaml'}",
            f"--data={configs / 'data/digits.yaml'}",
            f"--config={self.folder / 'config.yaml'}",
            f"--schedule.epochs={epochs}",
        )
        return Run(folder, (*options, *argv), self.folder / "logs" / folder.name, ranks)

    def reference(self, run: Run) -> Path:
        """Return the folder of the same run, undisturbed; train it if it does not exist yet."""
        key = run.ranks, run.argv
        if key not in self._references:
            twin = self.new_run("reference", run.ranks)
            twin.argv = run.argv
            job = twin.finish()
            if job.wait():
                raise RuntimeError(f"the fault-free run failed: {job.output_tail()}")
            self._references[key] = twin.folder
        return self._references[key]

    def interrupted_run(self, name: str) -> Run:
        """Return a copy of a run that SIGTERM ended in its second epoch."""
        if self._interrupted is None:
            run = self.new_run("interrupted")
            job = run.start()
            job.wait_for_step(STEPS_PER_EPOCH + 1)
            job.send_signal(signal.SIGTERM)
            job.wait()
            self._interrupted = run.folder
        run = self.new_run(name)
        shutil.copytree(self._interrupted, run.folder)
        return run

    def resume(self, trial: Trial, run: Run) -> None:
        """Start a run again; it must continue from the newest checkpoint and end as if undisturbed."""
        step = checks.newest_step(run.folder)
        trial.add_lost_steps(run.last_step() - step)
        job = run.finish()
        trial.check(job.resumed_step() == step, f"continued from {job.resumed_step()}, not {step}")
        self.check_finished(trial, run, job)

    def check_finished(self, trial: Trial, run: Run, job: Job) -> None:
        """Wait until the last job of a run has exited, and compare the run with the fault-free one."""
        trial.check_status(job.wait(), 0)
        trial.problems += checks.check_digests(run.folder)
        temporary = [str(path.relative_to(run.folder)) for path in run.folder.rglob("*.tmp")]
        trial.check(not temporary, f"temporary files: {', '.join(temporary)}")
        check_no_traceback(trial, job)
        trial.add_comparison(checks.compare_runs(run.folder, self.reference(run)))


def check_no_traceback(trial: Trial, job: Job) -> None:
    """Check that no rank has printed a traceback."""
    trial.check("Traceback" not in job.stderr(), f"a traceback: {job.output_tail()}")


def check_one_line(trial: Trial, job: Job, *texts: str) -> None:
    """Check that standard error is one line that contains `texts`."""
    lines = job.stderr().splitlines()
    trial.check(len(lines) == 1, f"{len(lines)} lines on standard error, not one: {job.output_tail()}")
    for text in texts:
        trial.check(text in job.stderr(), f"{text!r} is not on standard error: {job.output_tail()}")
