"""The position of a run between its first and its last step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vil.checkpoints.training_state import is_stopped_early
from vil.config import Tree
from vil.runtime.epoch_steps import EpochSteps


@dataclass(frozen=True)
class RunPosition:
    """Count finished steps and epochs. An epoch is finished when it is trained, and evaluated if that is due.

    Attributes:
        epoch_steps: optimizer steps of each epoch.
        last_step: number of steps of the whole run.
        step: finished optimizer steps.
        finished_step: value of `step` when an epoch was last finished.
        best: `top1` in percent, `weights` (raw or ema), `epoch` and, if it is chosen by another metric than
            top1, its `value`, of the best evaluation; None before any.
        evaluations_since_best: evaluations after the best one, without one that `max_steps` alone causes.
        eval_every: epochs between two evaluations.
        patience: evaluations without a better one after which the run ends; None for no limit.
    """

    epoch_steps: EpochSteps
    last_step: int
    step: int = 0
    finished_step: int = 0
    best: Tree | None = None
    evaluations_since_best: int = 0
    eval_every: int = 1
    patience: int | None = None

    @property
    def epoch(self) -> int:
        """Index of the epoch of the next step, from 0."""
        return self.epoch_steps.locate(self.step)[0]

    @property
    def epoch_step(self) -> int:
        """Finished steps of this epoch."""
        return self.epoch_steps.locate(self.step)[1]

    @property
    def epoch_number(self) -> int:
        """Number of the epoch of the last step, from 1."""
        return self.epoch_steps.locate(self.step - 1)[0] + 1 if self.step else 0

    @property
    def is_epoch_trained(self) -> bool:
        """True if all steps of an epoch are trained and the epoch is not finished."""
        is_last = self.epoch_step == 0 or self.step >= self.last_step
        return is_last and self.step > self.finished_step

    @property
    def is_finished(self) -> bool:
        """True if no epoch remains."""
        return self.finished_step >= self.last_step or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        """True if the last `patience` evaluations were not better than an earlier one."""
        return is_stopped_early(self.evaluations_since_best, self.patience)

    @property
    def needs_final_evaluation(self) -> bool:
        """True for a finished run without any evaluation: max_steps now ends it at a step that had none."""
        return self.is_finished and self.best is None

    @property
    def is_evaluated(self) -> bool:
        """True if no evaluation after the last step remains."""
        return self.step == self.finished_step and not self.needs_final_evaluation

    def after_step(self) -> RunPosition:
        """Return the position after one more step."""
        return replace(self, step=self.step + 1)

    def after_epoch(self, best: Tree | None = None) -> RunPosition:
        """Return the position after the epoch is finished, with `best` as its best evaluation, if evaluated.

        The count of evaluations since the best one leaves out a last evaluation between two due ones, so that
        a run whose `max_steps` is raised ends at the same epoch as one that was never cut short.
        """
        best, evaluations = best or self.best, self.evaluations_since_best
        is_due = self.epoch_step == 0 and self.epoch % self.eval_every == 0
        if best is not None and best != self.best:
            evaluations = 0
        elif best is not None and is_due and self.epoch > best["epoch"]:
            evaluations += 1
        return replace(self, finished_step=self.step, best=best, evaluations_since_best=evaluations)
