"""What checkpoints cost: one run that writes them after every second epoch only.

    python tools/checkpoint_cost.py                                     the bundled digits, 40 epochs
    python tools/checkpoint_cost.py --schedule.epochs 80 --model.name vil_tiny --model.image_size 64 …

Two answers, of which the second one does not hear the machine's noise:

- Epochs with and without a write alternate within the run; medians of their times are compared.
- The time that training waits for the copy of its state, and the time that the thread which writes it
  computes, together as a share of an epoch: the cost where no core is idle.

Takes the options of train.py. An epoch lasts from where its predecessor would be saved to where it would be
saved itself: the time of a write, beside which training goes on, belongs to the epoch after it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from vil.checkpoint_files import step_files
from vil.command_line import COMMAND_LINE, main
from vil.config import ConfigError
from vil.training import trainer
from vil.training.checkpoint_writer import CheckpointWriter, state_size


class EverySecond(CheckpointWriter):
    """Writes every second checkpoint that it is given, and notes when each came and what it took."""

    saves: list[tuple[float, bool]] = []  # noqa: RUF012 (of the one writer of this program)
    waited: list[float] = []  # noqa: RUF012 - seconds
    computed: list[float] = []  # noqa: RUF012 - seconds
    size = 0

    def save(self, state: Mapping[str, Any], is_best: bool) -> None:
        """Writes `state`, or only takes the time."""
        writes = len(self.saves) % 2 == 0
        began = time.perf_counter()
        self.saves.append((began, writes))
        EverySecond.size = state_size(state)
        if writes:
            super().save(state, is_best)
            self.waited.append(time.perf_counter() - began)

    def _write(self, state: Mapping[str, Any], is_best: bool) -> None:
        began = time.thread_time()
        super()._write(state, is_best)
        self.computed.append(time.thread_time() - began)


def measure(words: Sequence[str]) -> None:
    """Trains and prints the seconds of an epoch with and without a checkpoint before it."""
    trainer.CheckpointWriter = EverySecond  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        words = ["--schedule.epochs", "40", "--progress", "false", *words, "--output", folder]
        train.train(words)
        files = len(step_files(Path(folder)))
    times = EverySecond.saves
    lasted: dict[bool, list[float]] = {True: [], False: []}
    # Not the first two epochs, in which everything is done for the first time.
    for (began, writes), (ended, _) in list(pairwise(times))[2:]:
        lasted[writes].append(ended - began)
    if min(map(len, lasted.values())) < 2:
        raise ConfigError(COMMAND_LINE, "--schedule.epochs must be at least 7: two of each kind")
    written, none = median(lasted[True]), median(lasted[False])
    waited, computed = median(EverySecond.waited), median(EverySecond.computed)
    spread = [sorted(values)[len(values) // 4 :: len(values) // 2][:2] for values in lasted.values()]
    print(
        f"\n{torch.get_num_threads()} threads; checkpoints of {EverySecond.size / 1e6:.1f} MB, {files} kept\n"
        f"epoch after a checkpoint: {written:.3f} s, median of {len(lasted[True])} "
        f"(quartiles {spread[0][0]:.3f} and {spread[0][-1]:.3f})\n"
        f"epoch after none:         {none:.3f} s, median of {len(lasted[False])} "
        f"(quartiles {spread[1][0]:.3f} and {spread[1][-1]:.3f})\n"
        f"an epoch with a checkpoint takes {100 * (written / none - 1):+.1f} % longer\n"
        f"training waits {1e3 * waited:.1f} ms for a checkpoint, its thread computes {1e3 * computed:.1f} ms "
        f"(medians of {len(EverySecond.computed)}): {100 * (waited + computed) / none:.2f} % of an epoch"
    )


if __name__ == "__main__":
    main(measure)
