"""Sections `compile` and `kernels`: all kernels compiled ahead, and compared with float64."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from torch.utils import deterministic

from tools.benchmarking.check import check_problem
from tools.benchmarking.measure import Missing, attempt
from tools.benchmarking.problem import Problem, leaves_of, shown_precision
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options
from vil.attention.local import local_attention
from vil.attention.local.geometry import Inputs
from vil.models.stage import map_sizes
from vil.models.zoo import stages_of

TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Relative errors of outputs and gradients: what rounding inputs, weights and outputs once each may cost."""
STAGES_OF = ("vil_tiny", "vil_small", "vil_base_deep")
HUGE = 2_500_000_000
"""Elements of a tensor whose offsets do not fit into 32 bits."""


@dataclass(frozen=True)
class Case:
    """A problem, and whether its position biases are large."""

    problem: Problem
    large_biases: bool = False

    def inputs(self, seed: int) -> Inputs:
        """Fresh random ones; large biases have a standard deviation of 8.

        The kernels multiply biases by log₂e and round them to the precision of the queries. Large ones are
        drawn such that this changes nothing: what is checked is the arithmetic, not that rounding.
        """
        inputs = self.problem.inputs(seed)
        if not self.large_biases:
            return inputs
        log2e = 1.4426950408889634

        def exact(bias: torch.Tensor | None) -> torch.Tensor:
            assert bias is not None
            rounded = (bias.detach() * (8 * log2e)).to(self.problem.dtype).float()
            return (rounded / log2e).requires_grad_()

        return inputs._replace(bias_table=exact(inputs.bias_table), global_bias=exact(inputs.global_bias))


def cases(device: torch.device, small: bool) -> list[Case]:
    """Return what is checked, the stages of the paper's models first."""

    def problem(label: str, dtype: torch.dtype, **change: object) -> Problem:
        problem = Problem(
            label, batch=2, heads=3, head_width=32, size=(30, 25), window=7, global_tokens=1, mask="chunk",
            neighbors="all", relative=True, dtype=dtype, device=device,
        )  # fmt: skip
        return replace(problem, **change)  # type: ignore[arg-type]

    if small:  # in Triton's interpreter, which has no bfloat16 and is slow
        tiny = {"batch": 1, "heads": 1, "head_width": 16, "size": (5, 4), "window": 2}
        return [
            Case(problem("chunk", torch.float32, **tiny)),
            Case(
                problem("random shift", torch.float16, **tiny, neighbors=3, mask="cyclic"), large_biases=True
            ),
        ]
    found = []
    for dtype in TOLERANCES:
        for name in STAGES_OF:
            stages = stages_of(name)
            for number, (stage, size) in enumerate(zip(stages, map_sizes(stages, (224, 224))), 1):
                if stage.attention == "vision_longformer":
                    shape = {
                        "heads": stage.heads, "head_width": stage.dim // stage.heads, "size": size,
                        "window": stage.window, "global_tokens": stage.global_tokens,
                    }  # fmt: skip
                    found.append(Case(problem(f"{name} stage {number}", dtype, **shape)))
        for mask, window in itertools.product(("chunk", "exact", "cyclic"), (7, 12, 15)):
            if (mask, window) != ("chunk", 7):
                found.append(Case(problem(f"{mask}, window {window}", dtype, mask=mask, window=window)))
        for mask, neighbors in itertools.product(("chunk", "cyclic"), ("self", 0, 6)):
            about = {"mask": mask, "neighbors": neighbors}
            found.append(Case(problem(f"{mask}, neighbors {neighbors}", dtype, **about)))
        found += [Case(problem(f"{n} global tokens", dtype, global_tokens=n)) for n in (0, 16, 256)]
        found += [Case(problem(f"head width {width}", dtype, head_width=width)) for width in (48, 64, 128)]
        found.append(Case(problem("absolute position", dtype, relative=False)))
        found.append(Case(problem("large biases", dtype), large_biases=True))
    seen: dict[Problem, Case] = {}
    for case in found:  # sizes of stages are equal among models; large biases have a label of their own
        seen.setdefault(replace(case.problem, label="large" if case.large_biases else ""), case)
    return list(seen.values())


# --- Compiling ----------------------------------------------------------------------------------------------


def compile_all(options: Options, report: Report) -> None:
    """Compile the kernels of all cases into Triton's cache, in as many processes as there are cores.

    Nothing is launched, so a GPU need not be there: one small case is compiled for capability 9.0 then.
    """
    from tools.gpu_check.speed import TUNING, compile_choice

    began = time.time()
    os.environ.pop("TRITON_INTERPRET", None)  # it counts when kernels are defined: in the pool's processes
    if options.small:
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # which Triton asks a driver for
        capability, choices = 90, TUNING[:0]
        problems = [replace(cases(torch.device("cpu"), True)[0].problem, dtype=torch.bfloat16)]
    else:
        major, minor = torch.cuda.get_device_capability()
        capability, choices = 10 * major + minor, TUNING
        problems = [case.problem for case in cases(torch.device(options.device), False)]
    kinds = dict.fromkeys(_kernel_arguments(problem, capability) for problem in problems)
    failed, compiled = [], 0
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_case, *kind): str(kind) for kind in kinds}
        futures |= {pool.submit(compile_choice, capability, *choice): str(choice) for choice in choices}
        for future in as_completed(futures):
            if (error := future.exception()) is None:
                compiled += future.result()
            else:
                failed.append(f"{futures[future]}: {type(error).__name__}: {error}")
                print(failed[-1], file=sys.stderr)
    report.add("kernels compiled", compiled, note=f"in {time.time() - began:.0f} s")
    report.expect("no kernel fails to compile", not failed, failed[0] if failed else "")


def _kernel_arguments(
    problem: Problem, capability: int
) -> tuple[int, str, int, tuple[object, ...], int, bool]:
    geometry = tuple(problem.geometry)
    return (
        capability, shown_precision(problem.dtype), problem.head_width, geometry, problem.global_tokens,
        problem.relative,
    )  # fmt: skip


def compile_case(
    capability: int, precision: str, width: int, window: Sequence[object], globals_: int, relative: bool
) -> int:
    """Compile the kernels of one case, in the process of a pool; return how many there are."""
    from tools.compile_kernels import compile_kernels
    from vil.attention.local.geometry import Window

    return len(compile_kernels(capability, precision, width, Window(*window), globals_, relative))  # type: ignore[arg-type]


# --- Correctness --------------------------------------------------------------------------------------------


def check_all(options: Options, report: Report) -> None:
    """Compare the kernels with float64 on fresh random inputs, then run them twice, then on a huge batch.

    Memory that nobody wrote is NaN meanwhile, so that an element that a kernel leaves out is found.
    """
    device = torch.device(options.device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if not torch.empty(1, device=device).isnan().item():
        raise RuntimeError("memory is not poisoned, so the check would miss what is not written")
    seed = torch.seed() % 2**31
    todo = cases(device, options.small)
    done: dict[torch.dtype, list[tuple[str, float, str]]] = {}
    left = 0
    for number, case in enumerate(todo):
        if options.seconds_left() < 30 and not options.small:  # for what comes after
            left = len(todo) - number
            break
        done.setdefault(case.problem.dtype, []).append(_compare(case, seed, report))
    for dtype, results in done.items():
        label, worst, tensor = max(results, key=lambda result: result[1] if result[1] == result[1] else 1e9)
        name = shown_precision(dtype)
        note = f"{tensor} of {label}; {len(results)} cases, seed {seed}"
        report.check(f"largest relative error, {name}", worst, TOLERANCES[dtype], note=note)
    if left:
        report.expect("time for all cases", False, f"{left} of {len(todo)} were left out")
    repeated = [case for case in todo if "stage" in case.problem.label] or todo[:1]
    unequal = [case.problem.label for case in repeated if not _is_repeatable(case, seed)]
    report.expect("twice equal to the bit", not unequal, ", ".join(unequal) or f"{len(repeated)} cases")
    _check_huge(options, report, seed)


def _compare(case: Case, seed: int, report: Report) -> tuple[str, float, str]:
    """The case's label, its largest error, and of which tensor."""
    problem = case.problem
    name = f"{problem.label}, {shown_precision(problem.dtype)}"
    found = attempt(lambda: check_problem(problem, ["fused"], seed, case.inputs(seed)), problem.device)
    if isinstance(found, Missing):
        report.expect(name, False, found.reason)
        return problem.label, float("nan"), "nothing"
    (comparison,) = found
    if comparison.missing is not None:
        report.expect(name, False, comparison.missing.reason)
        return problem.label, float("nan"), "nothing"
    tensor, worst = max(comparison.errors.items(), key=lambda item: item[1] if item[1] == item[1] else 1e9)
    report.check(name, worst, TOLERANCES[problem.dtype], note=str(comparison), shown=False)
    return problem.label, worst, tensor


def _passes(case: Case, inputs: Inputs) -> Iterator[torch.Tensor]:
    """The output and all gradients."""
    problem, (*tokens, table, bias, neighbor) = case.problem, inputs
    output = local_attention(
        *tokens, size=problem.size, window=problem.window, mask=problem.mask,
        neighbors=problem.neighbors if neighbor is None else neighbor,  # type: ignore[arg-type]
        bias_table=table, global_bias=bias, backend="fused",
    )  # fmt: skip
    yield output
    yield from torch.autograd.grad(output, leaves_of(inputs), problem.output_gradient(output))


def _is_repeatable(case: Case, seed: int) -> bool:
    inputs = case.inputs(seed)
    return all(torch.equal(a, b) for a, b in zip(_passes(case, inputs), _passes(case, inputs)))


def _check_huge(options: Options, report: Report, seed: int) -> None:
    """The last images of a batch with more elements than 32 bits count, against the same images alone."""
    device = torch.device(options.device)
    size, dtype = ((4, 4), torch.float16) if options.small else ((56, 56), torch.bfloat16)
    heads, width, window = (1, 16, 2) if options.small else (3, 32, 7)
    images = 3 if options.small else -(-HUGE // (size[0] * size[1] * heads * width))
    name = f"batch of {images * size[0] * size[1] * heads * width:.2g} elements"
    needed = 14 * images * size[0] * size[1] * heads * width * dtype.itemsize
    if not options.small and torch.cuda.mem_get_info(device)[0] < needed:
        report.add(name, note=f"left out: needs {needed / 1e9:.0f} GB")
        return
    problem = Problem("huge", images, heads, width, size, window, 1, "chunk", "all", False, dtype, device)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # tens of gigabytes, again and again
    inputs = problem.inputs(seed)
    gradient = problem.output_gradient(inputs.query)

    def run(tensors: Inputs, upstream: torch.Tensor, backend: str) -> list[torch.Tensor]:
        output = local_attention(*tensors[:5], size=size, window=window, backend=backend)
        grads = torch.autograd.grad(output, leaves_of(tensors), upstream)
        return [x[-2:].double() for x in (output.detach(), *grads)]

    found = run(inputs, gradient, "fused")
    exact = Inputs(*[x[-2:].detach().double().requires_grad_() for x in inputs[:5]])
    expected = run(exact, gradient[-2:].double(), "dense")
    worst = max((ours - its).norm().item() / its.norm().item() for ours, its in zip(found, expected))
    report.check(name, worst, TOLERANCES[dtype], note="of the last two images")
