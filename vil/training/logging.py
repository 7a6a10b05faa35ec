"""What a run tells: metrics.jsonl and TensorBoard for tools, a bar and a line per epoch for people."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from vil.config import ConfigError, TrainConfig

METRICS = "metrics.jsonl"

TIMING_FIELDS = ("time", "step_time", "data_wait", "images_per_second", "seconds")
"""Fields that depend on the clock; all others are bit-identical between identical runs.

`time` is seconds since 1970; `step_time` and `data_wait` are seconds per step, averaged since the last logged
step; `images_per_second` counts the global batch; `seconds` is the length of an evaluation.
"""


class RunLog:
    """The log of one run; on ranks other than 0 every method does nothing.

    Args:
        folder: the run's folder; None on the other ranks.
        config: the resolved configuration.
        step: finished optimiser steps of the checkpoint that the run continues from. What was logged after it
            is cut off, so that no step stands twice.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, step: int) -> None:
        self.enabled = folder is not None
        self.shows_bars = self.enabled and config.progress and sys.stderr.isatty()
        self._config = config
        self._writer: Any = None
        if folder is None:
            return
        try:
            cut_metrics(folder / METRICS, step)
            self._file = (folder / METRICS).open("a", encoding="utf-8")
            if config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            reason = f"the log cannot be written to {folder}: {error.strerror or error}"
            raise ConfigError("output", reason) from None
        if self._writer is not None and step == 0:
            text = yaml.safe_dump(plain(config), sort_keys=False)
            self._writer.add_text("config", f"```yaml\n{text}```", 0)

    def write(self, kind: str, step: int, epoch: int, **values: float | int) -> None:
        """One line of metrics.jsonl, flushed, and the same as TensorBoard scalars; epochs count from 1.

        Raises:
            OSError: the disk is full.
        """
        if not self.enabled:
            return
        record = {"kind": kind, "step": step, "epoch": epoch, **values, "time": round(time.time(), 3)}
        # JSON has no NaN and no infinity: the overflows of float16 become null.
        record = {key: _finite(value) for key, value in record.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(_tag(kind, key), value, step)

    def images(self, images: torch.Tensor) -> None:
        """The first images of a training batch, (B, C, H, W) and normalised, as a grid as people see them."""
        if self._writer is None:
            return
        from torchvision.utils import make_grid

        batch = images[:32].detach().float().cpu()
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (self._config.data.mean, self._config.data.std)
        )
        if batch.shape[1] != 3:
            mean, std = mean.mean(), std.mean()
        grid = make_grid((batch * std + mean).clamp(0, 1), nrow=8)
        self._writer.add_image("train/augmented_batch", grid, 0)

    def bar(self, epoch: int, done: int, steps: int) -> tqdm[Any]:
        """A progress bar over the steps of an epoch; none where nobody looks at a terminal."""
        name = f"epoch {epoch}/{self._config.schedule.epochs}"
        return tqdm(
            desc=name, initial=done, total=steps, unit="step", leave=False, disable=not self.shows_bars
        )

    def say(self, line: str) -> None:
        """One line for people."""
        if self.enabled:
            print(line, flush=True)

    def close(self) -> None:
        """Flushes and closes all files."""
        # Whatever a full disk leaves unwritten here was missed by `write` already, which said so.
        if self.enabled:
            with suppress(OSError):
                self._file.close()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def cut_metrics(path: Path, step: int) -> None:
    """Removes what `path` holds about later steps than `step`, and a line that a crash left unfinished."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if 0 < _step_of(line) <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; 0 for a line that a crash left unfinished."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else 0
    except (ValueError, KeyError, TypeError):
        return 0


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dicts, lists and scalars, as YAML has them."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return content


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(kind: str, key: str) -> str:
    """The TensorBoard name of a value: its section, train, validation, ema or system, then its own name."""
    if key in TIMING_FIELDS:
        return f"system/{'evaluation_seconds' if key == 'seconds' else key}"
    if key.startswith("ema_"):
        return f"ema/{key.removeprefix('ema_')}"
    return f"{kind}/{'learning_rate' if key == 'lr' else key}"
