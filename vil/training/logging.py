"""What a run tells: metrics.jsonl and TensorBoard for tools, a bar and a line per epoch for people."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from vil.config import ConfigError, TrainConfig
from vil.console import say
from vil.pictures import denormalised
from vil.runtime.files import open_for_appending, parse_json, read_lines, refuse_link, write_durably
from vil.schema import stored_tree

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"

TIMING_FIELDS = ("time", "step_time", "data_wait", "images_per_second", "seconds")
"""Fields that depend on the clock; all others are bit-identical between identical runs.

`time` is seconds since 1970; `step_time` and `data_wait` are seconds per step, averaged since the last logged
step; `images_per_second` counts the global batch; `seconds` is the length of an evaluation.
"""


_logger = logging.getLogger(__name__)


class RunLog:
    """The log of one run; on ranks other than 0 every method does nothing.

    Args:
        folder: the run's folder; None on the other ranks.
        config: the resolved configuration.
        step: finished optimiser steps of the checkpoint that the run continues from. What was logged after it
            is cut off, so that no step stands twice.
        finished_step: those of the last evaluation that the checkpoint knows of.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, step: int, finished_step: int) -> None:
        self.enabled = folder is not None
        self.shows_bars = self.enabled and config.progress and sys.stderr.isatty()
        self._config = config
        self._writer: Any = None
        self._pending, self._unsynced, self._lock = bytearray(), bytearray(), threading.Lock()
        self._has_warned = False
        if folder is None:
            return
        self._path = folder / METRICS
        try:
            records = cut_metrics(self._path, step, finished_step)
            # Unbuffered: what a full disk takes of a line is known to the byte, and the rest waits.
            self._file = os.fdopen(open_for_appending(self._path), "ab", buffering=0)
            self._synced = self._file.tell()
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                _silence_the_events_thread()
                # An evaluation after the last step may have been shown that the checkpoint knows nothing of.
                purged = step + 1 if step == finished_step else step
                refuse_link(folder / TENSORBOARD)
                self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purged)
                for record in (record for record in records if record["step"] >= purged):
                    self._show(record)
        except OSError as error:
            where = error.filename or folder
            reason = f"the log cannot be written to {where}: {error.strerror or error}"
            raise ConfigError("output", reason) from None
        if self._writer is not None:
            self._show_options()
        if step == 0:
            text = yaml.safe_dump(stored_tree(config), sort_keys=False)
            self._tensorboard(lambda writer: writer.add_text("config", f"```yaml\n{text}```", 0))

    def write(self, kind: str, step: int, epoch: int, **values: float | int | list[str]) -> None:
        """One line of metrics.jsonl, written at once, and its numbers as TensorBoard scalars; epochs count
        from 1.

        What a full disk does not take is kept, and written with the next line, before the next checkpoint, or
        at the end: see `finish`.
        """
        if not self.enabled:
            return
        record = {"kind": kind, "step": step, "epoch": epoch, **values, "time": round(time.time(), 3)}
        # JSON has no NaN and no infinity: the overflows of float16 become null.
        record = {key: _finite(value) for key, value in record.items()}
        self._pending += (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            self._write_pending()
        except OSError as error:
            self._warn(f"{self._path} cannot be written: {error.strerror}; it is kept, and training goes on")
        self._show(record | values)

    def sync(self) -> None:
        """Brings all that was written to the disk.

        Raises:
            OSError: it cannot.
        """
        if self.enabled:
            self._write_pending()
            self._sync_written()
            if os.stat(self._path).st_ino != os.fstat(self._file.fileno()).st_ino:
                raise OSError(errno.ENOENT, "another file has its place")
            self._tensorboard(lambda writer: writer.flush())

    def finish(self) -> str | None:
        """`sync` at the end; says what keeps something from the disk, None where nothing does."""
        try:
            self.sync()
        except OSError as error:
            return f"{self._path} cannot be written: {error.strerror}"
        return None

    def _write_pending(self) -> None:
        with self._lock:  # a checkpoint's thread brings the log to the disk too
            while self._pending:
                content = bytes(self._pending)  # the loop may add a line to the original meanwhile
                count = self._file.write(content)
                self._unsynced += content[:count]
                del self._pending[:count]

    def _sync_written(self) -> None:
        """What a file system takes, and then, asked to keep it, does not (a quota of NFS), waits again."""
        with self._lock:
            written = len(self._unsynced)
            try:
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._synced)
                    self._pending[:0] = self._unsynced
                    self._unsynced.clear()
                raise
            self._synced += written
            del self._unsynced[:written]

    def _show(self, record: dict[str, Any]) -> None:
        """Adds the numbers of a record to TensorBoard."""
        for key, value in record.items():
            if key not in ("kind", "step", "epoch", "time") and isinstance(value, int | float):
                tag = _tag(record["kind"], key)
                self._tensorboard(lambda writer: writer.add_scalar(tag, value, record["step"]))  # noqa: B023

    def _tensorboard(self, show: Callable[[Any], Any]) -> None:
        """Does something with TensorBoard's writer; after a failure there is none."""
        writer = self._writer  # which another thread may take away
        if writer is None:
            return
        try:
            show(writer)
        except OSError as error:
            self._writer = None
            self._warn(f"TensorBoard's events cannot be written: {error.strerror}; they end here")

    def _warn(self, words: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _logger.warning("warning: %s", words)

    def write_best(self, step: int, top1: float) -> None:
        """The best Top-1 so far, in percent, of the weights or their average, in TensorBoard."""
        self._tensorboard(lambda writer: writer.add_scalar("best/top1", top1, step))

    def rates(self, step: int, rates: dict[str, float]) -> None:
        """The learning rates of the optimiser's groups, where they differ, in TensorBoard."""
        if len(set(rates.values())) > 1:
            for name, rate in rates.items():
                tag = f"learning_rate/{name}"
                self._tensorboard(lambda writer: writer.add_scalar(tag, rate, step))  # noqa: B023

    def _show_options(self) -> None:
        """The options of the run, for TensorBoard's table of hyperparameters, beside its last evaluation.

        The table takes numbers, truth values and texts; a list is a text, and an empty option is `null`.
        """
        from torch.utils.tensorboard.summary import hparams

        values = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in leaves(stored_tree(self._config)).items()
            if key.partition(".")[0] in ("model", "schedule", "data", "seed", "precision")
        }
        shown = dict.fromkeys(("validation/top1", "validation/loss", "ema/top1", "best/top1"), 0.0)
        for summary in hparams(values, shown):
            self._tensorboard(lambda writer: writer.file_writer.add_summary(summary))  # noqa: B023

    def picture(self, name: str, draw: Callable[[], torch.Tensor], step: int) -> None:
        """Shows what `draw` makes, (3, H, W) uint8, in TensorBoard; that it cannot is no reason to stop."""
        if self._writer is None:
            return
        try:
            drawn = draw()
        except (RuntimeError, ValueError) as error:
            _logger.warning("warning: no picture of %s: %s", name, " ".join(str(error).split())[:200])
            return
        self._tensorboard(lambda writer: writer.add_image(name, drawn, step))

    def images(self, images: torch.Tensor) -> None:
        """The first images of a training batch, (B, C, H, W) and normalised, as a grid as people see them."""
        if self._writer is None:
            return
        from torchvision.utils import make_grid

        data = self._config.data
        grid = make_grid(denormalised(images[:32], data.mean, data.std), nrow=8)
        self._tensorboard(lambda writer: writer.add_image("train/augmented_batch", grid, 0))

    def bar(self, epoch: int, done: int, steps: int) -> tqdm[Any]:
        """A progress bar over the steps of an epoch; none where nobody looks at a terminal."""
        name = f"epoch {epoch}/{self._config.schedule.epochs}"
        return tqdm(
            desc=name, initial=done, total=steps, unit="step", leave=False, disable=not self.shows_bars
        )

    def say(self, line: str) -> None:
        """One line for people."""
        if self.enabled:
            say(line)

    def close(self) -> None:
        """Closes all files."""
        if self.enabled:
            with suppress(OSError):  # which `finish` told of
                self._write_pending()
            self._file.close()
        self._tensorboard(lambda writer: writer.close())


def _silence_the_events_thread() -> None:
    """TensorBoard's thread prints a traceback where it cannot write; the next event raises the same error."""
    shown = threading.excepthook

    def show(raised: threading.ExceptHookArgs) -> None:
        of_events = type(raised.thread).__module__.startswith("tensorboard.")
        if not (of_events and isinstance(raised.exc_value, OSError)):
            shown(raised)

    if shown.__module__ != __name__:
        threading.excepthook = show


def cut_metrics(path: Path, step: int, finished_step: int) -> list[dict[str, Any]]:
    """Removes what `path` holds about later steps than `step`, evaluations after that of `finished_step`, and
    a line that a crash left unfinished; returns what is left."""
    try:
        pairs = ((line, _record(line)) for line in read_lines(path))
        records = [(line, record) for line, record in pairs if record is not None]
    except FileNotFoundError:
        return []
    last = {"validation": finished_step}
    kept = [(line, r) for line, r in records if 0 < r["step"] <= last.get(r["kind"], step)]
    write_durably(path, "".join(line for line, _ in kept))
    return [record for _, record in kept]


def _record(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that a crash left unfinished."""
    try:
        record = parse_json(line) if line.endswith("\n") else None
    except ValueError:
        return None
    is_whole = (
        isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str)
    )
    return record if is_whole else None


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, of dotted keys to values; the options of a timm model are one value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "timm_options":
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(kind: str, key: str) -> str:
    """The TensorBoard name of a value: its section, train, validation, ema or system, then its own name."""
    if key in TIMING_FIELDS:
        return f"system/{'evaluation_seconds' if key == 'seconds' else key}"
    if kind == "spike":
        return f"spikes/{key}"
    if key.startswith("ema_"):
        return f"ema/{key.removeprefix('ema_')}"
    return f"{kind}/{'learning_rate' if key == 'lr' else key}"
