"""The folder of a run: its lock, its files, and continuing the run in it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from vil.checkpoints import checkpoint_files
from vil.checkpoints.checkpoint_files import BEST, FOLDER, check_digest, newest_intact, step_files
from vil.checkpoints.training_state import (
    State,
    copy_training_state,
    evaluations_since_best,
    is_stopped_early,
    read_training_state,
)
from vil.config import TrainConfig
from vil.errors import UserError, errors_in_option
from vil.runtime import files
from vil.runtime.distributed import call_on_main
from vil.runtime.files import MAX_JSON_BYTES, refuse_link, write_durably
from vil.runtime.run_files import CONFIG, FOLDERS, LOCK, METRICS, SUMMARY
from vil.runtime.yaml_files import read_yaml, yaml_text
from vil.validation import (
    as_tree,
    flatten,
    rename_options,
    stored_tree,
    timm_start_options,
    with_absolute_paths,
    without_timm_start_options,
)

_logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 10.0
"""Time to wait for the lock: a process that was killed may still be ending."""

_FIXED_OPTIONS = (
    *("model", "data.source", "data.val_fraction", "data.val_seed", "data.val_list", "seed"),
    *("schedule.batch_size", "schedule.optimizer", "schedule.optimizer_options"),
    *("schedule.trainable", "schedule.best_metric"),
)
"""Sections and options that a continued run must not change."""

UNTRACKED_OPTIONS = ("output", "resume", "progress", "data.download", "data.index")
"""Options whose changes are not reported."""


def contains_run(folder: Path) -> bool:
    """Return True if a run was started in `folder`."""
    return any(map(os.path.exists, (folder / CONFIG, folder / BEST))) or bool(step_files(folder))


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder` by a lock of rank 0; called by every rank."""
    lock = FolderLock(folder)
    call_on_main(lock.acquire)
    try:
        yield
    finally:
        is_unused = False
        with suppress(OSError, UserError):  # the folder cannot be read
            is_unused = not contains_run(folder)
        lock.release(remove=is_unused)


class FolderLock:
    """An exclusive lock of a folder, held until `release` or the end of the process.

    A POSIX record lock: the system releases it when the process is killed, data workers do not inherit it,
    and NFS forwards it to other machines.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None
        self._created: list[Path] = []

    def acquire(self) -> None:
        """Lock the folder, waiting up to `LOCK_TIMEOUT_S`; name the process that holds the lock."""
        folder = self._path.parent
        try:
            missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
            folder.mkdir(parents=True, exist_ok=True)
            self._created = missing
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while not self._try_acquire():
                if time.monotonic() > deadline:
                    raise UserError("output", f"{folder} is in use: {self._holder()}")
                time.sleep(0.1)
        except OSError as error:
            self.release(remove=True)
            raise _not_writable(folder, error) from None

    def release(self, remove: bool) -> None:
        """Unlock the folder; with `remove`, also remove the folders that `acquire` created, if empty."""
        if remove and self._descriptor is not None:
            with suppress(OSError):
                self._path.unlink()
        if self._descriptor is not None:
            files.close_descriptor(self._descriptor)
            self._descriptor = None
        if remove:
            with suppress(OSError):
                for path in self._created:
                    path.rmdir()

    def _try_acquire(self) -> bool:
        descriptor = files.open_for_appending(self._path)  # truncated only once it is locked
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino != os.lstat(self._path).st_ino:  # removed by its previous holder
                raise BlockingIOError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            files.close_descriptor(descriptor)
            return False
        except OSError:  # a file system without locks
            files.close_descriptor(descriptor)
            return True
        holder = f"{Path(sys.argv[0]).name}, process {os.getpid()} on {socket.gethostname()}"
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{holder} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        self._descriptor = descriptor
        return True

    def _holder(self) -> str:
        holder = ""
        with suppress(OSError):
            holder = files.read_bytes(self._path, 4096).decode("utf-8", "replace").strip()
        return holder or "by another process"


def open_run(folder: Path, config: TrainConfig) -> State | None:
    """Return the newest intact checkpoint of the run in `folder`, None if there is none.

    Raises:
        UserError: the folder cannot be written, holds a run that must not be continued, holds damaged
            checkpoints only, or holds another run than `config` describes.
    """
    if config.resume == "never" and contains_run(folder):
        raise UserError("output", f"{folder} holds a run; resume: auto continues it, or name another folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        _refuse_links(folder)
    except OSError as error:
        raise _not_writable(folder, error) from None
    with errors_in_option("output"):
        newest = newest_intact(folder, partial(read_training_state, digest_required=True))
    if newest is None:
        _check_start_options(folder, config)
        return None
    path, state = newest
    if state["best"] is not None and path != folder / BEST:
        _restore_best(folder, state)
    for key, old, new in differences(state["config"], config):
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED_OPTIONS):
            reason = f"the run in {folder} has {old}, not {new}; name another output or keep its value"
            raise UserError(key, reason)
    return state


def _check_start_options(folder: Path, config: TrainConfig) -> None:
    """Refuse to start with random weights a run in `folder` that was to start from weights of timm.

    Options that load weights come from the command line alone and are not stored, so a run that ended before
    its first checkpoint needs them again.
    """
    if not os.path.exists(folder / CONFIG):
        return
    stored = read_yaml(folder / CONFIG)
    model = stored.get("model") if isinstance(stored, dict) else None
    old = timm_start_options(model.get("timm_options") if isinstance(model, dict) else None)
    if missing := sorted(old - timm_start_options(config.model.timm_options)):
        reason = f"the run in {folder} was started with {', '.join(missing)} and has no checkpoint yet"
        raise UserError("model.timm_options", f"{reason}; give the same command again")


def _refuse_links(folder: Path) -> None:
    """Raise OSError if a folder that a run writes to is a link: it may lead out of the run's folder."""
    for name in FOLDERS:
        refuse_link(folder / name)


def _not_writable(folder: Path, error: OSError) -> UserError:
    path = error.filename if isinstance(error.filename, str) else folder
    return UserError("output", f"{path} cannot be written: {error.strerror}")


def _restore_best(folder: Path, state: State) -> None:
    """Restore a damaged best.pt from a copy; if there is none, clear `best` in the state."""
    best = folder / BEST
    try:
        check_digest(best, required=True)
        return
    except UserError as error:
        problem = f"warning: {error}"
    for step, path in step_files(folder):
        try:
            candidate = read_training_state(path, digest_required=True)
        except UserError:
            continue
        is_evaluated = step == candidate["finished_step"]
        if (
            candidate["best"] != state["best"]
            or not is_evaluated
            or not _is_best_evaluation(folder, candidate)
        ):
            continue
        try:
            checkpoint_files.keep_damaged(best)
            copy_training_state(path, best)
        except OSError as error:
            problem += f", and cannot be restored from {path}: {error.strerror}"
            break
        _logger.warning("%s; restored from %s", problem, path)
        return
    state["best"], state["evaluations_since_best"] = None, 0
    _logger.warning("%s; the best of the remaining evaluations replaces it", problem)


def _is_best_evaluation(folder: Path, state: State) -> bool:
    """Return True if the evaluation of a checkpoint of the run in `folder` is `best`.

    An evaluation at which `max_steps` ended the run may follow the best one in the next epoch, or in the same
    one, in which the log tells them apart.
    """
    best = state["best"]
    # The epoch of the best counts from 1, and a run may end within an epoch.
    epochs = {state["epoch"], state["epoch"] + 1}
    if "epoch_step" in state:  # older versions do not store it
        epochs = {state["epoch"] + (state["epoch_step"] > 0)}
    if best["epoch"] not in epochs or state.get("evaluations_since_best", 0) > 0:
        return False
    return _logged_step(folder, best) in (None, state["step"])


def _logged_step(folder: Path, best: State) -> int | None:
    """Return the step of the best evaluation by metrics.jsonl, of equal ones the first; None if unknown."""
    key = "top1" if best["weights"] == "raw" else "ema_top1"
    steps = []
    with suppress(OSError):
        for line in files.read_lines(folder / METRICS):
            with suppress(ValueError, LookupError, TypeError):
                record = files.parse_json(line)
                is_epoch = (record["kind"], record["epoch"]) == ("validation", best["epoch"])
                has_value = "value" not in best or best["value"] in record.values()
                if is_epoch and has_value and record[key] == best["top1"]:
                    steps.append(int(record["step"]))
    return min(steps, default=None)


def differences(stored: State, config: TrainConfig) -> list[tuple[str, object, object]]:
    """Return (option, stored value, value in `config`) of all options that differ and affect the run.

    A number of classes that is left to the data equals any.
    """
    stored = rename_options({**stored, "model": without_timm_start_options(stored["model"])})
    stored = with_absolute_paths(stored)  # older runs stored paths as given
    old, new = flatten(json.loads(json.dumps(stored))), flatten(stored_tree(config))
    if new["model.num_classes"] is None:
        new["model.num_classes"] = old.get("model.num_classes")
    # An option that is newer than the run had the effect of its default.
    defaults = flatten(stored_tree(TrainConfig()))
    pairs = [(key, old.get(key, defaults[key]), new[key]) for key in new if key not in UNTRACKED_OPTIONS]
    return [pair for pair in pairs if pair[1] != pair[2]]


def check_class_names(
    folder: Path, config: TrainConfig, trained: Sequence[str], current: Sequence[str]
) -> None:
    """Raise UserError if the classes of the run in `folder` are not those of the data, in this order."""
    if list(current) == list(trained):
        return
    key = "data.root" if config.data.root else "data.source"
    if len(current) != len(trained):
        reason = f"{len(trained)} classes, the data has {len(current)}"
    else:
        index = next(i for i, (name, other) in enumerate(zip(current, trained)) if name != other)
        reason = f"{trained[index]!r} as class {index}, the data has {current[index]!r}"
    raise UserError(key, f"other classes than the run in {folder}, which has {reason}")


def check_train_images(
    folder: Path, config: TrainConfig, state: State, images: int, steps_per_epoch: int
) -> None:
    """Raise UserError if the training set has another size than that of the run in `folder`.

    Epochs and learning rates depend on it. A checkpoint of version 0.1.0 stores no sizes: its epoch is
    compared, which reveals no change within the first epoch.
    """
    if "train_images" in state:
        old, new = (state["train_images"], state["steps_per_epoch"]), (images, steps_per_epoch)
        trained_on = f"{old[0]:,} images, {old[1]:,} steps per epoch"
    else:
        old, new = state["epoch"], state["step"] // steps_per_epoch
        trained_on = f"{state['step']:,} steps in {old} epochs"
    if old != new:
        key = "data.train_fraction" if config.data.train_fraction != 1 else "data.root"
        current = f"the data now has {images:,} images, {steps_per_epoch:,} steps per epoch"
        reason = f"{current}; restore the training set, or name another output"
        raise UserError(key, f"the run in {folder} was trained on {trained_on}; {reason}")


def check_teacher(folder: Path, state: State, digest: str | None) -> None:
    """Raise UserError if the run in `folder` learned from a teacher with other weights than `digest`."""
    stored = state.get("teacher_digest")
    if None not in (stored, digest) and stored != digest:
        reason = "has other weights than the teacher of the run in"
        raise UserError("schedule.teacher", f"{reason} {folder}; restore them, or name another output")


def check_epoch(folder: Path, state: State, epoch: int, epoch_step: int) -> None:
    """Raise UserError if batch sizes of earlier epochs differ from those of the run in `folder`.

    Args:
        folder: the run's folder.
        state: its checkpoint.
        epoch, epoch_step: position of the checkpoint's step by the current configuration.
    """
    stored = (state["epoch"], state.get("epoch_step", epoch_step))
    if stored != (epoch, epoch_step):
        reason = (
            f"the run in {folder} finished {stored[1]} steps of epoch {stored[0] + 1}, which would now be"
        )
        reason += f" {epoch_step} steps of epoch {epoch + 1}; keep the batch sizes of finished epochs"
        raise UserError("schedule.progressive_resizing", reason)


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the resolved configuration to config.yaml, for --config. Raise OSError if that fails."""
    content = with_absolute_paths(as_tree(dataclasses.replace(config, resume="auto")))
    write_durably(folder / CONFIG, yaml_text(content))


def begin_run(folder: Path, config: TrainConfig) -> None:
    """Prepare `folder` for training: write config.yaml, remove partial files and the old summary."""
    try:
        _refuse_links(folder)
        (folder / FOLDER).mkdir(exist_ok=True)
        checkpoint_files.remove_partial_files(folder)
        files.remove_leftovers(folder, "|".join(map(re.escape, (CONFIG, SUMMARY, METRICS))))
        (folder / SUMMARY).unlink(missing_ok=True)
        write_config(folder, config)
    except OSError as error:
        raise _not_writable(folder, error) from None


def finished_top1(folder: Path, state: State, config: TrainConfig) -> float | None:
    """Return the final top-1 in percent if the run that `config` describes is finished, else None."""
    limit = config.schedule.max_steps
    is_trained = state["epoch"] >= config.schedule.total_epochs or (
        limit is not None and state["step"] >= limit
    )
    evaluations = evaluations_since_best(state, config.eval_every)
    if not is_trained and not is_stopped_early(evaluations, config.schedule.patience):
        return None
    try:
        top1 = float(files.parse_json(files.read_text(folder / SUMMARY, MAX_JSON_BYTES))[0]["top1"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return top1 if 0 <= top1 <= 100 else None
