"""Sections `speed`, `flex` and `tuning`: stages 1 and 2 of ViL-Small, forward and backward."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from tools.benchmarking import measure
from tools.benchmarking.attention import Row, measure_problem
from tools.benchmarking.measure import Missing
from tools.benchmarking.problem import Problem, leaves_of
from tools.gpu_check.report import NotApplicableError, Report
from tools.gpu_check.runner import Options
from vil.attention.local import local_attention
from vil.models.stage import map_sizes
from vil.models.zoo import stages_of

TUNING = tuple((warps, stages) for warps in (4, 8) for stages in (1, 2, 3, 4))
"""Warps of a program and stages of its pipeline that are tried."""
CHOSEN = (4, 3)
"""What `fused` takes for the shapes here."""


def compare(options: Options, report: Report) -> None:
    """Time the kernels, attention to all tokens, the sliding-chunk baseline and, where installed, NATTEN."""
    device, dtype = torch.device(options.device), _dtype(options)
    rates = measure.rates(device, dtype)
    methods = ["chunked" if options.small else "fused", "full", "sliding_chunk", "natten"]
    for number in (1, 2):
        rows = measure_problem(_stage(options, number), methods, rates, _arguments(options))
        _compare_rows(f"stage {number}", rows, report, number == 1)
    if options.small:
        return
    for number in (1, 2):
        for name, milliseconds in kernel_times(_stage(options, number)).items():
            report.add(f"stage {number}: {name}", milliseconds, "ms", shown=number == 1)
    rows = measure_problem(_stage(options, 1, (112, 112), 32), ["fused", "full"], rates, _arguments(options))
    ours, full = rows
    report.add(
        "112×112: × as fast as full", _ratio(full.training, ours.training), target="8", note=_why(rows)
    )


def compare_flex(options: Options, report: Report) -> None:
    """Time FlexAttention on stage 1."""
    if options.small:
        raise NotApplicableError("FlexAttention compiles for minutes on a CPU")
    device, dtype = torch.device(options.device), _dtype(options)
    rows = measure_problem(
        _stage(options, 1), ["fused", "flex"], measure.rates(device, dtype), _arguments(options)
    )
    ratio = _ratio(rows[1].training, rows[0].training)
    report.add("stage 1: × as fast as flex", ratio, note=_why(rows))


def _compare_rows(label: str, rows: Sequence[Row], report: Report, first: bool) -> None:
    by_name = {row.method: row for row in rows}
    ours = rows[0]
    for row in rows:
        for key in ("forward", "training"):
            value = getattr(row, key)
            found = None if isinstance(value, Missing) else 1e3 * value
            name = f"{label}: {row.method}, {'forward + backward' if key == 'training' else key}"
            failed = isinstance(value, Missing) and value.failed and row is ours
            report.add(
                name, found, "ms", note=value.reason if isinstance(value, Missing) else "",
                passed=False if failed else None, shown=row is ours or row.method == "natten",
            )  # fmt: skip
    for method, target in (("sliding_chunk", "10"), ("full", "3")):
        ratio = _ratio(by_name[method].training, ours.training)
        report.add(f"{label}: × as fast as {method}", ratio, target=target if first else "")
    if ours.bounds is not None:
        for number, key in enumerate(("forward", "training")):
            value = getattr(ours, key)
            times = None if isinstance(value, Missing) else value / ours.bounds[number]
            target = "4" if first and key == "forward" else ""
            name = "forward" if key == "forward" else "forward + backward"
            report.add(f"{label}: {name}, × the roofline", times, target=target)


def kernel_times(problem: Problem) -> dict[str, float]:
    """Return milliseconds of each kernel in one forward and backward pass, from the profiler."""
    step = _step(problem)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name = event.key.removesuffix("_kernel") if event.key.endswith("_kernel") else "other operators"
        found[name] += event.self_device_time_total / 10 / 1e3
    return dict(found)


def tune(options: Options, report: Report) -> None:
    """Time each kernel of stage 1 with other numbers of warps and pipeline stages."""
    if options.small:
        raise NotApplicableError("a CPU has no warps")
    problem = _stage(options, 1)
    times: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for choice in (CHOSEN, *[other for other in TUNING if other != CHOSEN]):
        if options.seconds_left() < 8:
            report.add("time for all choices", note=f"stopped before {choice}")
            break
        try:
            with _choosing(*choice):
                found = kernel_times(problem)
        except Exception as error:  # more shared memory than there is, for instance
            report.add(f"{choice[0]} warps, {choice[1]} stages", note=str(error), shown=False)
            continue
        for name, milliseconds in found.items():
            times[name][choice] = milliseconds
            about = {"note": f"{choice[0]} warps, {choice[1]} stages", "shown": False}
            report.add(name, milliseconds, "ms", **about)
    for name, tried in times.items():
        if name != "other operators" and CHOSEN in tried:
            best = min(tried, key=tried.__getitem__)
            note = f"{best[0]} warps, {best[1]} stages; {tried[CHOSEN]:.3f} ms as it is"
            report.add(f"stage 1: {name}, best choice", tried[best], "ms", note=note)


@contextlib.contextmanager
def _choosing(warps: int, stages: int) -> Iterator[None]:
    """While this lasts, kernels are launched with so many warps and stages."""
    from vil.attention.local import fused

    common: Callable[..., dict[str, Any]] = fused._Call.common

    def chosen(self: Any) -> dict[str, Any]:
        return {**common(self), "num_warps": warps, "num_stages": stages}

    with mock.patch.object(fused._Call, "common", chosen):
        yield


def compile_choice(capability: int, warps: int, stages: int) -> int:
    """Compile the kernels of stage 1 for one choice, in the process of a pool; return how many could be."""
    from tools.compile_kernels import compile_kernels
    from vil.attention.local.geometry import Window

    with contextlib.suppress(Exception), _choosing(warps, stages):  # `tune` says which cannot be
        return len(compile_kernels(capability, "bfloat16", 32, Window((56, 56), 7)))
    return 0


def _stage(options: Options, number: int, size: tuple[int, int] | None = None, batch: int = 128) -> Problem:
    stages = stages_of("vil_small")
    stage, own_size = stages[number - 1], map_sizes(stages, (224, 224))[number - 1]
    batch, size = (1, (14, 14)) if options.small else (batch, size or own_size)
    return Problem(
        f"vil_small stage {number}", batch, stage.heads, stage.dim // stage.heads, size, stage.window,
        stage.global_tokens, "chunk", "all", True, _dtype(options), torch.device(options.device),
    )  # fmt: skip


def _step(problem: Problem) -> Callable[[], Any]:
    inputs = problem.inputs()
    *tokens, table, bias, _ = inputs
    gradient = problem.output_gradient(inputs.query)

    def step() -> Any:
        output = local_attention(
            *tokens,
            size=problem.size,
            window=problem.window,
            bias_table=table,
            global_bias=bias,
            backend="fused",
        )
        return torch.autograd.grad(output, leaves_of(inputs), gradient)

    return step


def _arguments(options: Options) -> Namespace:
    repeats, seconds = (1, 0.5) if options.small else (15, 2.0)
    return Namespace(
        repeats=repeats, seconds=seconds, fastest=False, cuda_graphs=False, skip_memory_above=None
    )


def _dtype(options: Options) -> torch.dtype:
    return torch.float32 if options.small else torch.bfloat16


def _ratio(theirs: float | Missing, ours: float | Missing) -> float | None:
    return None if isinstance(theirs, Missing) or isinstance(ours, Missing) else theirs / ours


def _why(rows: Sequence[Row]) -> str:
    return "; ".join(f"{r.method}: {r.training.reason}" for r in rows if isinstance(r.training, Missing))
