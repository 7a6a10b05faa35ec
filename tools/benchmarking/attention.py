"""tools/benchmark.py attention: every way to compute local attention, on a grid of maps and real stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tools.benchmarking import measure
from tools.benchmarking.measure import Missing, attempt, interleaved
from tools.benchmarking.methods import BASELINE, METHODS, Prepared, bytes_needed
from tools.benchmarking.output import Cell, Figure, amount, factor, percent, sheet
from tools.benchmarking.problem import Problem, Rates, equal_shapes_once, heading, shown_precision
from vil.attention.local.geometry import Inputs, Mask
from vil.command_line import COMMAND_LINE
from vil.config import ConfigError
from vil.evaluation.benchmark import saved_bytes
from vil.models.stage import map_sizes
from vil.models.zoo import stages_of

SIDES = (14, 28, 56, 112, 224)
STAGES_OF = ("vil_tiny", "vil_small", "vil_base_deep", "vil_base_wide")
TOKENS = {"cpu": 8 * 28**2, "cuda": 128 * 56**2}
"""Local tokens of a batch, where its size is not given, per kind of device."""
LARGEST_BATCH = {"cpu": 8, "cuda": 128}
CHECKED_BATCH = 2
Neighbors = Literal["all", "self", "0", "1", "2", "3", "4", "5", "6", "7"]


@dataclass
class Row:
    """What was found of one method on one problem; seconds, bytes, or why there is no such figure."""

    problem: Problem
    method: str
    forward: float | Missing
    training: float | Missing
    memory: float | Missing
    bounds: tuple[float, float] | None = None
    """Least seconds of a forward pass, and of a forward and backward pass."""

    @property
    def failed(self) -> bool:
        """Whether something broke down that should have worked."""
        return any(isinstance(x, Missing) and x.failed for x in (self.forward, self.training, self.memory))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `attention`, beside those of every benchmark."""
    parser.add_argument("--shapes", choices=("all", "grid", "stages"), default="all",
                        help="grid: square maps; stages: the stages of the zoo at 224 pixels")  # fmt: skip
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, metavar="N", help="maps of the grid")
    parser.add_argument("--heads", type=int, default=3, help="heads in the grid")
    parser.add_argument("--head_width", type=int, default=32, help="head width in the grid")
    parser.add_argument(
        "--batch", type=int, help="images; default: by the map, so that it is quick, and 2 for --check"
    )
    parser.add_argument("--window", type=int, help="side of a chunk; default: the zoo's")
    parser.add_argument("--global_tokens", type=int, help="default: the zoo's")
    parser.add_argument("--mask", choices=get_args(Mask), default="chunk")
    parser.add_argument("--neighbors", choices=get_args(Neighbors), default="all",
                        help="chunks seen beside the own one; a number for that neighbour alone")  # fmt: skip
    parser.add_argument("--position", choices=("relative", "absolute"), default="relative",
                        help="relative: with bias tables")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                        help=f"a subset of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--skip_memory_above", type=float, metavar="BYTES",
                        help="leave out what would need more; default: what a GPU has free, a quarter of the "
                        "memory on a CPU")  # fmt: skip
    parser.add_argument("--cuda_graphs", action="store_true",
                        help="time the kernels alone, replayed from CUDA graphs")  # fmt: skip
    parser.add_argument("--check", action="store_true",
                        help="no timing: compare with the definition in float64, on fresh random inputs; "
                        "exit status 1 above a relative error of 1e-2 (half precisions) or 1e-4")  # fmt: skip


def problems_of(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The problems that the options ask for. Raises ConfigError for an impossible one."""
    for key in ("batch", "heads", "head_width", "window"):
        value = getattr(arguments, key)
        if value is not None and value < 1:
            raise ConfigError(COMMAND_LINE, f"--{key} must be at least 1, got {value}")
    if arguments.global_tokens is not None and arguments.global_tokens < 0:
        raise ConfigError(COMMAND_LINE, f"--global_tokens must be at least 0, got {arguments.global_tokens}")
    if min(arguments.sides) < 1:
        raise ConfigError(COMMAND_LINE, f"--sides must be at least 1, got {min(arguments.sides)}")
    if arguments.mask == "exact" and arguments.neighbors != "all":
        raise ConfigError(COMMAND_LINE, "--mask exact is defined for --neighbors all only")
    for key in ("csv", "png", "markdown", "cuda_graphs"):
        if arguments.check and getattr(arguments, key):
            raise ConfigError(COMMAND_LINE, f"--{key} and --check do not go together")
    if arguments.png and arguments.shapes == "stages":
        raise ConfigError(COMMAND_LINE, "--png draws the grid, which --shapes stages leaves out")
    if arguments.cuda_graphs and device.type != "cuda":
        raise ConfigError(COMMAND_LINE, "--cuda_graphs needs --device cuda")

    def problem(
        label: str, size: tuple[int, int], heads: int, width: int, stage: Any, **about: Any
    ) -> Problem:
        batch = arguments.batch or CHECKED_BATCH
        if not arguments.batch and not arguments.check:
            fitting = TOKENS[device.type] // (size[0] * size[1])
            batch = max(1, min(LARGEST_BATCH[device.type], fitting))
        return Problem(
            label, batch, heads, width, size,
            window=arguments.window or stage.window,
            global_tokens=stage.global_tokens if arguments.global_tokens is None else arguments.global_tokens,
            mask=arguments.mask,
            neighbors=int(arguments.neighbors) if arguments.neighbors.isdigit() else arguments.neighbors,
            relative=arguments.position == "relative", dtype=dtype, device=device, **about,
        )  # fmt: skip

    found = []
    first = stages_of("vil_small")[0]
    if arguments.shapes != "stages":
        for side in arguments.sides:
            size = (side, side)
            found.append(problem("grid", size, arguments.heads, arguments.head_width, first, in_grid=True))
    of_zoo = []
    if arguments.shapes != "grid":
        for name in STAGES_OF:
            stages = stages_of(name)
            for number, (stage, size) in enumerate(zip(stages, map_sizes(stages, (224, 224))), 1):
                if stage.attention == "vision_longformer":
                    label, width = f"{name} stage {number}", stage.dim // stage.heads
                    of_zoo.append(problem(label, size, stage.heads, width, stage))
    return [*dict.fromkeys(found), *equal_shapes_once(of_zoo)]


# --- Timing -------------------------------------------------------------------------------------------------


def measure_problem(
    problem: Problem, methods: Sequence[str], rates: Rates, arguments: argparse.Namespace
) -> list[Row]:
    """Time and memory of each method on one problem."""
    device, inputs = problem.device, problem.inputs()
    limit = arguments.skip_memory_above or measure.default_memory(device)
    torch.compiler.reset()  # each shape is compiled anew, without running into the limit of recompilations
    prepared = {name: _prepared(name, problem, inputs, limit) for name in methods}
    functions: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, method in prepared.items():
        if isinstance(method, Prepared):
            functions[name, "forward"], functions[name, "training"] = _passes(method, problem)
    timed = functions
    if arguments.cuda_graphs:
        timed = {key: _graphed_later(function) for key, function in functions.items()}
    times = interleaved(
        timed, device=device, repeats=arguments.repeats, seconds=arguments.seconds,
        fastest=arguments.fastest,
    )  # fmt: skip
    rows = []
    for name, method in prepared.items():
        if isinstance(method, Missing):
            rows.append(Row(problem, name, method, method, method))
            continue
        forward, backward = (rates.bound(cost) for cost in method.costs)
        memory = _memory(method, functions[name, "training"], device)
        rows.append(
            Row(problem, name, times[name, "forward"], times[name, "training"], memory,
                bounds=(forward, forward + backward))
        )  # fmt: skip
    return rows


def _prepared(name: str, problem: Problem, inputs: Inputs, limit: float) -> Prepared | Missing:
    needed = bytes_needed(name, problem)
    if needed > limit:
        return Missing(f"would need about {needed / 1e9:.1f} GB, more than {limit / 1e9:.1f}")
    return attempt(lambda: METHODS[name](problem, inputs), problem.device)


def _passes(method: Prepared, problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward pass without gradients; a forward and backward pass with all of them."""

    def forward() -> Tensor:
        with torch.no_grad():
            return method.forward()

    gradient: list[Tensor] = []

    def training() -> tuple[Tensor | None, ...]:
        output = method.forward()
        if not gradient:
            gradient.append(problem.output_gradient(output))
        return torch.autograd.grad(output, method.leaves, gradient[0], allow_unused=True)

    return forward, training


def _graphed_later(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` as a CUDA graph from its second call on; the first one compiles and tunes."""
    state: list[Callable[[], Any]] = []

    def call() -> Any:
        if not state:
            state.append(function)
            return function()
        if state[0] is function:
            state[0] = measure.graphed(function)
        return state[0]()

    return call


def _memory(method: Prepared, training: Callable[[], Any], device: torch.device) -> float | Missing:
    """Bytes: the peak of a training step on a GPU, what is kept for the backward pass on a CPU."""
    if device.type == "cuda":
        return attempt(lambda: float(measure.peak_memory(training, device)), device)
    return attempt(lambda: float(saved_bytes(method.forward)), device)


# --- Tables and figures -------------------------------------------------------------------------------------


def records(rows: Sequence[Row], memory: str) -> list[dict[str, Any]]:
    """Rows as plain values, one per method and shape; None for what there is not, and why in `note`."""
    baselines = {row.problem: row for row in rows if row.method == BASELINE}
    found = []
    for row in rows:
        problem, base = row.problem, baselines.get(row.problem)
        record: dict[str, Any] = {
            "shape": problem.label, "batch": problem.batch, "heads": problem.heads,
            "head_width": problem.head_width, "height": problem.size[0], "width": problem.size[1],
            "window": problem.window, "global_tokens": problem.global_tokens, "mask": problem.mask,
            "neighbors": problem.neighbors, "position": "relative" if problem.relative else "absolute",
            "precision": shown_precision(problem.dtype), "method": row.method,
            "forward_ms": amount(row.forward, 1e-3), "training_ms": amount(row.training, 1e-3),
            "memory_mb": amount(row.memory, 1e6), "memory": memory,
        }  # fmt: skip
        for key in ("forward", "training", "memory"):
            ours, theirs = getattr(row, key), getattr(base, key, None)
            record[f"{key}_ratio"] = factor(theirs, ours)
        for key, bound in zip(("forward", "training"), row.bounds or (None, None)):
            record[f"{key}_roofline"] = factor(bound, getattr(row, key))
        reasons = [x.reason for x in (row.forward, row.training, row.memory) if isinstance(x, Missing)]
        record["note"] = "; ".join(dict.fromkeys(reasons))
        found.append(record)
    return found


def tables(rows: Sequence[Row], memory: str) -> str:
    """One table per problem, and beneath it why figures are missing."""
    problems = dict.fromkeys(row.problem for row in rows)
    by_problem: dict[Problem, list[dict[str, Any]]] = {problem: [] for problem in problems}
    for row, record in zip(rows, records(rows, memory)):
        by_problem[row.problem].append(record)
    columns: dict[str, Cell] = {
        "method": ("method", str),
        "forward ms": ("forward_ms", "{:.3f}".format),
        "× ": ("forward_ratio", "{:.2f}".format),
        "roofline": ("forward_roofline", percent),
        "forward+backward ms": ("training_ms", "{:.3f}".format),
        "×  ": ("training_ratio", "{:.2f}".format),
        "roofline ": ("training_roofline", percent),
        f"MB, {memory}": ("memory_mb", "{:.1f}".format),
        "×   ": ("memory_ratio", "{:.2f}".format),
    }
    return "\n\n".join(f"### {heading(p)}\n\n{sheet(found, columns)}" for p, found in by_problem.items())


def figures(rows: Sequence[Row], memory: str) -> list[Figure]:
    """Time and memory of the grid against tokens, a line per method."""
    grid = [row for row in rows if row.problem.in_grid]
    found = []
    for title, key in (
        ("forward, ms per image", "forward"),
        ("forward + backward, ms per image", "training"),
        (f"MB per image, {memory}", "memory"),
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in grid:
            value = amount(getattr(row, key), 1e6 if key == "memory" else 1e-3)
            if value is not None:
                lines.setdefault(row.method, []).append((row.problem.tokens, value / row.problem.batch))
        found.append(Figure(title, "local tokens (H·W)", lines))
    return found


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[list[Row], Rates]:
    """Measures every problem; first what the machine can do."""
    problems = problems_of(arguments, device, dtype)
    rates = measure.rates(device, dtype)
    methods = arguments.methods or list(METHODS)
    rows: list[Row] = []
    for problem in problems:
        found = measure_problem(problem, methods, rates, arguments)
        print(_brief(problem, found), file=sys.stderr, flush=True)
        rows += found
    return rows, rates


def _brief(problem: Problem, rows: Sequence[Row]) -> str:
    """What is left of a run that is stopped half-way: milliseconds of both passes, by method."""

    def shown(seconds: float | Missing) -> str:
        return "n/a" if isinstance(seconds, Missing) else f"{1e3 * seconds:.3f}"

    found = ", ".join(f"{row.method} {shown(row.forward)} {shown(row.training)}" for row in rows)
    return f"{heading(problem)}: {found}"
