"""Section `models`: training images per second and memory of ViL beside Swin and DeiT."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from tools.benchmarking import measure
from tools.benchmarking.measure import Missing, attempt
from tools.benchmarking.models import Candidate, paper_memory
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options
from vil.attention.local import fallback
from vil.config import Precision

SWIN, DEIT_S, DEIT_T = (
    "timm/swin_tiny_patch4_window7_224", "timm/deit_small_patch16_224", "timm/deit_tiny_patch16_224",
)  # fmt: skip
RUNS: tuple[tuple[str, Precision, bool], ...] = (
    ("vil_small", "bfloat16", True),
    (SWIN, "bfloat16", True),
    ("vil_tiny", "bfloat16", True),
    (DEIT_T, "bfloat16", True),
    ("vil_small", "bfloat16", False),
    (SWIN, "bfloat16", False),
    (DEIT_S, "bfloat16", False),
    ("vil_tiny", "bfloat16", False),
    ("vil_small", "float16", False),
    ("vil_small", "float32", False),
    (DEIT_S, "bfloat16", True),
)
"""Model, precision, compiled; the most important first, for the time may not reach for all."""
PAIRS = (("vil_small", SWIN, "0.87"), ("vil_tiny", DEIT_T, "0.9"))
"""Ours, theirs, and the quotient of their images/s to reach: about that of their FLOPs."""


def run(options: Options, report: Report) -> None:
    """Measure each run of `RUNS`, as long as there is time for the next; then compare."""
    device = torch.device(options.device)
    runs: tuple[tuple[str, Precision, bool], ...] = RUNS
    if options.small:
        runs = (("vil_tiny", "float32", True),)
    printed = paper_memory()
    speeds: dict[tuple[str, Precision, bool], float] = {}
    longest = 0.0
    for name, precision, compiled in runs:
        if options.seconds_left() < 1.2 * longest + 5:
            report.add("time for all models", note=f"stopped before {name}, {precision}")
            break
        began = time.time()
        label = f"{name.removeprefix('timm/')[:22]}, {precision}{', compiled' if compiled else ''}"
        found = attempt(lambda: _measure(name, precision, compiled, options, label, report), device)  # noqa: B023
        longest = max(longest, time.time() - began)
        if isinstance(found, Missing):
            report.expect(label, False, found.reason)
            continue
        speed, memory = found
        speeds[name, precision, compiled] = speed
        report.add(label, speed, "images/s", note="" if memory is None else f"{memory:.1f} MB per image")
        paper = printed.get(name)
        if memory is not None and precision == "bfloat16" and name.startswith("vil"):
            report.add(f"{label}: memory", memory, "MB/image", target=f"{paper}", shown=False)
    for ours, theirs, target in PAIRS:
        for compiled in (True, False):
            keys = [(name, "bfloat16", compiled) for name in (ours, theirs)]
            if all(key in speeds for key in keys):
                a, b = (speeds[key] for key in keys)  # type: ignore[index]
                other = theirs.removeprefix("timm/").split("_patch")[0]
                words = f"{ours}: × {other}{', compiled' if compiled else ''}"
                report.add(words, a / b, target=target)
    report.expect("no kernel was replaced", not fallback.failures(), "; ".join(fallback.failures()))


def _measure(
    name: str, precision: Precision, compiled: bool, options: Options, label: str, report: Report
) -> tuple[float, float | None]:
    """Training images per second, and MB per image; the compiler's graphs are checked on the way."""
    device = torch.device(options.device)
    torch.compiler.reset()
    size = 64 if options.small else 224
    candidate = Candidate(name, Namespace(image_size=size, compile=False), device, precision)
    graphs: list[set[str]] = []
    if compiled:
        candidate.callable = torch.compile(
            candidate.model, backend=_recording(graphs, options.small), fullgraph=True, dynamic=False
        )
    images, targets = candidate.images(2 if options.small else 128)
    for _ in range(1 if options.small else 3):
        candidate.train(images, targets)
    if compiled:
        expected = f"vil.{'chunked' if options.small else 'fused'}_attention.default"
        is_right = len(graphs) == 1 and (expected in graphs[0] or not name.startswith("vil"))
        names = sorted(name for graph in graphs for name in graph if name.startswith("vil."))
        report.expect(
            f"{label}: one graph", is_right, f"{len(graphs)} with {', '.join(names) or 'no operator'}"
        )
    calls = 1 if options.small else 10
    rounds = 1 if options.small else 5
    times = sorted(
        measure.seconds_of(lambda: candidate.train(images, targets), calls, device) for _ in range(rounds)
    )
    memory = None if options.small else candidate.memory(len(images)) / 1e6
    return len(images) / times[len(times) // 2], memory


def _recording(graphs: list[set[str]], small: bool) -> Callable[..., Any]:
    """A compiler that notes the operators of each graph; for a CPU one that is quick."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        if small:
            return graph.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    return compile_graph
