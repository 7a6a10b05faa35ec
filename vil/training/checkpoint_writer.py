"""Writes the checkpoints of a run beside the training, and keeps the newest few of them."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vil.checkpoint_files import (
    BEST,
    FOLDER,
    check_digest,
    digest_file,
    keep_damaged,
    step_file,
    step_files,
)
from vil.config import ConfigError
from vil.runtime.files import refuse_link
from vil.training import checkpoint

RETRIES = (1.0, 4.0)
"""Seconds before each further try to write what could not be written; a failing save ends after the last."""

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves a run, one checkpoint at a time, in a thread of its own where memory has room for a copy.

    A checkpoint that cannot be written is retried, then given up with a warning: the old ones stand, training
    goes on, and the next save is the next chance.

    Args:
        folder: the run's.
        keep: how many checkpoints to keep beside best.pt.
        prepare: called before each write, by which time what the checkpoint relies on must be on the disk.
    """

    def __init__(self, folder: Path, keep: int, prepare: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.problem: str | None = None
        """What kept the last save from the disk; None where nothing did."""
        self._keep = keep
        self._prepare = prepare
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._unsaved: tuple[Mapping[str, Any], bool] | None = None  # the last save, where it failed
        self._unsaved_best: Mapping[str, Any] | None = None
        self._whole: set[Path] = set()  # files known to be whole

    def save(self, state: Mapping[str, Any], is_best: bool) -> None:
        """Saves `state`, as best.pt too if it is the best; returns as soon as `state` may change again."""
        self.wait()
        size = state_size(state)
        if 2 * size < available_memory():
            try:
                content = _copied(state)
            except (MemoryError, RuntimeError):  # PyTorch's own lack of memory is the latter
                self._write(state, is_best)
            else:
                self._thread = threading.Thread(
                    target=self._run, args=(content, is_best), name="checkpoint", daemon=True
                )
                self._thread.start()
        else:
            self._write(state, is_best)

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def finish(self) -> str | None:
        """Waits, and tries once more to write what could not be; returns what keeps it from the disk."""
        self.wait()
        if self._unsaved is not None:
            self._write(*self._unsaved)
        return self.problem

    def close(self) -> None:
        """Waits for what is being written, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, state: Mapping[str, Any], is_best: bool) -> None:
        try:
            self._write(state, is_best)
        except BaseException as error:  # whatever it is belongs to the thread that trains
            self._failure = error

    def _write(self, state: Mapping[str, Any], is_best: bool) -> None:
        path = step_file(self.folder, state["step"])
        best = self.folder / BEST
        for seconds in (*RETRIES, None):
            try:
                self._prepare()
                refuse_link(self.folder / FOLDER)
                (self.folder / FOLDER).mkdir(exist_ok=True)
                for target in (path, best) if is_best else (path,):
                    if target.exists() and not self._is_whole(target):
                        keep_damaged(target)
                if is_best:  # first: killed between the two, the run repeats this evaluation
                    checkpoint.save(best, dict(state))
                    checkpoint.copy(best, path)
                else:
                    if self._unsaved_best is not None:
                        checkpoint.save(best, dict(self._unsaved_best))
                    checkpoint.save(path, dict(state))
                self.problem = None
                break
            except OSError as error:
                reason = error.strerror or str(error)
                what = f"the checkpoint of step {state['step']}"
                self.problem = f"{what} cannot be written to {path.parent}: {reason}"
                if seconds is not None:
                    time.sleep(seconds)
        if self.problem is None:
            self._unsaved = self._unsaved_best = None
            self._whole |= {path, best} if is_best else {path}
            self._prune(state["step"])
        else:
            self._unsaved = state, is_best
            if is_best and threading.current_thread() is self._thread:  # a copy, which stays what it is
                self._unsaved_best = state
            _logger.warning("warning: %s; the older ones stand, and training goes on", self.problem)

    def _prune(self, step: int) -> None:
        """Removes all whole checkpoints but the newest; damaged ones stay."""
        with suppress(OSError, ConfigError):
            earlier = [path for number, path in step_files(self.folder) if number <= step]
            for path in list(filter(self._is_whole, earlier))[self._keep :]:
                path.unlink()
                digest_file(path).unlink()
                self._whole.discard(path)

    def _is_whole(self, path: Path) -> bool:
        if path in self._whole:
            return True
        try:
            check_digest(path, required=True)
        except ConfigError:
            return False
        self._whole.add(path)
        return True


def check_room(folder: Path, weights: Mapping[str, Any], has_ema: bool, keep: int) -> None:
    """Compares the free space with what the checkpoints of a run will take.

    Args:
        folder: the run's.
        weights: state dict of the model.
        has_ema: whether their average is saved too.
        keep: how many checkpoints are kept beside best.pt.

    Raises:
        ConfigError: there is less.
    """
    one = state_size(weights) * (4 if has_ema else 3)  # with two moments, as Adam has; others have fewer
    needed = one * (keep + 2)  # the best, and the one that is being written
    here = (folder / FOLDER).glob("*.pt*")  # what a killed save left will go
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in here)
    if needed > free:
        reason = f"the checkpoints need about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise ConfigError("output", f"{folder}: {reason}")


def state_size(state: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(state_size, state.values()))
    return sum(map(state_size, state)) if isinstance(state, list | tuple) else 0


def available_memory() -> int:
    """Bytes that this machine, and the control groups that hold this process, can still give."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            limits += _left_in_group(*line.split(":", 2)[1:])
    return min(limits)


def _left_in_group(controllers: str, place: str) -> list[int]:
    """Bytes that a control group (version 1 or 2) and those that hold it have left, page cache included."""
    of_version_1 = "memory" in controllers.split(",")
    if controllers and not of_version_1:
        return []
    root = Path("/sys/fs/cgroup/memory" if of_version_1 else "/sys/fs/cgroup")
    files = ("limit_in_bytes", "usage_in_bytes") if of_version_1 else ("max", "current")
    group, left = root / place.lstrip("/"), []
    for folder in (group, *group.parents):
        if root not in (folder, *folder.parents):
            break
        with suppress(OSError, ValueError):
            most, used = (int((folder / f"memory.{name}").read_text()) for name in files)
            counted = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = counted.get("total_inactive_file") or counted.get("inactive_file") or 0
            left.append(most - used + int(cache))
    return left


def _copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_copied, state))
    return state
