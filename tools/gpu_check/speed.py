"""Sections `speed`, `flex` and `tuning`: stages 1 and 2 of ViL-Small, forward and backward."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from tools.benchmarks.attention import measure_shape, training_step
from tools.benchmarks.methods import METHODS
from tools.benchmarks.output import ratio
from tools.benchmarks.shapes import AttentionShape, zoo_shapes
from tools.benchmarks.timing import Measurement, Missing, TimingOptions, memory_limit
from tools.gpu_check.report import NotApplicableError, Report
from tools.gpu_check.runner import Options

TUNING = tuple((warps, stages) for warps in (4, 8) for stages in (1, 2, 3, 4))
"""Numbers of warps and pipeline stages to try."""
DEFAULT_LAUNCH = (4, 3)
"""Choice of `fused` for these shapes."""
PASSES = {"forward": "forward", "training": "forward + backward"}


def compare(options: Options, report: Report) -> None:
    """Time the kernels, full attention, the sliding-chunk baseline, and NATTEN if it is installed."""
    methods = ["chunked" if options.is_small else "fused", "full", "sliding_chunk", "natten"]
    shapes = [stage_shape(options, number) for number in (1, 2)]
    times = []
    for number, shape in enumerate(shapes, 1):
        measurements = _measure(options, shape, methods)
        _report_stage(f"stage {number}", measurements, report, is_first=number == 1)
        times.append(measurements[0].get("training", 1e-3))
    if options.is_small:
        return
    for number, (shape, total) in enumerate(zip(shapes, times), 1):
        by_kernel = profile_kernels(shape)
        for name, milliseconds in by_kernel.items():
            report.add(f"stage {number}: {name}", milliseconds, "ms", shown=number == 1)
        busy = ratio(100 * sum(by_kernel.values()), total)
        note = "of the time of forward + backward; in the rest it waits for the host"
        report.add(f"stage {number}: the GPU computes", busy, "%", note=note)
    fused, full = _measure(options, replace(shapes[0], height=112, width=112, batch=32), ["fused", "full"])
    report.add("112×112: × as fast as full", _speedup(fused, full), target="8", note=_notes(fused, full))


def compare_flex(options: Options, report: Report) -> None:
    """Time FlexAttention on stage 1."""
    if options.is_small:
        raise NotApplicableError("FlexAttention compiles for minutes on a CPU")
    fused, flex = _measure(options, stage_shape(options, 1), ["fused", "flex"])
    report.add("stage 1: × as fast as flex", _speedup(fused, flex), note=_notes(fused, flex))


def stage_shape(options: Options, number: int) -> AttentionShape:
    """Return the local attention of a stage of ViL-Small; a small map on a CPU."""
    stage = replace(zoo_shapes(["vil_small"])[number - 1], device=options.device)
    if options.is_small:
        return replace(stage, height=14, width=14)
    return replace(stage, batch=128, precision="bfloat16")


def _measure(options: Options, shape: AttentionShape, methods: Sequence[str]) -> list[Measurement]:
    timing = TimingOptions(1, 0.5) if options.is_small else TimingOptions(15, 2.0)
    limit = memory_limit(torch.device(options.device))
    return measure_shape(shape, methods, options.measure_rates(shape.precision), timing, limit)


def _report_stage(label: str, measurements: Sequence[Measurement], report: Report, *, is_first: bool) -> None:
    ours = measurements[0]
    for measurement in measurements:
        method = measurement.labels["method"]
        for key, name in PASSES.items():
            value = measurement.values.get(key, measurement.values["forward"])
            is_failure = isinstance(value, Missing) and value.is_failure and measurement is ours
            report.add(
                f"{label}: {method}, {name}",
                measurement.get(key, 1e-3),
                "ms",
                note=value.reason if isinstance(value, Missing) else "",
                passed=False if is_failure else None,
                shown=measurement is ours or method == "natten",
            )
    by_method = {measurement.labels["method"]: measurement for measurement in measurements}
    for method, target in (("sliding_chunk", "10"), ("full", "3")):
        speedup = _speedup(ours, by_method[method])
        report.add(f"{label}: × as fast as {method}", speedup, target=target if is_first else "")
    for key, name in PASSES.items():
        multiple = ratio(ours.get(key), ours.get(f"{key}_roofline"))
        target = "4" if is_first and key == "forward" else ""
        report.add(f"{label}: {name}, × the roofline", multiple, target=target)


def _speedup(ours: Measurement, other: Measurement) -> float | None:
    return ratio(other.get("training"), ours.get("training"))


def _notes(*measurements: Measurement) -> str:
    return "; ".join(f"{x.labels['method']}: {x.note}" for x in measurements if x.note)


def profile_kernels(shape: AttentionShape) -> dict[str, float]:
    """Return the milliseconds of each kernel in a forward and backward pass, from the profiler."""
    step = training_step(METHODS["fused"](shape, shape.inputs()), shape)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        name = event.key.removesuffix("_kernel") if event.key.endswith("_kernel") else "other operators"
        times[name] += event.self_device_time_total / 10 / 1e3
    return dict(times)


def tune(options: Options, report: Report) -> None:
    """Time each kernel of stage 1 with other numbers of warps and pipeline stages."""
    if options.is_small:
        raise NotApplicableError("a CPU has no warps")
    shape = stage_shape(options, 1)
    times: dict[str, dict[str, float]] = defaultdict(dict)
    labels = {choice: "{} warps, {} stages".format(*choice) for choice in TUNING}
    for choice in sorted(TUNING, key=lambda choice: choice != DEFAULT_LAUNCH):
        if options.seconds_left < 8:
            report.add("time for all choices", note=f"stopped before {labels[choice]}")
            break
        try:
            with override_launch(*choice):
                by_kernel = profile_kernels(shape)
        except Exception as error:  # for example more shared memory than there is
            report.add(labels[choice], note=str(error), shown=False)
            continue
        for kernel, milliseconds in by_kernel.items():
            times[kernel][labels[choice]] = milliseconds
            report.add(kernel, milliseconds, "ms", note=labels[choice], shown=False)
    for kernel, tried in times.items():
        default = tried.get(labels[DEFAULT_LAUNCH])
        if kernel != "other operators" and default is not None:
            best = min(tried, key=tried.__getitem__)
            note = f"{best}; {default:.3f} ms by default"
            report.add(f"stage 1: {kernel}, best choice", tried[best], "ms", note=note)


@contextlib.contextmanager
def override_launch(warps: int, stages: int) -> Iterator[None]:
    """Launch all kernels with these numbers of warps and pipeline stages."""
    from vil.attention.local import fused

    common: Callable[..., dict[str, Any]] = fused._KernelCall.common_arguments

    def overridden(self: Any) -> dict[str, Any]:
        return {**common(self), "num_warps": warps, "num_stages": stages}

    with mock.patch.object(fused._KernelCall, "common_arguments", overridden):
        yield
