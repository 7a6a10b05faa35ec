"""The log of a run: metrics.jsonl, other logs of the same numbers, console lines and a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from tqdm import tqdm

from vil.config import TrainConfig, Tree
from vil.errors import UserError, error_reason
from vil.runtime import console
from vil.runtime.console import print_line
from vil.runtime.run_files import METRICS, METRICS_CSV, TENSORBOARD
from vil.training.csv_log import CsvLog, is_number_record
from vil.training.experiment_trackers import MlflowLog, Tracker, WandbLog
from vil.training.metrics_log import MetricsLog, cut_metrics
from vil.training.tensorboard_log import TensorBoardLog


class RecordLog(Protocol):
    """A log that copies the numbers of metrics.jsonl."""

    def add_record(self, record: Tree) -> None:
        """Log the numbers of a record."""

    def flush(self) -> None:
        """Write all records."""

    def close(self) -> None:
        """Close the log."""


class RunLog:
    """Write the logs of a run on rank 0; on other ranks every method does nothing.

    Args:
        folder: of the run; None on other ranks.
        config: the resolved configuration.
        step, is_evaluated: as for `cut_metrics`.

    Raises:
        UserError: the folder cannot be written, or a logger cannot be started.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, step: int, is_evaluated: bool) -> None:
        self.metrics: MetricsLog | None = None
        self.tensorboard = TensorBoardLog(None)
        self._copies: list[RecordLog] = []
        self._shows_progress = folder is not None and config.progress and sys.stderr.isatty()
        self._prints_progress = config.progress and not self._shows_progress
        self._last_line = time.monotonic()
        if folder is None:
            return
        try:
            records = cut_metrics(folder / METRICS, step, is_evaluated)
            self.metrics = MetricsLog(folder / METRICS)
            if "tensorboard" in config.loggers:
                self._open_tensorboard(folder, config, records, step, is_evaluated)
            if "csv" in config.loggers:
                self._copies.append(CsvLog(folder / METRICS_CSV, records))
            if "wandb" in config.loggers:
                self._copies.append(WandbLog(folder, config))
            if "mlflow" in config.loggers:
                self._copies.append(MlflowLog(folder, config))
        except OSError as error:
            reason = f"the log cannot be written to {error.filename or folder}: {error_reason(error)}"
            raise UserError("output", reason) from None

    def _open_tensorboard(
        self, folder: Path, config: TrainConfig, records: Sequence[Tree], step: int, is_evaluated: bool
    ) -> None:
        # Events have no kind: an evaluation that is removed is purged with the training step before it.
        first_step = step + 1 if is_evaluated else step
        self.tensorboard = TensorBoardLog(folder / TENSORBOARD, first_step)
        self._copies.append(self.tensorboard)
        for record in records:
            if record["step"] >= first_step and is_number_record(record):
                self.tensorboard.add_record(record)
        self.tensorboard.add_hparams(config)
        if step == 0:
            self.tensorboard.add_config(config)

    def write(self, kind: str, step: int, epoch: int, **values: float | int | list[str] | None) -> None:
        """Write a record to metrics.jsonl, and its numbers to the other logs; `epoch` counts from 1."""
        if self.metrics is not None:
            record = {"kind": kind, "step": step, "epoch": epoch, **values, "time": round(time.time(), 3)}
            self.metrics.write(record)
            for log in self._copies:
                log.add_record(record)

    def write_changed_option(self, step: int, epoch: int, option: str, old: object, new: object) -> None:
        """Write a record of an option that a continued run changes; `epoch` counts from 1."""
        if self.metrics is not None:
            values = {"step": step, "epoch": epoch, "option": option, "old": old, "new": new}
            self.metrics.write({"kind": "options", **values, "time": round(time.time(), 3)})

    def flush(self) -> None:
        """Write all records to the disk.

        Raises:
            OSError: of metrics.jsonl.
        """
        if self.metrics is not None:
            self.metrics.flush()
            for log in self._copies:
                log.flush()

    def finish(self) -> str | None:
        """Flush at the end of a run; return one line if records cannot be written."""
        for log in self._copies:
            log.flush()
        return self.metrics.finish() if self.metrics is not None else None

    def progress_bar(self, epoch: int, epochs: int, start: int, steps: int) -> tqdm[NoReturn]:
        """Return a progress bar over the steps of an epoch, disabled without a terminal."""
        title, is_hidden = f"epoch {epoch}/{epochs}", not self._shows_progress
        return tqdm(desc=title, initial=start, total=steps, unit="step", leave=False, disable=is_hidden)

    def print_line(self, line: str) -> None:
        """Print one line on standard output."""
        if self.metrics is not None:
            print_line(line)
            self._last_line = time.monotonic()

    def print_progress(self, line: str) -> None:
        """Print a line if there is no progress bar, and none was printed for a minute."""
        if self._prints_progress and time.monotonic() - self._last_line >= console.PROGRESS_INTERVAL_S:
            self.print_line(line)

    def close(self, is_finished: bool = False) -> None:
        """Close all files; `is_finished` is True at the end of the run."""
        if self.metrics is not None:
            self.metrics.close()
        for log in self._copies:
            if isinstance(log, Tracker):
                log.is_finished = is_finished
            log.close()
