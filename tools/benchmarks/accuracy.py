"""Comparison of attention methods with the dense definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from tools.benchmarks.methods import METHODS, PreparedMethod, UnavailableError, estimate_memory
from tools.benchmarks.shapes import AttentionShape, grad_leaves
from tools.benchmarks.timing import Missing, try_measure
from vil.attention.local.geometry import Inputs

OUTPUT_GRADIENTS = 8
"""Output gradients per comparison. An error is that over all of them, as the gradient of a single bias may be
close to 0 for one of them."""
MIN_GRADIENT_NORM = 1e-3
"""Smallest norm that an error of a gradient is relative to, as a fraction of the largest gradient's norm."""


@dataclass
class Comparison:
    """Relative errors of a method by tensor, and the reason if it did not complete."""

    method: str
    errors: dict[str, float]
    missing: Missing | None

    def is_wrong(self, tolerance: float) -> bool:
        """Return True if an error exceeds the tolerance or is NaN, or if the method broke down."""
        is_inaccurate = any(not error <= tolerance for error in self.errors.values())
        return is_inaccurate or (self.missing is not None and self.missing.is_failure)

    def largest(self) -> tuple[str, float]:
        """Return the tensor with the largest error, and this error; NaN counts as the largest."""
        return max(self.errors.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))

    def __str__(self) -> str:
        shown = [f"{key} {error:.1e}" for key, error in self.errors.items()]
        return ", ".join([*shown, self.missing.reason] if self.missing else shown)


def check_accuracy(
    shapes: Sequence[AttentionShape], methods: Sequence[str], limit: float, seed: int
) -> tuple[list[str], int]:
    """Compare all methods on shapes of one precision, with random inputs.

    Shapes on which the definition needs more than `limit` bytes of memory are reported as n/a.

    Returns:
        The lines of the report, and the number of wrong results.
    """
    tolerance, wrong = (1e-4 if shapes[0].dtype == torch.float32 else 1e-2), 0
    lines = [f"- Relative errors ‖x − y‖ / ‖y‖ against the dense definition in float64; seed {seed}.\n"]
    for shape in tqdm(shapes, unit="shape", leave=False, disable=None):
        lines.append(str(shape))
        required = 8 // shape.dtype.itemsize * estimate_memory("dense", shape)
        compare = partial(compare_with_float64, shape, methods, seed)
        comparisons: list[Comparison] | Missing
        comparisons = Missing(f"the definition would need about {required / 1e9:.1f} GB")
        if required <= limit:
            comparisons = try_measure(compare, torch.device(shape.device))
        if isinstance(comparisons, Missing):
            wrong += comparisons.is_failure
            lines.append(f"  n/a: {comparisons.reason}")
            continue
        for comparison in comparisons:
            is_wrong = comparison.is_wrong(tolerance)
            wrong += is_wrong
            verdict = "WRONG" if is_wrong else "n/a" if comparison.missing else "ok"
            lines.append(f"  {comparison.method:14} {verdict:5} {comparison}")
    return [*lines, f"{wrong} wrong, tolerance {tolerance:.0e}"], wrong


def compare_with_float64(
    shape: AttentionShape, methods: Sequence[str], seed: int, inputs: Inputs | None = None
) -> list[Comparison]:
    """Compare outputs and gradients with the dense definition, computed in float64 from the same inputs.

    The error of a gradient is relative to `MIN_GRADIENT_NORM` at least. Gradients of a method that reorders
    its inputs are not compared.

    Args:
        methods: names in `METHODS`.
        seed: of the inputs and the output gradients.
        inputs: replacement for the random inputs of the shape.
    """
    inputs = shape.inputs(seed) if inputs is None else inputs
    names = [name for name, x in zip(Inputs._fields, inputs) if x is not None and x.requires_grad]
    gradients = [shape.output_gradient(inputs.query, seed + draw) for draw in range(1, OUTPUT_GRADIENTS + 1)]
    reference = METHODS["dense"](replace(shape, precision="float64"), to_float64(inputs))
    expected = reference.forward()
    expected_gradients = _stack_gradients(reference, expected, [x.double() for x in gradients])
    min_norm = MIN_GRADIENT_NORM * max(x.norm().item() for x in expected_gradients)

    def compare(name: str, errors: dict[str, float]) -> None:
        method = METHODS[name](shape, inputs)
        if method.to_map_order is None:
            raise UnavailableError("computes another attention")
        has_same_leaves = [id(x) for x in method.leaves] == [id(x) for x in grad_leaves(inputs)]
        with torch.set_grad_enabled(has_same_leaves):
            output = method.to_map_order(method.forward())
        errors["output"] = relative_error(output, expected)
        if has_same_leaves:
            leaf_gradients = _stack_gradients(method, output, gradients)
            for leaf, gradient, exact in zip(names, leaf_gradients, expected_gradients):
                if exact.numel():
                    errors[leaf] = relative_error(gradient, exact, min_norm)

    comparisons = []
    for name in methods:
        errors: dict[str, float] = {}
        missing = try_measure(partial(compare, name, errors), torch.device(shape.device))
        comparisons.append(Comparison(name, errors, missing))
    return comparisons


def relative_error(actual: Tensor, expected: Tensor, min_norm: float = 0.0) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ in float64; the divisor is at least `min_norm`."""
    expected = expected.double()
    return (actual.double() - expected).norm().item() / max(expected.norm().item(), min_norm)


def to_float64(inputs: Inputs) -> Inputs:
    """Return the inputs as new leaves in float64; integers stay."""
    return Inputs._make(
        x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs
    )


def _stack_gradients(method: PreparedMethod, output: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return for each leaf its gradients for all output gradients, (draws, *shape of the leaf)."""
    draws = [method.gradients(output, gradient, retain_graph=True) for gradient in gradients]
    return [torch.stack(leaf_gradients) for leaf_gradients in zip(*draws)]
