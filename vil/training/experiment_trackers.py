"""Weights & Biases and MLflow, by their own libraries. A failure after the start never ends the training.

Both write into the run's folder unless their own settings (`wandb login`, `WANDB_MODE`,
`MLFLOW_TRACKING_URI`) name a server. Of paths they get the base names. A continued run continues the same run
there, whose id is in trackers.json.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from vil.config import TRACKER_PACKAGES, TrainConfig, Tree
from vil.errors import UserError, error_reason
from vil.runtime.files import parse_json, read_text, refuse_link, write_durably
from vil.runtime.run_files import MLFLOW, TRACKERS, WANDB
from vil.training.tensorboard_log import record_scalars
from vil.validation import PATH_OPTIONS, flatten, stored_tree

if TYPE_CHECKING:
    from mlflow.entities import Metric

PROJECT = "vil"
"""Project of W&B, unless WANDB_PROJECT is set, and experiment of MLflow, unless MLFLOW_EXPERIMENT_NAME is."""

FINISH_TIMEOUT_S = 60.0
"""Seconds that the end of a run waits for MLflow's server."""

_MAX_PARAM_LENGTH = 500
_MAX_METRICS = 1000
"""The most that a request may have."""
_START_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_logger = logging.getLogger(__name__)


def check_loggers(loggers: Sequence[str]) -> None:
    """Raise UserError if a logger needs a package that is not installed."""
    for name in loggers:
        package = TRACKER_PACKAGES.get(name)
        spec = importlib.util.find_spec(name) if package else None
        if package and (spec is None or spec.origin is None):  # or a folder of this name
            raise UserError("loggers", f"{name} needs the package {package}, which is not installed")


class Tracker:
    """A log of numbers that stops with one warning when its library fails.

    Attributes:
        is_finished: True if the run is at its end when the log is closed.
    """

    name: Literal["wandb", "mlflow"]

    def __init__(self) -> None:
        self._is_open = True
        self.is_finished = False

    def add_record(self, record: Tree) -> None:
        """Log the numbers of a record of metrics.jsonl."""
        values = record_scalars(record)
        self._call(lambda: self._log(values, record["step"]))

    def flush(self) -> None:
        """Do nothing: the libraries write in the background."""

    def close(self) -> None:
        """Mark the run as ended and wait until everything is written."""
        self._call(self._finish)
        self._is_open = False

    def _log(self, values: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    def _call(self, action: Callable[[], object]) -> None:
        if not self._is_open:
            return
        try:
            action()
        except Exception as error:  # of any type: a server that is gone, a full disk
            self._is_open = False
            _logger.warning("warning: %s: %s; no more is logged there", self.name, error_reason(error))


class WandbLog(Tracker):
    """Log to Weights & Biases, by default into the folder `wandb` of the run.

    Raises:
        UserError: W&B cannot be started, as without a login.
        OSError: the folder cannot be written.
    """

    name: Literal["wandb"] = "wandb"

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        super().__init__()
        import wandb

        refuse_link(folder / WANDB)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.absolute().name,
                id=_tracker_id(folder, self.name, lambda: uuid.uuid4().hex[:12]),
                resume="allow",
                dir=str(folder),
                config=_options(config),
                allow_val_change=True,
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True
                ),
            )
        except (wandb.Error, RuntimeError, ValueError) as error:
            raise UserError("loggers", f"wandb: {error_reason(error)}") from error

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def _finish(self) -> None:
        self._run.finish(exit_code=0 if self.is_finished else 1)


class MlflowLog(Tracker):
    """Log to MLflow: to MLFLOW_TRACKING_URI, else into the folder `mlruns` of the run.

    A thread sends the numbers, those of many steps at once if requests take longer than steps: MLflow tries a
    request to a server that does not answer for minutes. A number that the run logged before it was
    interrupted is not logged twice.

    Raises:
        UserError: MLflow cannot be reached.
        OSError: the folder cannot be written.
    """

    name: Literal["mlflow"] = "mlflow"

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        super().__init__()
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for path in (folder / MLFLOW, *(folder / MLFLOW).rglob("*")):  # MLflow would append to their targets
            refuse_link(path)
        # MLflow's releases from 3.7 on refuse folders without this.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / MLFLOW).absolute().as_uri()
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            self._client = MlflowClient(tracking_uri=uri)

            def create() -> str:
                found = self._client.get_experiment_by_name(experiment_name)
                experiment = found.experiment_id if found else self._client.create_experiment(experiment_name)
                run = self._client.create_run(experiment, run_name=folder.absolute().name)
                self._add_options(run.info.run_id, config)
                return str(run.info.run_id)

            with _environment_defaults(_START_LIMITS):
                self._id = _tracker_id(folder, self.name, create)
                self._client.update_run(self._id, status="RUNNING")
                keys = self._client.get_run(self._id).data.metrics
                self._last_steps = {
                    key: max(metric.step for metric in self._client.get_metric_history(self._id, key))
                    for key in keys
                }
        except MlflowException as error:
            raise UserError("loggers", f"mlflow: {error_reason(error)}") from error
        self._queue: SimpleQueue[list[Metric] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._sender = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._sender.start()

    def _send(self) -> None:
        """Send the numbers of the queue until one request fails, or up to None: then the end of the run."""
        try:
            waiting: list[Metric] = []
            is_open = True
            while is_open:
                metrics = self._queue.get()
                is_open = metrics is not None
                waiting += metrics or []
                if self._queue.empty():
                    for first in range(0, len(waiting), _MAX_METRICS):
                        self._client.log_batch(self._id, metrics=waiting[first : first + _MAX_METRICS])
                    waiting = []
            self._client.set_terminated(self._id, "FINISHED" if self.is_finished else "KILLED")
        except Exception as error:
            self._failure = error

    def _add_options(self, run_id: str, config: TrainConfig) -> None:
        from mlflow.entities import Param

        values = _options(config).items()
        params = [Param(key, json.dumps(value)[:_MAX_PARAM_LENGTH]) for key, value in values]
        for first in range(0, len(params), 100):  # the most that a request may have
            self._client.log_batch(run_id, params=params[first : first + 100])

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(key, value, now, step)
            for key, value in values.items()
            if step > self._last_steps.get(key, -1)
        ]
        self._submit(metrics)

    def _submit(self, metrics: list[Metric] | None) -> None:
        """Send numbers, or the end of the run; raise the error of an earlier request that failed."""
        if self._failure is not None:
            raise self._failure
        self._queue.put(metrics)

    def _finish(self) -> None:
        self._submit(None)
        self._sender.join(FINISH_TIMEOUT_S)
        if self._sender.is_alive():
            raise TimeoutError(f"no answer within {FINISH_TIMEOUT_S:g} s")
        if self._failure is not None:
            raise self._failure


@contextmanager
def _environment_defaults(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set."""
    new = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


_PATHS = ("output", *(f"{name}.{option}" for name, options in PATH_OPTIONS.items() for option in options))
"""Options that name a folder or a file."""


def _options(config: TrainConfig) -> Tree:
    """Return the options of a run by dotted key, with the base names of paths."""
    return {key: _base_names(value, key in _PATHS) for key, value in flatten(stored_tree(config)).items()}


def _base_names(value: object, is_path: bool) -> object:
    """Replace paths, and in any other option absolute paths, by their base names."""
    if isinstance(value, Mapping):
        return {key: _base_names(item, is_path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_base_names(item, is_path) for item in value]
    if isinstance(value, str) and (is_path or os.path.isabs(os.path.expanduser(value))):
        return os.path.basename(os.path.abspath(os.path.expanduser(value)))
    return value


def _tracker_id(folder: Path, name: str, create: Callable[[], str]) -> str:
    """Return the id of the run at a tracker, stored in the run's folder; create it for a new run."""
    path = folder / TRACKERS
    try:
        stored = parse_json(read_text(path, 10_000))
    except (OSError, ValueError):
        stored = {}
    stored = stored if isinstance(stored, dict) else {}
    found = stored.get(name)
    if isinstance(found, str) and re.fullmatch(r"[0-9a-zA-Z]{8,64}", found):
        return found
    new = create()
    write_durably(path, json.dumps({**stored, name: new}) + "\n")
    return new
