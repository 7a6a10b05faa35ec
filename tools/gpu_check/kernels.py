"""Sections `compile` and `kernels`: compilation of all kernels, and comparison with float64."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from torch.utils import deterministic

from tools.benchmarks.accuracy import compare_with_float64, relative_error, to_float64
from tools.benchmarks.methods import METHODS
from tools.benchmarks.shapes import AttentionShape, merge_equal, model_shapes, zoo_shapes
from tools.benchmarks.timing import Missing, try_measure
from tools.gpu_check.report import Report
from tools.gpu_check.runner import Options
from tools.gpu_check.speed import TUNING, override_launch, stage_shape
from vil.attention.local.geometry import Inputs
from vil.command_line import resolve_train_command

TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
"""Relative errors of outputs and gradients, from rounding inputs, weights and outputs once each."""
ZOO_MODELS = ("vil_tiny", "vil_small", "vil_base_deep")
HUGE_ELEMENTS = 2_500_000_000
"""Elements of a tensor whose offsets exceed 32 bits."""


@dataclass(frozen=True)
class Case:
    """A shape to check; `large_biases` have a standard deviation of 8."""

    shape: AttentionShape
    large_biases: bool = False

    def inputs(self, seed: int) -> Inputs:
        """Return random inputs.

        The kernels multiply biases by a factor and round them, to float16 for half precision. Large biases
        are drawn such that this is exact: the check is of the arithmetic, and not of this rounding.
        """
        inputs = self.shape.inputs(seed)
        if not self.large_biases:
            return inputs
        from vil.attention.local.fused import bias_dtype, bias_factor  # needs triton

        factor = bias_factor(inputs.query.device, inputs.query.dtype, inputs.query.shape[3])

        def enlarge(bias: torch.Tensor | None) -> torch.Tensor:
            assert bias is not None
            rounded = (bias.detach() * (8 * factor)).to(bias_dtype(inputs.query.dtype)).float()
            return (rounded / factor).requires_grad_()

        return inputs._replace(bias_table=enlarge(inputs.bias_table), global_bias=enlarge(inputs.global_bias))


def list_cases(device: str, is_small: bool) -> list[Case]:
    """Return all cases, for each precision the stages of the paper's models first."""
    if is_small:  # for Triton's interpreter, which lacks bfloat16 and is slow
        tiny = AttentionShape("chunk", 1, 1, 16, 5, 4, window=2)
        cyclic = replace(tiny, label="random shift", mask="cyclic", neighbors=3, precision="float16")
        return [Case(tiny), Case(cyclic, large_biases=True)]
    base = AttentionShape("", 2, 3, 32, 30, 25, device=device)
    masks, windows = ("chunk", "exact", "cyclic"), (7, 12, 15)
    changes = {f"{mask}, window {n}": {"mask": mask, "window": n} for mask in masks for n in windows}
    for mask, neighbors in itertools.product(("chunk", "cyclic"), ("self", 0, 6)):
        changes[f"{mask}, neighbors {neighbors}"] = {"mask": mask, "neighbors": neighbors}
    changes |= {f"{count} global tokens": {"global_tokens": count} for count in (0, 16, 256)}
    changes |= {f"head width {width}": {"head_width": width} for width in (48, 64, 128)}
    changes["absolute position"] = {"position": "absolute"}
    cases = []
    for precision in TOLERANCES:
        shapes = [replace(stage, batch=2, device=device) for stage in zoo_shapes(ZOO_MODELS)]
        shapes += [replace(base, label=label, **change) for label, change in changes.items()]  # type: ignore[arg-type]
        cases += [
            Case(shape) for shape in merge_equal(replace(shape, precision=precision) for shape in shapes)
        ]
        cases.append(Case(replace(base, label="large biases", precision=precision), large_biases=True))
    return cases


# --- Compilation --------------------------------------------------------------------------------------------


def compile_all(options: Options, report: Report) -> None:
    """Compile the kernels of all cases, and of the section `training`, into Triton's cache, in parallel.

    Nothing is launched. Without a GPU, one small case is compiled for compute capability 9.0.
    """
    start = time.time()
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined, in the processes of the pool
    if options.is_small:
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton reads this from a driver otherwise
        capability = 90
        shapes = [replace(list_cases("cpu", True)[0].shape, precision="bfloat16")]
    else:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
        shapes = [case.shape for case in list_cases(options.device, False)] + trained_shapes()
    # Kernels do not depend on these, nor on the number of heads unless it decides the alignment.
    kinds = dict.fromkeys(
        replace(x, label="", batch=1, neighbors=0 if isinstance(x.neighbors, int) else x.neighbors)
        for x in (replace(x, heads=x.heads if x.head_width % 16 else 1) for x in shapes)
    )
    compiled, failures = 0, []
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_shape, capability, shape): str(shape) for shape in kinds}
        if not options.is_small:
            stage = stage_shape(options, 1)
            futures |= {pool.submit(compile_choice, capability, stage, *x): str(x) for x in TUNING}
        for future in as_completed(futures):
            error = future.exception()
            if error is None:
                compiled += future.result()
            else:
                failures.append(f"{futures[future]}: {type(error).__name__}: {error}")
                print(failures[-1], file=sys.stderr)
    report.add("kernels compiled", compiled, note=f"in {time.time() - start:.0f} s")
    report.expect("all kernels compile", not failures, failures[0] if failures else "")


def trained_shapes() -> list[AttentionShape]:
    """Return the shapes of the section `training`: the default model, with all neighbors and a random one."""
    choices: tuple[str | int, ...] = ("all", 0)
    return [
        replace(shape, precision=precision, neighbors=neighbors)
        for shape in model_shapes(resolve_train_command([]).config.model)
        for precision in TOLERANCES
        for neighbors in choices
    ]


def compile_shape(capability: int, shape: AttentionShape) -> int:
    """Compile the kernels for a shape, in a process of the pool; return their number."""
    from tools.dev.kernel_statistics import compile_kernels

    arguments = (shape.precision, shape.head_width, shape.spec, shape.global_tokens, shape.is_relative)
    return len(compile_kernels(capability, *arguments, shape.heads))


def compile_choice(capability: int, shape: AttentionShape, warps: int, stages: int) -> int:
    """Compile the kernels for one choice of `TUNING`; return 0 if it needs more resources than there are."""
    try:
        with override_launch(warps, stages):
            return compile_shape(capability, shape)
    except Exception:  # reported by the section `tuning`
        return 0


# --- Correctness --------------------------------------------------------------------------------------------


def check_all(options: Options, report: Report) -> None:
    """Compare the kernels with float64 on random inputs, test that they are reproducible, and a huge batch.

    Uninitialized memory is filled with NaN, so that elements that a kernel does not write are found.
    """
    device = torch.device(options.device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if not torch.empty(1, device=device).isnan().item():
        raise RuntimeError("uninitialized memory is not filled with NaN: missing writes would not be found")
    seed = options.seed
    cases = list_cases(options.device, options.is_small)
    results: dict[str, list[tuple[float, str]]] = defaultdict(list)
    compared = 0
    for case in cases:
        if options.seconds_left < 30 and not options.is_small:  # for the other checks
            break
        results[case.shape.precision].append(_compare(case, seed, report))
        compared += 1
    for precision, errors in results.items():
        worst, note = max(errors, key=lambda item: item[0] if item[0] == item[0] else float("inf"))
        name = f"largest relative error, {precision}"
        report.check(name, worst, TOLERANCES[precision], note=f"{note}; {len(errors)} cases, seed {seed}")
    if compared < len(cases):
        report.expect("time for all cases", False, f"{len(cases) - compared} of {len(cases)} were omitted")
    repeated = [case for case in cases if "stage" in case.shape.label] or cases[:1]
    different = [case.shape.label for case in repeated if not _is_reproducible(case, seed)]
    report.expect("bit-identical twice", not different, ", ".join(different) or f"{len(repeated)} cases")
    _check_huge(options, report, seed)


def _compare(case: Case, seed: int, report: Report) -> tuple[float, str]:
    """Return the largest error (NaN after a failure), and its tensor and case."""
    shape, name = case.shape, f"{case.shape.label}, {case.shape.precision}"
    compare = partial(compare_with_float64, shape, ["fused"], seed, case.inputs(seed))
    result = try_measure(compare, torch.device(shape.device))
    missing = result if isinstance(result, Missing) else result[0].missing
    if isinstance(result, Missing) or missing is not None:
        report.expect(name, False, missing.reason if missing else "")
        return float("nan"), f"{shape.label} failed"
    tensor, error = result[0].largest()
    report.check(name, error, TOLERANCES[shape.precision], note=str(result[0]), shown=False)
    return error, f"{tensor} of {shape.label}"


def _outputs(
    backend: str, shape: AttentionShape, inputs: Inputs, gradient: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield the output and all gradients."""
    method = METHODS[backend](shape, inputs)
    output = method.forward()
    yield output.detach()
    yield from method.gradients(output, gradient)


def _is_reproducible(case: Case, seed: int) -> bool:
    inputs = case.inputs(seed)
    gradient = case.shape.output_gradient(inputs.query)
    first, second = (_outputs("fused", case.shape, inputs, gradient) for _ in range(2))
    return all(map(torch.equal, first, second))


def _check_huge(options: Options, report: Report, seed: int) -> None:
    """Compare the last images of a batch of more than 2³¹ elements with float64."""
    device = torch.device(options.device)
    batch = -(-HUGE_ELEMENTS // (3 * 32 * 56 * 56))
    shape = AttentionShape("huge", batch, 3, 32, 56, 56, precision="bfloat16", device=options.device)
    if options.is_small:
        shape = AttentionShape("huge", 3, 1, 16, 4, 4, window=2, precision="float16")
    shape = replace(shape, position="absolute")
    elements = shape.batch * shape.tokens * shape.heads * shape.head_width
    name, required = f"batch of {elements:.2g} elements", 14 * elements * shape.dtype.itemsize
    if not options.is_small:
        torch.cuda.empty_cache()  # memory that PyTorch keeps of the other checks does not count as free
        if torch.cuda.mem_get_info(device)[0] < required:
            report.add(name, note=f"skipped: needs {required / 1e9:.0f} GB")
            return
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow for so many gigabytes
    inputs = shape.inputs(seed)
    gradient = shape.output_gradient(inputs.query)
    actual = [x[-2:].clone() for x in _outputs("fused", shape, inputs, gradient)]
    last = to_float64(Inputs(*(x[-2:] for x in inputs[:5])))
    last_shape = replace(shape, batch=2, precision="float64")
    expected = _outputs("dense", last_shape, last, gradient[-2:].double())
    error = max(map(relative_error, actual, expected))
    report.check(name, error, TOLERANCES[shape.precision], note="last two images")
