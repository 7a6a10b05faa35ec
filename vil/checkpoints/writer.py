"""Write the checkpoints of a run in the background and keep the newest few."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from vil.checkpoints import checkpoint_files
from vil.checkpoints.checkpoint_files import BEST, FOLDER, check_digest, step_file, step_files
from vil.checkpoints.training_state import State, copy_training_state, write_training_state
from vil.errors import UserError, error_reason
from vil.runtime.files import refuse_link

RETRY_DELAYS_S = (1.0, 4.0)
"""Delay before each retry of a failed save."""

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writer of checkpoints, one at a time, in a background thread if memory has room for a copy.

    A failed save is retried, then skipped with a warning: the older checkpoints are kept and training
    continues.

    Args:
        folder: the run's folder.
        keep: number of checkpoints to keep in addition to best.pt.
        prepare: called before each write, to flush the files that the checkpoint refers to.
    """

    def __init__(self, folder: Path, keep: int, prepare: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.problem: str | None = None
        """Reason why the last save failed; None if it succeeded."""
        self._keep = keep
        self._prepare = prepare
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._unsaved: tuple[State, bool] | None = None  # the last save, if it failed
        self._unsaved_best: State | None = None
        self._intact: set[Path] = set()  # verified or written by this object

    def save(self, state: State, is_best: bool) -> None:
        """Save a state, also as best.pt if it is the best; return as soon as `state` may be changed."""
        self.wait()
        content = None
        if 2 * state_size(state) < available_memory():
            with suppress(MemoryError, RuntimeError):  # PyTorch raises RuntimeError for lack of memory
                content = {key: _copy_to_cpu(value) for key, value in state.items()}
        if content is None:
            self._write(state, is_best)
            return
        self._thread = threading.Thread(None, self._run, "checkpoint", (content, is_best), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the background save, and raise its unexpected exception, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def finish(self) -> str | None:
        """Wait, retry a failed save once more, and return the reason if it fails again."""
        self.wait()
        if self._unsaved is not None:
            self._write(*self._unsaved)
        return self.problem

    def close(self) -> None:
        """Wait for the background save, and ignore its result."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, state: State, is_best: bool) -> None:
        try:
            self._write(state, is_best)
        except BaseException as error:  # raised again in the main thread by `wait`
            self._failure = error

    def _write(self, state: State, is_best: bool) -> None:
        path = step_file(self.folder, state["step"])
        best = self.folder / BEST
        for delay in (*RETRY_DELAYS_S, None):
            try:
                self._prepare()
                refuse_link(self.folder / FOLDER)
                (self.folder / FOLDER).mkdir(exist_ok=True)
                for target in (path, best) if is_best else (path,):
                    if target.exists() and not self._is_intact(target):
                        checkpoint_files.keep_damaged(target)
                if is_best:  # best.pt first: a run that is killed in between repeats this evaluation
                    write_training_state(best, state)
                    copy_training_state(best, path)
                else:
                    if self._unsaved_best is not None:
                        write_training_state(best, self._unsaved_best)
                    write_training_state(path, state)
                self.problem = None
                break
            except OSError as error:
                subject = f"the checkpoint of step {state['step']}"
                self.problem = f"{subject} cannot be written to {path.parent}: {error_reason(error)}"
                if delay is not None:
                    time.sleep(delay)
        if self.problem is None:
            self._unsaved = self._unsaved_best = None
            self._intact |= {path, best} if is_best else {path}
            self._prune(state["step"])
        else:
            self._unsaved = state, is_best
            if is_best and threading.current_thread() is self._thread:  # an unchanging copy
                self._unsaved_best = state
            _logger.warning("warning: %s; older checkpoints are kept and training continues", self.problem)

    def _prune(self, step: int) -> None:
        """Remove all intact checkpoints but the newest; damaged ones are kept."""
        with suppress(OSError, UserError):
            earlier = [path for number, path in step_files(self.folder) if number <= step]
            for path in list(filter(self._is_intact, earlier))[self._keep :]:
                path.unlink()
                checkpoint_files.digest_file(path).unlink()
                self._intact.discard(path)

    def _is_intact(self, path: Path) -> bool:
        if path in self._intact:
            return True
        try:
            check_digest(path, required=True)
        except UserError:
            return False
        self._intact.add(path)
        return True


def check_disk_space(folder: Path, weights: State, has_ema: bool, keep: int) -> None:
    """Raise UserError if the disk has no room for best.pt and `keep` more checkpoints of a state dict."""
    checkpoint_bytes = state_size(weights) * (4 if has_ema else 3)  # with the two moments of Adam
    needed = checkpoint_bytes * (keep + 2)  # best.pt, and the one that is being written
    existing = (folder / FOLDER).glob("*.pt*")  # replaced or removed by the run
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in existing)
    if needed > free:
        reason = f"the checkpoints need about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise UserError("output", f"{folder}: {reason}")


def state_size(state: object) -> int:
    """Return the size in bytes of all tensors in nested mappings and sequences."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(state_size, state.values()))
    return sum(map(state_size, state)) if isinstance(state, list | tuple) else 0


def available_memory() -> int:
    """Return the bytes that this process can still allocate, within its control groups."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            limits += _free_in_control_groups(*line.split(":", 2)[1:])
    return min(limits)


def _free_in_control_groups(controllers: str, group: str) -> list[int]:
    """Return the free bytes, page cache included, of a control group (version 1 or 2) and of its parents."""
    is_version_1 = "memory" in controllers.split(",")
    if controllers and not is_version_1:
        return []
    root = Path("/sys/fs/cgroup/memory" if is_version_1 else "/sys/fs/cgroup")
    names = ("limit_in_bytes", "usage_in_bytes") if is_version_1 else ("max", "current")
    path, free = root / group.lstrip("/"), []
    for folder in (path, *path.parents):
        if root not in (folder, *folder.parents):
            break
        with suppress(OSError, ValueError):
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = statistics.get("total_inactive_file") or statistics.get("inactive_file") or 0
            free.append(limit - used + int(cache))
    return free


def _copy_to_cpu(state: object) -> object:
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_copy_to_cpu, state))
    return state
