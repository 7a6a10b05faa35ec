"""tools/benchmark.py attention --check: is every backend right, on this device and in this precision?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from tools.benchmarking import measure
from tools.benchmarking.attention import problems_of
from tools.benchmarking.measure import Missing, attempt
from tools.benchmarking.methods import METHODS, UnavailableError, bytes_needed
from tools.benchmarking.problem import Problem, heading, leaves_of
from vil.attention.local import BACKENDS
from vil.attention.local.geometry import Inputs

DRAWS = 8
"""Output gradients that are drawn. Errors are those over all of them together, so that a gradient of few
numbers, as that of the bias of a global token, does not seem wrong because it happens to be nearly 0."""

FLOOR = 1e-3
"""Share of the largest gradient's norm, below which no gradient's norm is taken as 1."""


@dataclass
class Comparison:
    """Relative errors of a method's output and gradients, by name, as far as it came; and what stopped it."""

    method: str
    errors: dict[str, float]
    missing: Missing | None

    def wrong(self, tolerance: float) -> bool:
        """Whether an error is larger (or no number), or the method broke down."""
        too_large = any(not error <= tolerance for error in self.errors.values())
        return too_large or (self.missing is not None and self.missing.failed)

    def __str__(self) -> str:
        shown = [f"{key} {error:.1e}" for key, error in self.errors.items()]
        return ", ".join([*shown, self.missing.reason] if self.missing else shown)


def check(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, head: str) -> None:
    """Prints the errors of every method on every problem. Exit status 1 where one is too large."""
    methods = arguments.methods or [*BACKENDS, "auto"]
    tolerance, wrong = (1e-4 if dtype == torch.float32 else 1e-2), 0
    limit = arguments.skip_memory_above or measure.default_memory(device)
    seed = torch.seed() % 2**31
    lines = [head, f"- Relative errors ‖x − y‖ / ‖y‖ against the dense definition in float64; seed {seed}.\n"]
    for problem in tqdm(problems_of(arguments, device, dtype), unit="shape", leave=False, disable=None):
        lines.append(heading(problem))
        needed = 8 // dtype.itemsize * bytes_needed("dense", problem)
        found: list[Comparison] | Missing = Missing(f"the definition would need about {needed / 1e9:.1f} GB")
        if needed <= limit:
            found = attempt(partial(check_problem, problem, methods, seed), device)
        if isinstance(found, Missing):
            wrong += found.failed
            lines.append(f"  n/a: {found.reason}")
            continue
        for comparison in found:
            failed = comparison.wrong(tolerance)
            wrong += failed
            verdict = "WRONG" if failed else "n/a" if comparison.missing else "ok"
            lines.append(f"  {comparison.method:14} {verdict:5} {comparison}")
    print(*lines, f"{wrong} wrong, tolerance {tolerance:.0e}", sep="\n")
    if wrong:
        raise SystemExit(1)


def check_problem(
    problem: Problem, methods: Sequence[str], seed: int, inputs: Inputs | None = None
) -> list[Comparison]:
    """Compares methods with the dense definition, which computes in float64 what they are given.

    The gradients of a method that keeps tokens in an order of its own are not compared. An error is relative
    to the norm of what is right; for a gradient to `FLOOR` of the largest gradient's norm at least, so that
    one that is nearly 0 by chance is not held to more digits than the others have.

    Args:
        problem: the shapes.
        methods: names in `METHODS`.
        seed: of the inputs and the gradients of the output.
        inputs: in place of random ones.
    """
    inputs = problem.inputs(seed) if inputs is None else inputs
    names = [name for name, x in zip(Inputs._fields, inputs) if x is not None and x.requires_grad]
    exact = Inputs._make(_as_float64(x) for x in inputs)
    gradients = [problem.output_gradient(inputs.query, seed + draw) for draw in range(1, DRAWS + 1)]
    reference = METHODS["dense"](replace(problem, dtype=torch.float64), exact)
    expected = reference.forward()
    expected_gradients = _gradients(expected, reference.leaves, [x.double() for x in gradients])
    floor = FLOOR * max(x.norm().item() for x in expected_gradients)

    def compare(name: str, errors: dict[str, float]) -> None:
        method = METHODS[name](problem, inputs)
        if method.restored is None:
            raise UnavailableError("computes another attention")
        same_leaves = [id(x) for x in method.leaves] == [id(x) for x in leaves_of(inputs)]
        with torch.set_grad_enabled(same_leaves):
            output = method.restored(method.forward())
        errors["output"] = _error(output, expected)
        if same_leaves:
            found = _gradients(output, method.leaves, gradients)
            for leaf, ours, theirs in zip(names, found, expected_gradients):
                if theirs.numel():
                    errors[leaf] = _error(ours, theirs, floor)

    results = []
    for name in methods:
        errors: dict[str, float] = {}
        missing = attempt(partial(compare, name, errors), problem.device)
        results.append(Comparison(name, errors, missing))
    return results


def _gradients(output: Tensor, leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Of each leaf, its gradients for all gradients of the output, (draws, *shape of the leaf)."""
    draws = [
        torch.autograd.grad(output, leaves, x, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in gradients
    ]
    return [torch.stack(of_leaf) for of_leaf in zip(*draws)]


def _as_float64(x: Tensor | None) -> Tensor | None:
    if x is None or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_()


def _error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    return (ours.double() - theirs).norm().item() / max(theirs.norm().item(), floor)
