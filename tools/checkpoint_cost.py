"""What checkpoints cost: one run that writes them after every second epoch only.

    python tools/checkpoint_cost.py                                     the bundled digits, 40 epochs
    python tools/checkpoint_cost.py --schedule.epochs 80 --model.name vil_tiny --model.image_size 64 …

Takes the options of train.py. An epoch lasts from where its predecessor would be saved to where it would be
saved itself: the time of a write, beside which training goes on, belongs to the epoch after it. Epochs with
and without a write alternate within the run and suffer the same noise; medians are compared.
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
    """Writes every second checkpoint that it is given, and notes when each came."""

    saves: list[tuple[float, bool]] = []  # noqa: RUF012 (of the one writer of this program)
    size = 0

    def save(self, state: Mapping[str, Any], is_best: bool) -> None:
        """Writes `state`, or only takes the time."""
        writes = len(self.saves) % 2 == 0
        self.saves.append((time.perf_counter(), writes))
        EverySecond.size = state_size(state)
        if writes:
            super().save(state, is_best)


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
    spread = [sorted(values)[len(values) // 4 :: len(values) // 2][:2] for values in lasted.values()]
    print(
        f"\n{torch.get_num_threads()} threads; checkpoints of {EverySecond.size / 1e6:.1f} MB, {files} kept\n"
        f"epoch after a checkpoint: {written:.3f} s, median of {len(lasted[True])} "
        f"(quartiles {spread[0][0]:.3f} and {spread[0][-1]:.3f})\n"
        f"epoch after none:         {none:.3f} s, median of {len(lasted[False])} "
        f"(quartiles {spread[1][0]:.3f} and {spread[1][-1]:.3f})\n"
        f"checkpoints cost {100 * (written / none - 1):+.1f} % of the time"
    )


if __name__ == "__main__":
    main(measure)
