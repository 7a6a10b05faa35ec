"""A run's folder: who may use it, what it holds, and whether what is asked for continues it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from vil import checkpoint_files
from vil.config import ConfigError, TrainConfig, of_option
from vil.runtime.files import (
    MAX_JSON_BYTES,
    parse_json,
    read_text,
    refuse_link,
    remove_leftovers,
    write_durably,
)
from vil.schema import as_tree, stored_tree, timm_start_options, without_timm_start_options
from vil.training import checkpoint
from vil.training.distributed import from_main
from vil.training.folder_lock import FolderLock
from vil.training.logging import METRICS, TENSORBOARD, leaves
from vil.yaml_files import read_yaml

_logger = logging.getLogger(__name__)

CONFIG, SUMMARY = "config.yaml", "summary.json"
_FOLDERS = (str(checkpoint_files.FOLDER), TENSORBOARD)

_FIXED = ("model", "data.source", "schedule.batch_size", "schedule.optimizer", "seed")
"""Sections and keys without which a continued run would be another run."""

SILENT = ("output", "resume", "progress", "data.download")
"""Keys whose difference is nobody's concern."""


def holds_run(folder: Path) -> bool:
    """Whether a run was started in `folder`."""
    best = folder / checkpoint_files.BEST
    return (folder / CONFIG).exists() or best.exists() or bool(checkpoint_files.step_files(folder))


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keeps every other run out of `folder`, by a lock of rank 0; every rank calls this.

    Raises:
        ConfigError: on every rank, where another process is at work there, or the folder cannot be written.
    """
    lock = FolderLock(folder)
    from_main(lock.acquire)
    try:
        yield
    finally:
        is_unused = False
        with suppress(OSError, ConfigError):  # a folder that cannot be read now
            is_unused = not holds_run(folder)
        lock.release(remove=is_unused)


def open_run(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The newest checkpoint of the run in `folder` that is whole, to continue from; None where there is none.

    Raises:
        ConfigError: the folder cannot be written, holds a run that must not be continued, holds no checkpoint
            that is whole beside damaged ones, or the run in it is not the one that `config` describes.
    """
    if config.resume == "never" and holds_run(folder):
        raise ConfigError(
            "output", f"{folder} holds a run; resume: auto continues it, or name another folder"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        _refuse_links(folder)
    except OSError as error:
        raise _not_writable(folder, error) from None
    with of_option("output"):
        found = checkpoint_files.newest(folder, checkpoint.read)
    if found is None:
        _check_start(folder, config)
        return None
    state = found[1]
    if state["best"] is not None and found[0] != folder / checkpoint_files.BEST:
        _restore_best(folder, state)
    for key, before, now in differences(state["config"], config):
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(
                key, f"the run in {folder} has {before}, not {now}; name another output or keep its value"
            )
    return state


def _check_start(folder: Path, config: TrainConfig) -> None:
    """Refuse to begin anew, with random weights, a run that timm's weights were to start.

    Its config.yaml names the options, which only the command line gives: a run that ended before its
    first checkpoint needs them once more.

    Raises:
        ConfigError: the line does not give them.
    """
    if not (folder / CONFIG).exists():
        return
    stored = read_yaml(folder / CONFIG)
    model = stored.get("model") if isinstance(stored, dict) else None
    before = timm_start_options(model.get("timm_options") if isinstance(model, dict) else None)
    if lacking := sorted(before - timm_start_options(config.model.timm_options)):
        reason = f"the run in {folder} was started with {', '.join(lacking)} and has no checkpoint yet"
        raise ConfigError("model.timm_options", f"{reason}; give the same command again")


def _refuse_links(folder: Path) -> None:
    """Raise OSError where a folder that a run writes to is a link: it may lead out of the run's folder."""
    for name in _FOLDERS:
        refuse_link(folder / name)


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    where = error.filename if isinstance(error.filename, str) else folder
    return ConfigError("output", f"{where} cannot be written: {error.strerror}")


def _restore_best(folder: Path, state: dict[str, Any]) -> None:
    """Where best.pt is damaged, takes its place from another checkpoint, or has the best chosen anew."""
    best = folder / checkpoint_files.BEST
    try:
        checkpoint_files.check_digest(best, required=True)
        return
    except ConfigError as error:
        problem = f"warning: {error}"
    for step, path in checkpoint_files.step_files(folder):
        try:
            checkpoint_files.check_digest(path, required=True)
            other = checkpoint.read(path)
        except ConfigError:
            continue
        is_same = other["best"] == state["best"] and step == other["finished_step"]
        # Epochs are counted from 1 where they are the best's, and a run may end within one.
        if is_same and state["best"]["epoch"] in (other["epoch"], other["epoch"] + 1):
            try:
                checkpoint_files.keep_damaged(best)
                checkpoint.copy(path, best)
            except OSError as error:
                problem += f", and cannot be restored from {path}: {error.strerror}"
                break
            _logger.warning("%s; it was restored from %s", problem, path)
            return
    state["best"] = None
    _logger.warning("%s; the best is chosen among the evaluations to come", problem)


def differences(stored: dict[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(key, stored value, value of `config`) of all options that differ and matter to the run.

    A number of classes that is left to the data differs from none.
    """
    stored = {**stored, "model": without_timm_start_options(stored["model"])}
    before, now = leaves(json.loads(json.dumps(stored))), leaves(stored_tree(config))
    if now["model.num_classes"] is None:
        now["model.num_classes"] = before.get("model.num_classes")
    # An option that did not exist when the run began had the effect that is now its default.
    defaults = leaves(stored_tree(TrainConfig()))
    keys = [key for key in now if key not in SILENT]
    pairs = [(key, before.get(key, defaults[key]), now[key]) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]


def check_class_names(folder: Path, config: TrainConfig, before: Sequence[str], now: Sequence[str]) -> None:
    """Compares the classes of the run in `folder` with those of the data, in the order of the head.

    Raises:
        ConfigError: they differ.
    """
    if list(now) == list(before):
        return
    key = "data.root" if config.data.source == "folder" else "data.source"
    if len(now) != len(before):
        reason = f"{len(before)} classes, the data has {len(now)}"
    else:
        number = next(i for i, (name, other) in enumerate(zip(now, before)) if name != other)
        reason = f"{before[number]!r} as class {number}, the data has {now[number]!r}"
    raise ConfigError(key, f"other classes than the run in {folder}, which has {reason}")


def check_train_images(
    folder: Path, config: TrainConfig, state: Mapping[str, Any], images: int, steps_per_epoch: int
) -> None:
    """Compare the training set of the run in `folder` with the one that it would continue on.

    A step means another epoch and another learning rate once an epoch has another length.

    Args:
        folder: the run's.
        config: what the run is asked to continue with.
        state: its checkpoint; one of version 0.1.0 tells the epoch of its step alone, by which a change
            within the first epoch goes unseen.
        images: number of training images.
        steps_per_epoch: optimiser steps of an epoch.

    Raises:
        ConfigError: the number of images or of steps per epoch differs.
    """
    if "train_images" in state:
        before, now = (state["train_images"], state["steps_per_epoch"]), (images, steps_per_epoch)
        trained_on = f"{before[0]:,} images, {before[1]:,} steps per epoch"
    else:
        before, now = state["epoch"], state["step"] // steps_per_epoch
        trained_on = f"{state['step']:,} steps in {before} epochs"
    if before != now:
        key = "data.train_fraction" if config.data.train_fraction != 1 else "data.root"
        found = f"the data now has {images:,} images, {steps_per_epoch:,} steps per epoch"
        reason = f"{found}; restore the training set, or name another output"
        raise ConfigError(key, f"the run in {folder} was trained on {trained_on}; {reason}")


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the resolved configuration to config.yaml, as --config reads it on a line with --output."""
    content = as_tree(dataclasses.replace(config, resume="auto"))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_durably(folder / CONFIG, text)


def begin(folder: Path, config: TrainConfig) -> None:
    """Makes `folder` that of a run in progress: it has a configuration, and no summary of an earlier end.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        _refuse_links(folder)
        (folder / checkpoint_files.FOLDER).mkdir(exist_ok=True)
        checkpoint_files.tidy(folder)
        remove_leftovers(folder, "|".join(map(re.escape, (CONFIG, SUMMARY, METRICS))))
        (folder / SUMMARY).unlink(missing_ok=True)
        write_config(folder, config)
    except OSError as error:
        raise _not_writable(folder, error) from None


def finished_top1(folder: Path, state: dict[str, Any], config: TrainConfig) -> float | None:
    """Top-1 in percent, when nothing of the run that `config` asks for is left to do; else None."""
    limit = config.schedule.max_steps
    trained = state["epoch"] >= config.schedule.epochs or (limit is not None and state["step"] >= limit)
    if not trained:
        return None
    try:
        return float(parse_json(read_text(folder / SUMMARY, MAX_JSON_BYTES))[0]["top1"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
