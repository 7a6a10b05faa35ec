"""Section `models`: training images per second and memory of ViL, Swin and DeiT."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tools.benchmarks.models import Candidate, measure_models, paper_memory
from tools.benchmarks.output import ratio
from tools.benchmarks.timing import Measurement, Missing, TimingOptions, try_measure
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options
from vil.attention.local import fallback
from vil.config import Precision
from vil.runtime.precision import choose_precision


class Configuration(NamedTuple):
    """A model, its precision, and True for torch.compile."""

    model: str
    precision: Precision = "bfloat16"
    is_compiled: bool = False

    @property
    def short_name(self) -> str:
        """Name of the model without its source and patch size."""
        return self.model.removeprefix("timm/").split("_patch")[0]

    def __str__(self) -> str:
        return f"{self.short_name}, {self.precision}{', compiled' if self.is_compiled else ''}"


SWIN, DEIT_S = "timm/swin_tiny_patch4_window7_224", "timm/deit_small_patch16_224"
DEIT_TI = "timm/deit_tiny_patch16_224"
CONFIGURATIONS = (
    *(Configuration(name, is_compiled=True) for name in ("vil_small", SWIN, "vil_tiny", DEIT_TI)),
    *(Configuration(name) for name in ("vil_small", SWIN, DEIT_S, "vil_tiny")),
    Configuration("vil_small", "float16"),
    Configuration("vil_small", "float32"),
    Configuration(DEIT_S, is_compiled=True),
)
"""In order of importance: the time limit may omit the last ones."""
PAIRS = (("vil_small", SWIN, "0.87"), ("vil_tiny", DEIT_TI, "0.9"))
"""Models to compare, and the target of the ratio of their images/s, about that of their FLOPs."""


def run(options: Options, report: Report) -> None:
    """Measure each configuration that there is time for, then compare pairs of models."""
    device = torch.device(options.device)
    small = (Configuration("vil_tiny", "float32", is_compiled=True),)
    speeds: dict[Configuration, float] = {}
    longest: dict[bool, float] = {}  # seconds, with and without compilation
    for configuration in small if options.is_small else CONFIGURATIONS:
        kind = configuration.is_compiled
        if options.seconds_left < 1.2 * longest.get(kind, max(longest.values(), default=0.0)) + 5:
            report.add("time for all models", note=f"stopped before {configuration}")
            break
        start = time.time()
        measurement = try_measure(partial(_measure, configuration, options, report), device)
        longest[kind] = max(longest.get(kind, 0.0), time.time() - start)
        if isinstance(measurement, Missing):
            report.expect(str(configuration), False, measurement.reason)
            continue
        speed = ratio(measurement.labels["batch"], measurement.get("training"))
        if speed is None:
            report.expect(str(configuration), False, measurement.note)
            continue
        speeds[configuration] = speed
        memory = measurement.get("memory", 1e6)
        note = "" if memory is None else f"{memory:.1f} MB per image"
        report.add(str(configuration), speed, "images/s", note=f"batch {measurement.labels['batch']}; {note}")
        if configuration.precision == "bfloat16" and configuration.model.startswith("vil"):
            target = str(paper_memory().get(configuration.model))
            report.add(f"{configuration}: memory", memory, "MB/image", target=target, shown=False)
    for ours, other, target in PAIRS:
        for is_compiled in (True, False):
            pair = [Configuration(name, is_compiled=is_compiled) for name in (ours, other)]
            if all(configuration in speeds for configuration in pair):
                name = f"{ours}: × {pair[1].short_name}{', compiled' if is_compiled else ''}"
                report.add(name, speeds[pair[0]] / speeds[pair[1]], target=target)
    report.expect("no kernel fell back to chunked", not fallback.failures(), "; ".join(fallback.failures()))


def _measure(configuration: Configuration, options: Options, report: Report) -> Measurement:
    """Measure training speed and memory; check the compiled graphs."""
    torch.compiler.reset()
    size, batch = (64, 2) if options.is_small else (224, 128)
    graphs: list[set[str]] = []
    backend = _recording_backend(graphs, options.is_small)
    compiler = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    model, precision, is_compiled = configuration
    device = torch.device(options.device)
    choose_precision(precision, device)  # turns TF32 off, as in training
    candidate = Candidate(model, size, device, precision, compiler if is_compiled else None)
    timing = TimingOptions(1, 0.1) if options.is_small else TimingOptions(15, 2.0)
    (measurement,) = measure_models([candidate], batch, timing, inference=False)
    if configuration.is_compiled and not isinstance(measurement.values["training"], Missing):
        expected = f"vil.{'chunked' if options.is_small else 'fused'}_attention.default"
        has_operator = any(expected in graph for graph in graphs) or not configuration.model.startswith("vil")
        names = sorted(name for graph in graphs for name in graph if name.startswith("vil."))
        note = f"{len(graphs)} with {', '.join(names) or 'no operator of this project'}"
        report.expect(f"{configuration}: one graph", len(graphs) == 1 and has_operator, note)
    return measurement


def _recording_backend(graphs: list[set[str]], is_small: bool) -> Callable[..., Any]:
    """Return a backend of torch.compile that records the operators of each graph; eager if `is_small`."""

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        if is_small:
            return graph.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    return compile_graph
