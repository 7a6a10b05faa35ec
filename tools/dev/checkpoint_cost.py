"""Measure the cost of checkpoints in one training run that writes them after every second epoch only.

    python -m tools.dev.checkpoint_cost                                     the bundled digits, 40 epochs
    python -m tools.dev.checkpoint_cost --schedule.epochs 80 --model.name vil_tiny --model.image_size 64 …

Options are those of train.py. Prints two measurements; the second does not depend on other processes:

- the median time of epochs with and without a write. An epoch lasts from one save to the next: a write, which
  overlaps with training, belongs to the epoch after it;
- the time for which training waits for the copy of its state, and the CPU time of the thread that writes it,
  together as a share of an epoch: the cost if no core is idle.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import ClassVar
from unittest import mock

import torch

from vil import command_line
from vil.checkpoints.training_state import State
from vil.checkpoints.writer import CheckpointWriter, state_size
from vil.command_line import ToolParser
from vil.errors import UserError
from vil.runtime.console import print_text
from vil.training import trainer

ROOT = Path(__file__).resolve().parents[2]


class AlternatingWriter(CheckpointWriter):
    """Write every second checkpoint, and record the time of each."""

    saves: ClassVar[list[tuple[float, bool]]] = []
    """Time, and True if the checkpoint is written."""
    waits_s: ClassVar[list[float]] = []
    cpu_s: ClassVar[list[float]] = []
    size = 0

    def save(self, state: State, is_best: bool) -> None:
        """Write `state` or only record the time."""
        start, is_written = time.perf_counter(), len(self.saves) % 2 == 0
        self.saves.append((start, is_written))
        AlternatingWriter.size = state_size(state)
        if is_written:
            super().save(state, is_best)
            self.waits_s.append(time.perf_counter() - start)

    def _write(self, state: State, is_best: bool) -> None:
        start = time.thread_time()
        super()._write(state, is_best)
        self.cpu_s.append(time.thread_time() - start)


def main(argv: Sequence[str]) -> None:
    """Train and print the measurements."""
    _, train_argv = _parser().parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["train.py", "--schedule.epochs", "40", "--progress", "false", *train_argv, "--output", folder]
        writer = mock.patch.object(trainer, "CheckpointWriter", AlternatingWriter)
        try:
            with writer, mock.patch.object(sys, "argv", argv):
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as exit_:
            if exit_.code:
                raise
    if not AlternatingWriter.saves:  # --print_config
        return
    epochs: dict[bool, list[float]] = {True: [], False: []}
    for (start, is_written), (end, _) in list(pairwise(AlternatingWriter.saves))[2:]:  # without the warm-up
        epochs[is_written].append(end - start)
    if min(map(len, epochs.values())) < 2:
        raise UserError("schedule.epochs", "must be at least 7: two of each kind after the warm-up")
    print_text(f"\n{torch.get_num_threads()} threads, checkpoints of {AlternatingWriter.size / 1e6:.1f} MB")
    for is_written, name in ((True, "epoch with a write"), (False, "epoch without a write")):
        low, middle, high = quantiles(epochs[is_written], n=4)
        count = len(epochs[is_written])
        print_text(f"{name}: {middle:.3f} s (quartiles {low:.3f} to {high:.3f} s, {count} epochs)")
    with_write, without_write = median(epochs[True]), median(epochs[False])
    wait_s, cpu_s = median(AlternatingWriter.waits_s), median(AlternatingWriter.cpu_s)
    print_text(f"an epoch with a write takes {100 * (with_write / without_write - 1):+.1f} % longer")
    print_text(
        f"training waits {1e3 * wait_s:.1f} ms, the thread computes {1e3 * cpu_s:.1f} ms (medians of "
        f"{len(AlternatingWriter.cpu_s)}): {100 * (wait_s + cpu_s) / without_write:.2f} % of an epoch"
    )


def _parser() -> ToolParser:
    return ToolParser(
        prog="python -m tools.dev.checkpoint_cost",
        usage="%(prog)s [OPTION OF train.py ...]",
        description=__doc__,
        allow_abbrev=False,
    )


if __name__ == "__main__":
    command_line.main(main)
