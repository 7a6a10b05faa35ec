"""Benchmark of local attention: time and memory of all methods, on a grid of maps and the zoo's stages."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tools.benchmarks import timing
from tools.benchmarks.accuracy import check_accuracy
from tools.benchmarks.methods import BASELINE, METHODS, PreparedMethod, estimate_memory
from tools.benchmarks.options import positive
from tools.benchmarks.output import Column, Results, ratio
from tools.benchmarks.shapes import AttentionShape, merge_equal, zoo_shapes
from tools.benchmarks.timing import Measurement, Missing, TimingOptions
from vil.attention.local import BACKENDS
from vil.attention.local.geometry import Mask
from vil.command_line import bounded_int
from vil.config import Precision
from vil.errors import COMMAND_LINE, UserError
from vil.evaluation.cost import saved_bytes

GRID_SIDES = (14, 28, 56, 112, 224)
ZOO_MODELS = ("vil_tiny", "vil_small", "vil_base_deep", "vil_base_wide")
DEFAULT_TOKENS = {"cpu": 8 * 28**2, "cuda": 128 * 56**2}
"""Local tokens of a batch whose size is not given, by device type."""
MAX_DEFAULT_BATCH_SIZE = {"cpu": 8, "cuda": 128}
CHECK_BATCH_SIZE = 2
Neighbors = Literal["all", "self", "0", "1", "2", "3", "4", "5", "6", "7"]


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `benchmark.py attention`."""
    add = parser.add_argument
    shapes_help = "grid: square maps; stages: the stages of the zoo at 224 pixels"
    add("--shapes", choices=("all", "grid", "stages"), default="all", help=shapes_help)
    add("--sides", type=bounded_int(1), nargs="+", default=GRID_SIDES, metavar="N", help="maps of the grid")
    add("--heads", type=bounded_int(1), default=3, help="heads in the grid")
    add("--head-width", type=bounded_int(1), default=32, help="head width in the grid")
    batch_help = "images; default: smaller for larger maps, and 2 for --check"
    add("--batch-size", type=bounded_int(1), help=batch_help)
    add("--window", type=bounded_int(1), help="side of a chunk; default: that of the zoo")
    add("--global-tokens", type=bounded_int(0), help="default: that of the zoo")
    add("--mask", choices=get_args(Mask), default="chunk")
    neighbors_help = "visible chunks in addition to the query's own; a number selects a single neighbor"
    add("--neighbors", choices=get_args(Neighbors), default="all", help=neighbors_help)
    position_help = "relative: with bias tables"
    add("--position", choices=("relative", "absolute"), default="relative", help=position_help)
    methods_help = f"a subset of {', '.join(METHODS)}"
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=methods_help)
    memory_help = "skip methods that need more; default: the free memory of a GPU, a quarter of a CPU's"
    add("--skip-memory-above", type=positive, metavar="BYTES", help=memory_help)
    check_help = (
        "instead of timing, compare with the definition in float64 on random inputs; exit status 1 above a "
        "relative error of 1e-2 (half precisions) or 1e-4"
    )
    add("--check", action="store_true", help=check_help)
    add("--seed", type=bounded_int(0), default=0, help="of the random inputs of --check")


def run(arguments: Namespace, device: torch.device, precision: Precision) -> Results:
    """Run the benchmark, or the comparison with float64 for `--check`."""
    shapes = select_shapes(arguments, device, precision)
    limit = arguments.skip_memory_above or timing.memory_limit(device)
    if arguments.check:
        notes, wrong = check_accuracy(shapes, arguments.methods or [*BACKENDS, "auto"], limit, arguments.seed)
        return Results(notes, has_failed=wrong > 0)
    rates = timing.measure_rates(device, getattr(torch, precision))
    methods, options = arguments.methods or list(METHODS), TimingOptions(arguments.repeats, arguments.seconds)
    memory = timing.memory_kind(device)
    tables, has_failed = {}, False
    for shape in shapes:
        measurements = measure_shape(shape, methods, rates, options, limit)
        records = tables[f"### {shape}"] = to_records(measurements, memory)
        has_failed |= any(x.has_failed for x in measurements if x.labels["method"] in (*BACKENDS, "auto"))
        times = ((r["method"], r["forward_ms"] or math.nan, r["training_ms"] or math.nan) for r in records)
        progress = ", ".join(f"{method} {forward:.3f} {training:.3f}" for method, forward, training in times)
        print(f"{shape}: {progress}", file=sys.stderr, flush=True)
    notes = [
        f"- Peak rates of this machine: {rates.bytes / 1e9:.0f} GB/s for a copy, "
        f"{rates.multiply_adds / 1e9:.0f} G multiply-adds/s for a matrix product in {precision}.",
        f"- ×: improvement over {BASELINE}. roofline: the minimal time, of bytes moved once and of "
        "multiply-adds at these rates, as a fraction of the time.",
        "- forward: without gradients; forward+backward: with all gradients, of biases too. "
        f"{options}; caches are not flushed in between.",
        "- full: attention to all tokens, no bias; natten: another window, no bias. flex: tokens are sorted "
        "by chunk beforehand.",
    ]
    columns = [
        Column("method", "method"),
        Column("forward ms", "forward_ms", "{:.3f}"),
        Column("× ", "forward_ratio", "{:.2f}"),
        Column("roofline", "forward_roofline", "{:.0%}"),
        Column("forward+backward ms", "training_ms", "{:.3f}"),
        Column("×  ", "training_ratio", "{:.2f}"),
        Column("roofline ", "training_roofline", "{:.0%}"),
        Column(f"MB, {memory}", "memory_mb", "{:.1f}"),
        Column("×   ", "memory_ratio", "{:.2f}"),
    ]
    return Results(notes, tables, columns, has_failed)


def select_shapes(arguments: Namespace, device: torch.device, precision: Precision) -> list[AttentionShape]:
    """Return the shapes to measure. Raise UserError for options that exclude each other."""
    if arguments.mask == "exact" and arguments.neighbors != "all":
        raise UserError(COMMAND_LINE, "--mask exact is defined for --neighbors all only")
    for key in ("csv", "markdown"):
        if arguments.check and getattr(arguments, key):
            raise UserError(COMMAND_LINE, f"--{key} cannot be combined with --check")
    neighbors = int(arguments.neighbors) if arguments.neighbors.isdigit() else arguments.neighbors
    changes = {"mask": arguments.mask, "neighbors": neighbors, "position": arguments.position}
    changes |= {"precision": precision, "device": str(device)}
    for key in ("window", "global_tokens"):
        if (value := getattr(arguments, key)) is not None:
            changes[key] = value

    def complete(shape: AttentionShape) -> AttentionShape:
        fitting = DEFAULT_TOKENS[device.type] // shape.tokens
        default = max(1, min(MAX_DEFAULT_BATCH_SIZE[device.type], fitting))
        batch = arguments.batch_size or (CHECK_BATCH_SIZE if arguments.check else default)
        return replace(shape, batch=batch, **changes)

    shapes = []
    if arguments.shapes != "stages":
        stage = zoo_shapes(["vil_small"])[0]
        stage = replace(stage, label="grid", heads=arguments.heads, head_width=arguments.head_width)
        grid = (replace(stage, height=side, width=side) for side in arguments.sides)
        shapes += merge_equal(map(complete, grid))
    if arguments.shapes != "grid":
        shapes += merge_equal(map(complete, zoo_shapes(ZOO_MODELS)))
    return shapes


def measure_shape(
    shape: AttentionShape, methods: Sequence[str], rates: timing.Rates, options: TimingOptions, limit: float
) -> list[Measurement]:
    """Measure the forward pass and a training step (seconds), its memory (bytes), and the roofline of both.

    Methods that need more than `limit` bytes of memory are skipped.
    """
    device, inputs = torch.device(shape.device), shape.inputs()
    torch.compiler.reset()  # each shape is compiled from scratch, below the limit of recompilations
    prepared: dict[str, PreparedMethod | Missing] = {}
    passes: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in methods:
        required = estimate_memory(name, shape)
        if required > limit:
            prepared[name] = Missing(f"would need about {required / 1e9:.1f} GB, more than {limit / 1e9:.1f}")
            continue
        method = prepared[name] = timing.try_measure(partial(METHODS[name], shape, inputs), device)
        if not isinstance(method, Missing):
            passes[name, "forward"], passes[name, "training"] = method.infer, training_step(method, shape)
    times = timing.time_interleaved(passes, device, options)
    labels = {key: value for key, value in asdict(shape).items() if key != "device"}
    measurements = []
    for name, method in prepared.items():
        measurements.append(Measurement({**labels, "method": name}, {}))
        values = measurements[-1].values
        if isinstance(method, Missing):
            values["forward"] = method
            continue
        memory = partial(saved_bytes, method.forward)
        if device.type == "cuda":
            memory = partial(timing.peak_memory, passes[name, "training"], device)
        forward, backward = map(rates.min_seconds, method.costs)
        values |= {key: times[name, key] for key in ("forward", "training")}
        values |= {"forward_roofline": forward, "training_roofline": forward + backward}
        values["memory"] = timing.try_measure(memory, device)
    return measurements


def training_step(method: PreparedMethod, shape: AttentionShape) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs a forward and backward pass and returns all gradients."""
    gradient: Tensor | None = None

    def step() -> tuple[Tensor, ...]:
        nonlocal gradient
        output = method.forward()
        if gradient is None:
            gradient = shape.output_gradient(output)
        return method.gradients(output, gradient)

    return step


def to_records(measurements: Sequence[Measurement], memory: str) -> list[dict[str, Any]]:
    """Return the measurements of one shape as flat records."""
    absent = Measurement({}, {})
    baseline = next((x for x in measurements if x.labels["method"] == BASELINE), absent)
    keys = ("forward", "training", "memory")
    return [
        {
            **x.labels,
            "forward_ms": x.get("forward", 1e-3),
            "training_ms": x.get("training", 1e-3),
            "memory_mb": x.get("memory", 1e6),
            "memory": memory,
            **{f"{key}_ratio": ratio(baseline.get(key), x.get(key)) for key in keys},
            **{f"{key}_roofline": ratio(x.get(f"{key}_roofline"), x.get(key)) for key in keys[:2]},
            "note": x.note,
        }
        for x in measurements
    ]
