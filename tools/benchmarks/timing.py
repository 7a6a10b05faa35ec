"""Time, peak memory and peak rates of the machine."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from vil.attention.local.fallback import KernelError

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

MIN_SAMPLE_S = 0.01
"""Minimal duration of a sample: fast functions are called several times."""
RATE_SIZES = {"cpu": (256 * 2**20, 1024), "cuda": (2**30, 8192)}
"""Bytes of the copy and side of the matrices in `measure_rates`, by device type."""


class Cost(NamedTuple):
    """Lower bound on the work of a pass: bytes read or written once, and multiply-adds."""

    bytes: int
    multiply_adds: int


class Rates(NamedTuple):
    """Peak rates of a machine, per second."""

    bytes: float
    multiply_adds: float

    def min_seconds(self, cost: Cost) -> float:
        """Return the roofline of `cost`."""
        return max(cost.bytes / self.bytes, cost.multiply_adds / self.multiply_adds)


class Missing(NamedTuple):
    """Reason why a figure could not be measured, on one line; `is_failure` if the method broke down."""

    reason: str
    is_failure: bool = False


@dataclass
class Measurement:
    """Figures of one method: `labels` identify it, `values` are in seconds or bytes."""

    labels: dict[str, Any]
    values: dict[str, float | Missing]

    def get(self, key: str, unit: float = 1.0) -> float | None:
        """Return a value in `unit`, or None if it is missing."""
        value = self.values.get(key)
        return None if value is None or isinstance(value, Missing) else value / unit

    @property
    def note(self) -> str:
        """The reasons of missing values."""
        return "; ".join(dict.fromkeys(x.reason for x in self.values.values() if isinstance(x, Missing)))

    @property
    def has_failed(self) -> bool:
        """True if a value is missing because the method broke down."""
        return any(isinstance(x, Missing) and x.is_failure for x in self.values.values())


class TimingOptions(NamedTuple):
    """Maximal number of samples of a function, and maximal time of a function in seconds."""

    rounds: int = 15
    seconds: float = 10.0

    def __str__(self) -> str:
        return f"Median of up to {self.rounds} rounds"


def describe_error(error: Exception) -> Missing:
    """Return the reason to report for `error`; limits of a method or of the memory are not failures."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return Missing("out of memory")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ValueError | NotImplementedError) and not isinstance(error, KernelError):
        return Missing(lines[0])
    cause = next((line for line in lines if "Error: " in line), lines[0])
    return Missing(f"{type(error).__name__}: {cause}"[:300], is_failure=True)


def try_measure(function: Callable[[], Result], device: torch.device) -> Result | Missing:
    """Return the result of `function`, or a description of the exception that it raised."""
    try:
        result = function()
        synchronize(device)
        return result
    except Exception as error:
        missing = describe_error(error)
    if device.type == "cuda":  # after the except clause, which keeps tensors alive
        torch.cuda.empty_cache()
    return missing


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Return the mean duration of `calls` consecutive calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def time_interleaved(
    functions: Mapping[Key, Callable[[], Any]], device: torch.device, options: TimingOptions
) -> dict[Key, float | Missing]:
    """Return the median seconds per call of each function, after a warm-up.

    The functions take turns in every round, so that noise of the machine affects all alike. A function leaves
    after it has run for `options.seconds`, but is timed at least once.
    """

    def warm_up(function: Callable[[], Any]) -> int:
        for _ in range(2):  # compiles, autotunes, fills caches
            function()
        calls = math.ceil(MIN_SAMPLE_S / seconds_per_call(function, 1, device))
        return min(100, max(1, calls))

    warm = {key: try_measure(partial(warm_up, function), device) for key, function in functions.items()}
    samples: dict[Key, list[float]] = {key: [] for key in functions}
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False, disable=None):
        for key, calls in warm.items():
            if isinstance(calls, Missing):
                continue
            if not samples[key] or sum(samples[key]) * calls < options.seconds:
                samples[key].append(seconds_per_call(functions[key], calls, device))
    return {key: x if isinstance(x, Missing) else statistics.median(samples[key]) for key, x in warm.items()}


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes that `function` adds at its peak on a GPU. An earlier call must have filled caches."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def memory_kind(device: torch.device) -> str:
    """Return a description of the memory measured on `device`: a CPU has no exact meter of a peak."""
    return "peak of a step" if device.type == "cuda" else "kept for backward"


def memory_limit(device: torch.device) -> int:
    """Return the bytes that a method may use: the free memory of a GPU, or a quarter of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def measure_rates(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int] | None = None) -> Rates:
    """Return the rates of a copy and a matrix product (bytes and side: `sizes`), the best of eleven each."""
    copy_bytes, side = sizes or RATE_SIZES[device.type]
    source = torch.ones(copy_bytes // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device).to(dtype)
    copy = min(seconds_per_call(lambda: target.copy_(source), 1, device) for _ in range(11))
    product = min(seconds_per_call(lambda: matrix @ matrix, 1, device) for _ in range(11))
    return Rates(2 * copy_bytes / copy, side**3 / product)


def describe_machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU and its threads, and versions of torch, triton and Python."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        path = Path("/proc/cpuinfo")
        match = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8")) if path.exists() else None
        name = match[1] if match else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{name}; torch {torch.__version__}, triton {triton}, python {platform.python_version()}"
