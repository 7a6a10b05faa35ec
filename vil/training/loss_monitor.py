"""Losses of the steps, collected on the device: skipped steps in a row, and loss spikes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from vil.config import Tree
from vil.runtime.distributed import all_reduce_sum

HISTORY_SIZE = 100
"""Number of losses that a new one is compared with."""
MIN_HISTORY = 20
"""With fewer losses, none is called a spike."""
_MAX_PENDING_STEPS = 1024  # steps between two reports, at most


@dataclass(frozen=True)
class LossSpike:
    """The loss of a global batch far above the mean of those before; `step` is counted from 1."""

    step: int
    loss: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class StepReport:
    """The steps since the last report.

    Attributes:
        losses: of the global batches, in order; NaN or infinite for some of the skipped steps.
        skipped_steps: number of skipped steps of the whole run.
        failed_step: the first step that exceeds the allowed number of skipped steps in a row; None if none.
        spikes: loss spikes.
    """

    losses: list[float]
    skipped_steps: int
    failed_step: int | None
    spikes: list[LossSpike]


class LossMonitor:
    """Collect the loss of each step on the device, and read them together.

    Args:
        device: of the losses.
        world_size: number of ranks.
        max_skipped_steps: allowed number of skipped steps in a row.
        spike_threshold: standard deviations above the mean from which on a loss is a spike; None is off.
    """

    def __init__(
        self, device: torch.device, world_size: int, max_skipped_steps: int, spike_threshold: float | None
    ) -> None:
        self._world_size, self._max_skipped_steps = world_size, max_skipped_steps
        self._spike_threshold = spike_threshold
        self._steps = torch.zeros(_MAX_PENDING_STEPS, 2, device=device)  # loss on this rank, 1 unless skipped
        self._count, self._first_step = 0, 1
        self._skipped, self._skipped_in_a_row, self._history = 0, 0, list[float]()

    def state_dict(self) -> Tree:
        """Return the state for a checkpoint; call `report` before."""
        assert self._count == 0
        return {
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "losses": list(self._history),
        }

    def load_state_dict(self, state: Tree) -> None:
        """Continue from the state that `state_dict` returned."""
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._history = list(state["losses"])

    def add(self, step: int, loss: torch.Tensor, is_finite: torch.Tensor) -> bool:
        """Store a step without waiting for the device; return True if `report` must be called now.

        Args:
            step: finished steps, this one included.
            loss: of the images of this rank, a scalar.
            is_finite: False for a skipped step, a scalar.
        """
        if self._count == 0:
            self._first_step = step
        index = (step - 1) % _MAX_PENDING_STEPS  # the order in which the ranks are summed depends on it
        self._steps[index, 0] = loss
        self._steps[index, 1] = is_finite
        self._count += 1
        return self._count == _MAX_PENDING_STEPS

    def report(self) -> StepReport:
        """Read the steps since the last report from all ranks; every rank calls this after the same step."""
        mean_losses = all_reduce_sum(self._steps[:, 0].clone()) / self._world_size  # (capacity,)
        first = self._first_step - 1
        indices = torch.arange(first, first + self._count, device=mean_losses.device) % _MAX_PENDING_STEPS
        rows = torch.stack([mean_losses, self._steps[:, 1]], dim=1)[indices]  # (count, 2)
        self._count = 0
        losses, spikes, failed_step = [], [], None
        for step, (loss, is_finite) in enumerate(rows.tolist(), self._first_step):
            losses.append(loss)
            if not is_finite:
                self._skipped += 1
                self._skipped_in_a_row += 1
                if self._skipped_in_a_row > self._max_skipped_steps and failed_step is None:
                    failed_step = step
                continue
            self._skipped_in_a_row = 0
            spike = self._find_spike(step, loss)
            if spike is not None:
                spikes.append(spike)
            self._history = [*self._history[1 - HISTORY_SIZE :], loss]
        return StepReport(losses, self._skipped, failed_step, spikes)

    def _find_spike(self, step: int, loss: float) -> LossSpike | None:
        if self._spike_threshold is None or len(self._history) < MIN_HISTORY:
            return None
        mean, deviation = statistics.fmean(self._history), statistics.pstdev(self._history)
        if loss <= mean + self._spike_threshold * deviation:
            return None
        return LossSpike(step, loss, mean, deviation)
