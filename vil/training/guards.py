"""What watches over a run: steps that are not finite, losses that leap, and steps that never end."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vil.console import say
from vil.training.distributed import all_reduce_sum

REMEMBERED = 100
"""Losses that the next one is compared with."""

FEWEST = 20
"""Losses without which no comparison is made."""

_LONGEST = 1024
"""Steps that are looked at together, at most."""


def spreading(loss: torch.Tensor) -> torch.Tensor:
    """The gradient of `loss` with respect to itself: 1, or NaN where the loss (a scalar) is not finite.

    Not every loss that is not finite has such gradients. With this one it has, and the exchange of gradients
    tells all ranks.
    """
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


class FiniteSteps:
    """Takes the steps of an optimiser whose gradients are finite, and skips the others wholly.

    PyTorch's fused optimisers skip on the device, by the tensor that a loss scaler would give them; with any
    other one, each step waits for the device, to know.

    Args:
        optimizer: the optimiser.
        model: whose running statistics (batch norm) are as they were before a skipped step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._skips_on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._keeps_state = any(group.get("momentum", 1) for group in optimizer.param_groups)
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()
        ]
        self._before: list[torch.Tensor] = []

    def begin(self) -> None:
        """A step begins, before its forward pass."""
        self._before = [buffer.clone() for buffer in self._statistics]

    def take(self, is_finite: torch.Tensor) -> None:
        """The optimiser's step, where `is_finite` (a scalar, bool, equal on all ranks)."""
        # Momentum that a skipped first step makes in a fused SGD is never written: not before a first one.
        has_begun = self._optimizer.state or not self._keeps_state
        if self._skips_on_device and has_begun:
            self._optimizer.found_inf = (~is_finite).to(torch.float32)  # type: ignore[attr-defined]
            self._optimizer.step()
        elif is_finite:
            if self._skips_on_device:
                self._optimizer.found_inf = None  # type: ignore[attr-defined]
            self._optimizer.step()
        for buffer, before in zip(self._statistics, self._before):
            buffer.copy_(torch.where(is_finite, buffer, before))


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it.

    Attributes:
        step: which made so many finished steps.
        loss: of its global batch.
        mean, deviation: of the losses before.
    """

    step: int
    loss: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Look:
    """What a look at the steps since the last one tells.

    Attributes:
        losses: of the global batches, in order; NaN or infinite for some of the skipped ones.
        skipped: steps skipped since the run began.
        too_many: the step at which more than the allowed number in a row were skipped; None as long as none.
        spikes: losses far above those before them.
    """

    losses: list[float]
    skipped: int
    too_many: int | None
    spikes: list[Spike]


class StepWatch:
    """Remembers loss and gradient of each step on the device, until they are looked at together.

    Args:
        device: of the losses.
        world_size: number of ranks.
        most_in_a_row: how many steps in a row may be skipped.
        spike: how many standard deviations above the mean a loss is a spike; None for no such watch.
    """

    def __init__(
        self, device: torch.device, world_size: int, most_in_a_row: int, spike: float | None
    ) -> None:
        self._world_size, self._most_in_a_row, self._spike = world_size, most_in_a_row, spike
        self._steps = torch.zeros(_LONGEST, 2, device=device)  # loss of this rank, whether it was taken
        self._count, self._first = 0, 1
        self._skipped, self._in_a_row, self._losses = 0, 0, list[float]()

    def state(self) -> dict[str, Any]:
        """What the next steps are judged by, for a checkpoint; only after a look."""
        assert self._count == 0
        return {"skipped": self._skipped, "skipped_in_a_row": self._in_a_row, "losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` returned."""
        self._skipped, self._in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._losses = list(state["losses"])

    def add(self, step: int, loss: torch.Tensor, is_finite: torch.Tensor) -> bool:
        """Remembers a step; whether it is time for a look, as there is room for no more.

        Args:
            step: number of finished steps, this one included.
            loss: of this rank's images, a scalar.
            is_finite: whether the step was taken.
        """
        if self._count == 0:
            self._first = step
        place = (step - 1) % _LONGEST  # in what order ranks are summed depends on the place
        self._steps[place, 0] = loss
        self._steps[place, 1] = is_finite
        self._count += 1
        return self._count == _LONGEST

    def look(self) -> Look:
        """Reads what was remembered, of all ranks; every rank does so after the same step."""
        losses_of_all = all_reduce_sum(self._steps[:, 0].clone()) / self._world_size
        places = torch.arange(self._first - 1, self._first - 1 + self._count) % _LONGEST
        rows = torch.stack([losses_of_all, self._steps[:, 1]], dim=1)[places.to(losses_of_all.device)]
        self._count = 0
        losses, spikes, too_many = [], [], None
        for step, (loss, taken) in enumerate(rows.tolist(), self._first):
            losses.append(loss)
            if not taken:
                self._skipped += 1
                self._in_a_row += 1
                if self._in_a_row > self._most_in_a_row and too_many is None:
                    too_many = step
                continue
            self._in_a_row = 0
            spike = self._judge(step, loss)
            if spike is not None:
                spikes.append(spike)
            self._losses = [*self._losses[1 - REMEMBERED :], loss]
        return Look(losses, self._skipped, too_many, spikes)

    def _judge(self, step: int, loss: float) -> Spike | None:
        if self._spike is None or len(self._losses) < FEWEST:
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        if loss <= mean + self._spike * deviation:
            return None
        return Spike(step, loss, mean, deviation)


class Watchdog:
    """Says on which rank and at which place a run hangs, from a thread of its own.

    It ends nothing: a slow disk may come back, and the exchange between ranks has a time limit of its own,
    which is longer. A process that was told to end and does not is ended.

    Args:
        rank: of this process.
        seconds: without progress after which the run hangs.
        grace: seconds after a signal to end, after which the process is ended unsaved.
        stop: the signal that told the process to end, 0 for none.
    """

    def __init__(self, rank: int, seconds: float, grace: float, stop: Callable[[], int]) -> None:
        self._rank, self._seconds, self._grace, self._stop = rank, seconds, grace, stop
        self._place, self._since, self._said = "starting", time.monotonic(), False
        self._told_at: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._trainer = threading.current_thread().ident

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches as long as the context lasts."""
        self._since = time.monotonic()
        self._thread.start()
        try:
            yield self
        finally:
            self._over.set()
            self._thread.join()

    def at(self, place: str) -> None:
        """The run makes progress, and is now at `place`."""
        self._place, self._since, self._said = place, time.monotonic(), False

    def _watch(self) -> None:
        interval = min(self._seconds / 10, self._grace / 10, 1.0)
        while not self._over.wait(interval):
            now = time.monotonic()
            if self._stop() and self._told_at is None:
                self._told_at = now
            if self._told_at is not None and now - self._told_at > self._grace:
                self._say(f"told to end {self._grace:.0f} s ago and still {self._place}: ends unsaved")
                os._exit(128 + self._stop())
            if now - self._since > self._seconds and not self._said:
                self._said = True
                self._say(f"no progress for {self._seconds:.0f} s while {self._place}{self._frame()}")

    def _say(self, words: str) -> None:
        say(f"[rank {self._rank}] {words}", sys.stderr)

    def _frame(self) -> str:
        """The innermost line of this project that the training thread is at."""
        frame = sys._current_frames().get(self._trainer or 0)
        root = str(Path(__file__).parents[2])
        own = [
            entry
            for entry in traceback.extract_stack(frame)
            if entry.filename.startswith(root) and "site-packages" not in entry.filename
        ]
        if not own:
            return ""
        name = Path(own[-1].filename).relative_to(root)
        return f", at {name}:{own[-1].lineno} in {own[-1].name}"
