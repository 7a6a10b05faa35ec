"""Simulate the input of large training runs on one machine without a GPU, and print Markdown tables.

    python -m tools.dev.simulate_scale                          order and index, 1.28 and 14.2 million images
    python -m tools.dev.simulate_scale --images 10000 --ranks 1 4 64 --batch-size 512
    python -m tools.dev.simulate_scale --images --processes 64  start-up of 64 processes by torchrun

Order: every number of ranks draws a whole epoch. It is an error if an image occurs twice, if the global
batches differ from those of one rank, or if a resumed epoch differs. Times and memory are those of one rank.

Index: a folder of empty names is listed as a real one is (without a disk: `os.scandir` is replaced), its
index is written, and read again by new processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar
from unittest import mock

import numpy as np

from data.samplers import MicroBatches
from data.sources.folder import ImageFolder
from tools.markdown_table import markdown_table
from vil import command_line
from vil.command_line import ToolParser, bounded_int
from vil.errors import UserError
from vil.runtime.console import print_text

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parents[2]
CLASSES = 21_841
SEED, EPOCH = 0, 3


# --- Order --------------------------------------------------------------------------------------------------


def check_order(num_images: int, batch_size: int, world_size: int, expected: np.ndarray | None) -> np.ndarray:
    """Draw an epoch on all ranks, and return the step of each image, (images,); -1 if it is not drawn.

    Raises:
        UserError: an image is drawn twice, or in another step than `expected`.
    """
    steps = np.full(num_images, -1, dtype=np.int32)
    drawn = 0
    for rank in range(world_size):
        sampler = MicroBatches(num_images, batch_size, 1, SEED, rank=rank, world_size=world_size)
        sampler.set_epoch(EPOCH)
        for step, keys in enumerate(sampler):
            steps[[index for _, index, _ in keys]] = step
            drawn += len(keys)
    if drawn != np.count_nonzero(steps >= 0) or drawn != num_images // batch_size * batch_size:
        raise UserError("order", f"{num_images:,} images, {world_size} ranks: not every image once")
    if expected is not None and not np.array_equal(steps, expected):
        raise UserError("order", f"{num_images:,} images: batches of {world_size} ranks and of one differ")
    return steps


def measure_order(num_images: int, batch_size: int, world_size: int) -> dict[str, str]:
    """Return times and memory of the last rank, and check that resuming at some steps changes nothing."""
    sampler = MicroBatches(num_images, batch_size, 1, SEED, rank=world_size - 1, world_size=world_size)
    sampler.set_epoch(EPOCH)
    seconds, _ = timed(lambda: next(iter(sampler)))
    tracemalloc.start()
    next(iter(sampler))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    last = sampler.steps_per_epoch - 1
    whole = {step: keys for step, keys in enumerate(sampler) if step in (0, 1, last // 2, last)}
    resume_seconds = []
    for step, keys in whole.items():
        sampler.set_epoch(EPOCH, step)
        resumed_s, resumed = timed(lambda: next(iter(sampler)))
        resume_seconds.append(resumed_s)
        if resumed != keys:
            raise UserError("order", f"{num_images:,} images: resumed at step {step}, the batch differs")
    return {
        "first batch": f"{1e3 * seconds:.1f} ms",
        "resume": f"{1e3 * max(resume_seconds):.1f} ms",
        "memory of a rank": f"{peak / 1e6:.2f} MB",
    }


def order_rows(images: Sequence[int], ranks: Sequence[int], batch_size: int) -> Iterator[dict[str, str]]:
    """Yield a row for each number of images and ranks."""
    for num_images in images:
        expected = None
        for world_size in ranks:
            seconds, steps = timed(partial(check_order, num_images, batch_size, world_size, expected))
            expected = steps if expected is None else expected
            yield {
                "images": f"{num_images:,}",
                "ranks": str(world_size),
                **measure_order(num_images, batch_size, world_size),
                "whole epoch, all ranks": f"{seconds:.1f} s",
                "each image once": "yes",
                "same batches": "yes",
            }


# --- Index --------------------------------------------------------------------------------------------------


class SyntheticFolder:
    """A folder of classes with equally many images, as `os` shows it to this process.

    Args:
        num_images: images in all classes.
    """

    root = Path("/synthetic/train")

    def __init__(self, num_images: int) -> None:
        self.classes = tuple(f"n{index:08d}" for index in range(min(CLASSES, num_images)))
        self._sizes = np.diff(np.linspace(0, num_images, len(self.classes) + 1).astype(int)).tolist()
        self._numbers = {name: index for index, name in enumerate(self.classes)}
        self._stat, self._scandir = os.stat, os.scandir

    def stat(self, path: str | Path, **options: bool) -> os.stat_result | SimpleNamespace:
        """Return the status of a folder, modified long ago."""
        if not str(path).startswith(str(self.root)):
            return self._stat(path, **options)
        inode = 1 + self._numbers.get(Path(path).name, -1) + 1
        return SimpleNamespace(st_mode=0o40755, st_dev=1, st_ino=inode, st_size=0, st_mtime_ns=10**18)

    def scandir(self, path: str | Path) -> _Entries:
        """Return the entries of a folder."""
        name = Path(path).name
        if Path(path) == self.root:
            return _Entries(_Entry(folder, is_folder=True) for folder in self.classes)
        count = self._sizes[self._numbers[name]]
        return _Entries(_Entry(f"{name}_{number}.JPEG") for number in range(count))

    def open(self, index: str) -> ImageFolder:
        """Open the folder with its index in another folder."""
        statvfs = mock.patch("os.statvfs", return_value=os.statvfs_result([0] * 11))
        with statvfs, mock.patch("os.stat", self.stat), mock.patch("os.scandir", self.scandir):
            return ImageFolder(self.root, self.classes, "RGB", index)


class _Entries(list["_Entry"]):
    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Entry:
    __slots__ = ("_is_folder", "name")

    def __init__(self, name: str, is_folder: bool = False) -> None:
        self.name, self._is_folder = name, is_folder

    def is_dir(self) -> bool:
        return self._is_folder

    def is_symlink(self) -> bool:
        return False


def index_row(num_images: int) -> dict[str, str]:
    """Return times and memory of the first start and of the later ones, each measured in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (in_process(_open_index, num_images, folder) for _ in range(2))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "images": f"{num_images:,}",
        "index file, shared": f"{size / 1e6:,.0f} MB",
        "first start": f"{first['seconds']:.1f} s",
        "its peak": f"+{first['peak'] / 1e6:,.0f} MB",
        "later starts": f"{second['seconds']:.2f} s",
        "private memory of a process": f"+{second['private'] / 1e6:,.0f} MB",
    }


def _open_index(num_images: int, folder: str) -> dict[str, float]:
    synthetic = SyntheticFolder(num_images)
    before, peak_before = private_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, source = timed(lambda: synthetic.open(folder))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) * 1024.0
    for index in np.random.default_rng(0).integers(0, len(source), 1000).tolist():
        source.describe(index)
    return {"seconds": seconds, "peak": peak, "private": max(0.0, private_memory() - before)}


def private_memory() -> float:
    """Return the bytes that this process shares with no other one and with no file."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024.0 * sum(map(int, re.findall(r"^Private_Dirty: +(\d+)", text, re.MULTILINE)))


def in_process(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Return the result of a function, called in a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


# --- Start-up -----------------------------------------------------------------------------------------------


def start_up(processes: int) -> dict[str, str]:
    """Train two steps of a tiny model on processes that torchrun starts, by gloo; return time and memory.

    Raises:
        UserError: the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        options = {
            "output": folder,
            "device": "cpu",
            "model.name": "vil_tiny",
            "model.image_size": 32,
            "model.in_chans": 1,
            "schedule.batch_size": 4 * processes,
            "schedule.max_steps": 2,
            "data.workers": 0,
            "log_every": 1,
            "loggers": "[]",
            "progress": "false",
        }
        argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        job = subprocess.Popen(  # noqa: S603  # the words are those above
            [sys.executable, "-m", *launcher, "train.py", *argv],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        peak = [0.0]
        watcher = threading.Thread(target=_watch_memory, args=(job, peak), daemon=True)
        watcher.start()
        assert job.stdout is not None
        lines = [(time.perf_counter() - start, line.rstrip()) for line in job.stdout]
        if job.wait() != 0:
            raise UserError("processes", f"torchrun ended with status {job.returncode}: {lines[-1][1]}")
        watcher.join()
    first = next((seconds for seconds, line in lines if line.startswith("recipe:")), float("nan"))
    return {
        "processes": str(processes),
        "connected, model built": f"{first:.1f} s",
        "two steps, evaluated and saved": f"{lines[-1][0]:.1f} s",
        "memory of all processes": f"{peak[0] / 1e9:.1f} GB",
    }


def _watch_memory(job: subprocess.Popen[str], peak: list[float]) -> None:
    """Record the largest sum of the proportional memory of a job's processes until it ends."""
    while job.poll() is None:
        peak[0] = max(peak[0], sum(map(_proportional_memory, _descendants(job.pid))))
        time.sleep(1.0)


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [pid, *(found for child in children for found in _descendants(child))]


def _proportional_memory(pid: int) -> float:
    with suppress(OSError):
        found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return 1024.0 * int(found[1]) if found else 0.0
    return 0.0


def timed(function: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tools.dev.simulate_scale", description=__doc__)
    count = bounded_int(1)
    add = parser.add_argument
    images_help = "sizes of the data sets; none: no order and no index (default: 1281167 14197122)"
    add("--images", type=count, nargs="*", default=[1_281_167, 14_197_122], metavar="N", help=images_help)
    ranks_help = "numbers of ranks that draw an epoch (default: 1 8 64 512)"
    add("--ranks", type=count, nargs="+", default=[1, 8, 64, 512], metavar="N", help=ranks_help)
    add("--batch-size", type=count, default=4096, metavar="N", help="of all ranks (default: 4096)")
    processes_help = "numbers of processes that torchrun starts (default: none)"
    add("--processes", type=count, nargs="*", default=[], metavar="N", help=processes_help)
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the tables."""
    options = _parser().parse_args(argv)
    if options.images:
        print_text(markdown_table(list(order_rows(options.images, options.ranks, options.batch_size))))
        print_text(f"\n{markdown_table([index_row(count) for count in options.images])}")
    if options.processes:
        print_text(f"\n{markdown_table([start_up(count) for count in options.processes])}")


if __name__ == "__main__":
    command_line.main(main)
