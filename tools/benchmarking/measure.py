"""Time, memory, and what the machine can do."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from tools.benchmarking.problem import Rates
from vil.attention.local.fallback import KernelError

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

SAMPLE = 0.01
"""Seconds that one sample lasts at least: a quick function is called several times in it."""
COPIED, MULTIPLIED = {"cpu": 256 * 2**20, "cuda": 2**30}, {"cpu": 1024, "cuda": 8192}
"""Per kind of device, for `rates`: bytes that are copied, and the side of matrices that are multiplied."""


@dataclass(frozen=True)
class Missing:
    """A figure that there is not, and why; `failed` where the method should have been able to give it."""

    reason: str
    failed: bool = False


def reason_for(error: Exception) -> Missing:
    """What to write in the place of a figure after `error`: of a limit, of memory, or a failure."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return Missing("out of memory")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ValueError | NotImplementedError) and not isinstance(error, KernelError):
        return Missing(lines[0])
    cause = next((line for line in lines if "Error: " in line), lines[0])
    return Missing(f"{type(error).__name__}: {cause}"[:300], failed=True)


def attempt(function: Callable[[], Result], device: torch.device) -> Result | Missing:
    """What `function` returns, or why it cannot be done. Whatever a rival's library raises ends nothing."""
    try:
        result = function()
        synchronize(device)
        return result
    except Exception as error:
        missing = reason_for(error)
    if device.type == "cuda":  # after the except clause, which keeps tensors alive
        torch.cuda.empty_cache()
    return missing


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of one call, from `calls` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def interleaved(
    functions: Mapping[Key, Callable[[], Any]],
    *,
    device: torch.device,
    repeats: int,
    seconds: float,
    fastest: bool = False,
) -> dict[Key, float | Missing]:
    """Median (or, with `fastest`, least) seconds of each function, after a warm-up.

    In each of `repeats` rounds all functions take turns, so that the noise of the machine hits all alike. A
    function takes part until it has run for `seconds` altogether, and at least once.
    """
    calls: dict[Key, int] = {}
    found: dict[Key, float | Missing] = {}
    samples: dict[Key, list[float]] = {}
    for key, function in functions.items():
        for _ in range(2):  # compiles, tunes, fills caches
            result = attempt(function, device)
            if isinstance(result, Missing):
                break
        if isinstance(result, Missing):
            found[key] = result
            continue
        calls[key] = min(100, max(1, math.ceil(SAMPLE / seconds_of(function, 1, device))))
        samples[key] = []
    for _ in tqdm(range(repeats), desc="rounds", leave=False, disable=None):
        for key, durations in samples.items():
            if not durations or sum(durations) * calls[key] < seconds:
                durations.append(seconds_of(functions[key], calls[key], device))
    summary = min if fastest else statistics.median
    found |= {key: summary(durations) for key, durations in samples.items()}
    return {key: found[key] for key in functions}


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """The kernels that `function` starts, recorded as a CUDA graph: without the host's time to start them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `function`, which has run before, adds on a GPU at its peak."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Bytes and multiply-adds per second of a large copy and a large product of matrices: the best of ten."""
    source = torch.ones(COPIED[device.type] // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), 1, device) for _ in range(11))
    side = MULTIPLIED[device.type]
    matrix = torch.randn(side, side, device=device).to(dtype)
    product = min(seconds_of(lambda: matrix @ matrix, 1, device) for _ in range(11))
    return Rates(2 * COPIED[device.type] / copy, side**3 / product)


def default_memory(device: torch.device) -> int:
    """Bytes that a method may need: what is free on a GPU, a quarter of the machine's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def machine(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> str:
    """Versions of PyTorch and Triton."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__}, triton {triton}, python {platform.python_version()}"
