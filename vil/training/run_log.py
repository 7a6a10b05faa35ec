"""The log of a run: metrics.jsonl, TensorBoard, console lines and a progress bar."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vil.config import TrainConfig, UserError, error_reason
from vil.runtime.console import print_line
from vil.runtime.run_files import METRICS, TENSORBOARD
from vil.training.metrics_log import MetricsLog
from vil.training.tensorboard_log import TensorBoardLog


class RunLog:
    """Write the logs of a run on rank 0; on other ranks every method does nothing.

    Args:
        folder: of the run; None on other ranks.
        config: the resolved configuration.
        step, is_evaluated: as for `cut_metrics`.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, step: int, is_evaluated: bool) -> None:
        self.metrics: MetricsLog | None = None
        self.tensorboard = TensorBoardLog(None)
        self.shows_progress = folder is not None and config.progress and sys.stderr.isatty()
        if folder is None:
            return
        try:
            self.metrics = MetricsLog(folder / METRICS, step, is_evaluated)
            if config.tensorboard:
                self._open_tensorboard(folder, config, step, is_evaluated)
        except OSError as error:
            reason = f"the log cannot be written to {error.filename or folder}: {error_reason(error)}"
            raise UserError("output", reason) from None

    def _open_tensorboard(self, folder: Path, config: TrainConfig, step: int, is_evaluated: bool) -> None:
        assert self.metrics is not None
        # Events have no kind: an evaluation that is removed is purged with the training step before it.
        first_step = step + 1 if is_evaluated else step
        self.tensorboard = TensorBoardLog(folder / TENSORBOARD, first_step)
        for record in self.metrics.records:
            if record["step"] >= first_step:
                self.tensorboard.add_record(record)
        self.tensorboard.add_hparams(config)
        if step == 0:
            self.tensorboard.add_config(config)

    def write(self, kind: str, step: int, epoch: int, **values: float | int | list[str] | None) -> None:
        """Write a record to metrics.jsonl, and its numbers to TensorBoard; `epoch` counts from 1."""
        if self.metrics is not None:
            record = {"kind": kind, "step": step, "epoch": epoch, **values, "time": round(time.time(), 3)}
            self.metrics.write(record)
            self.tensorboard.add_record(record)

    def flush(self) -> None:
        """Write all records to the disk.

        Raises:
            OSError: of metrics.jsonl.
        """
        if self.metrics is not None:
            self.metrics.flush()
            self.tensorboard.flush()

    def finish(self) -> str | None:
        """Flush at the end of a run; return one line if records cannot be written."""
        self.tensorboard.flush()
        return self.metrics.finish() if self.metrics is not None else None

    def progress_bar(self, epoch: int, epochs: int, start: int, steps: int) -> tqdm[Any]:
        """Return a progress bar over the steps of an epoch, disabled without a terminal."""
        title, is_hidden = f"epoch {epoch}/{epochs}", not self.shows_progress
        return tqdm(desc=title, initial=start, total=steps, unit="step", leave=False, disable=is_hidden)

    def print_line(self, line: str) -> None:
        """Print one line on standard output."""
        if self.metrics is not None:
            print_line(line)

    def close(self) -> None:
        """Close all files."""
        if self.metrics is not None:
            self.metrics.close()
        self.tensorboard.close()
