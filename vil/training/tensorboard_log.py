"""TensorBoard: scalars, options and images of a run. A failure never ends the training."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from vil.config import TrainConfig, Tree
from vil.errors import one_line
from vil.runtime.files import refuse_link
from vil.runtime.images import denormalize
from vil.training.metrics_log import TIMING_FIELDS
from vil.validation import flatten, stored_tree

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_logger = logging.getLogger(__name__)

_HPARAM_SECTIONS = ("model", "schedule", "data", "seed", "precision")
_HPARAM_METRICS = ("validation/top1", "validation/loss", "ema/top1", "best/top1")


class TensorBoardLog:
    """Write TensorBoard events.

    Args:
        folder: of the events; None writes nothing.
        first_step: earlier events of this step and later ones are hidden.

    Raises:
        OSError: the folder cannot be written, or is a symbolic link.
    """

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        self._writer: SummaryWriter | None = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        _silence_writer_thread()
        refuse_link(folder)
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add_config(self, config: TrainConfig) -> None:
        """Add the configuration as text."""
        text = yaml.safe_dump(stored_tree(config), sort_keys=False)
        self._add(lambda writer: writer.add_text("config", f"```yaml\n{text}```", 0))

    def add_hparams(self, config: TrainConfig) -> None:
        """Add the options to TensorBoard's table HPARAMS, with the metrics of the last evaluation.

        The table accepts numbers, booleans and texts: lists and null are added as JSON.
        """
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        values = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in flatten(stored_tree(config)).items()
            if key.partition(".")[0] in _HPARAM_SECTIONS
        }
        for summary in hparams(values, dict.fromkeys(_HPARAM_METRICS, 0.0)):
            self._add(lambda writer: writer.file_writer.add_summary(summary))  # type: ignore  # noqa: B023

    def add_record(self, record: Tree) -> None:
        """Add the numbers of a record of metrics.jsonl as scalars."""
        for tag, value in record_scalars(record).items():
            self._add_scalar(tag, value, record["step"])

    def add_best(self, step: int, top1: float) -> None:
        """Add the best Top-1 so far, in percent, of raw or averaged weights."""
        self._add_scalar("best/top1", top1, step)

    def add_learning_rates(self, step: int, rates: Sequence[float]) -> None:
        """Add the learning rates of the optimizer's parameter groups, if they differ."""
        if len(set(rates)) > 1:
            for index, rate in enumerate(rates):
                self._add_scalar(f"learning_rate/group_{index:02}", rate, step)

    def add_batch(self, images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        """Add the first 32 images of a training batch, (B, C, H, W) and normalized, as a grid in color."""
        if self._writer is None:
            return
        from torchvision.utils import make_grid

        grid = make_grid(denormalize(images[:32], mean, std), nrow=8)
        self._add(lambda writer: writer.add_image("train/augmented_batch", grid, 0))

    def add_image(self, name: str, draw: Callable[[], torch.Tensor], step: int) -> None:
        """Add the image that `draw` returns, (3, H, W) uint8; log a warning if it raises an error."""
        if self._writer is None:
            return
        try:
            image = draw()
        except (RuntimeError, ValueError) as error:
            _logger.warning("warning: no image of %s: %s", name, one_line(error))
            return
        self._add(lambda writer: writer.add_image(name, image, step))

    def flush(self) -> None:
        """Write all events."""
        self._add(lambda writer: writer.flush())

    def close(self) -> None:
        """Close the files."""
        self._add(lambda writer: writer.close())

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        self._add(lambda writer: writer.add_scalar(tag, value, step))

    def _add(self, action: Callable[[SummaryWriter], object]) -> None:
        writer = self._writer  # the thread that writes a checkpoint may set it to None
        if writer is None:
            return
        try:
            action(writer)
        except OSError as error:
            self._writer = None
            reason = f"TensorBoard's events cannot be written: {error.strerror}"
            _logger.warning("warning: %s; no more are written", reason)


def _silence_writer_thread() -> None:
    """Suppress the traceback of TensorBoard's thread for an OSError, which the next event raises again."""
    original = threading.excepthook
    if original.__module__ == __name__:
        return

    def excepthook(raised: threading.ExceptHookArgs) -> None:
        is_tensorboard = type(raised.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and isinstance(raised.exc_value, OSError)):
            original(raised)

    threading.excepthook = excepthook


def record_scalars(record: Tree) -> dict[str, float]:
    """Return the numbers of a record of metrics.jsonl by tag."""
    return {
        record_tag(record["kind"], key): float(value)
        for key, value in record.items()
        if key not in ("kind", "step", "epoch", "time") and isinstance(value, int | float)
    }


def record_tag(kind: str, key: str) -> str:
    """Return the tag of a value: section (train, validation, ema, spikes or system) and name.

    A set of `eval_sets` follows the section: validation/<set>/top1, ema/<set>/top1.
    """
    if key in TIMING_FIELDS:
        return f"system/{'evaluation_seconds' if key == 'seconds' else key}"
    if kind == "spike":
        return f"spikes/{key}"
    if key.startswith("ema_"):
        return f"ema{kind.removeprefix('validation')}/{key.removeprefix('ema_')}"
    return f"{kind}/{'learning_rate' if key == 'lr' else key}"
