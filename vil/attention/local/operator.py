"""Registration of a backend as a PyTorch operator, `torch.ops.vil.<backend>_attention`.

`torch.compile`, `torch.export`, gradient checkpointing, distributed wrappers, fake tensors and the FLOP
counter treat it as one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vil.attention.local.geometry import (
    Inputs,
    LocalAttentionSpec,
    OperatorInputs,
    keys_per_query,
    operator_inputs,
)

Argument = Any
"""A tensor, None, a number or a text: the flat arguments of the operator, as `_unpack` takes them apart."""
Arguments = tuple[Argument, ...]

Forward = Callable[..., "tuple[Tensor, Tensor]"]
Backward = Callable[..., "tuple[Tensor, ...]"]

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor global_key, Tensor global_value, "
    "Tensor? window_bias, Tensor? global_bias, Tensor? neighbor, Tensor? seed"
)
_SPEC = "SymInt[2] size, int window, str mask, str neighbors, float dropout, bool may_fall_back"
_GRADIENT = "Tensor output, Tensor sums, Tensor gradient, bool[2] needs_bias_grads"
_INPUTS = len(OperatorInputs._fields)


def register(
    name: str, forward: Forward, backward: Backward, *, keeps_sums: bool
) -> Callable[[Inputs, LocalAttentionSpec], Tensor]:
    """Register `torch.ops.vil.<name>_attention` with its derivative. Return the function that calls it.

    Args:
        name: name of the backend.
        forward: (`OperatorInputs`, spec, seed of the dropout or None) → the output (B, h, N, D), with the
            strides of `like_tokens`, and the logarithm of the sum of each query's exponentiated scores
            (B, h, N), float32, or an empty tensor without `keeps_sums`.
        backward: (inputs, spec, seed, output, sums, gradient of the output, two bools: the window and the
            global biases need gradients) → the gradients of the first seven inputs; empty for biases that
            need none. Output and sums are empty without `keeps_sums`.
        keeps_sums: save output and sums for the backward pass, in addition to the inputs.
    """
    schema = f"({_TENSORS}, {_SPEC}) -> (Tensor, Tensor)"
    results = ", ".join(["Tensor"] * 7)
    gradient_schema = f"({_TENSORS}, {_SPEC}, {_GRADIENT}) -> ({results})"

    @torch.library.custom_op(f"vil::{name}_attention", mutates_args=(), schema=schema)
    def attend(*arguments: Argument) -> tuple[Tensor, Tensor]:
        return forward(*_unpack(arguments))

    @torch.library.custom_op(f"vil::{name}_attention_backward", mutates_args=(), schema=gradient_schema)
    def differentiate(*arguments: Argument) -> tuple[Tensor, ...]:
        return backward(*_unpack(arguments[:-4]), *arguments[-4:])

    @attend.register_fake
    def _(*arguments: Argument) -> tuple[Tensor, Tensor]:
        query = arguments[0]
        sums = query.new_empty(query.shape[:3] if keeps_sums else 0, dtype=torch.float32)
        return like_tokens(query), sums

    @differentiate.register_fake
    def _(*arguments: Argument) -> tuple[Tensor, ...]:
        return empty_gradients(OperatorInputs(*arguments[:_INPUTS]), arguments[-1])

    def setup_context(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[: _INPUTS + 1], *(output if keeps_sums else ()))
        ctx.spec = inputs[_INPUTS + 1 :]

    def backward_from_context(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: recomputed tensors can be unpacked only once
        tensors, kept = saved[: _INPUTS + 1], saved[_INPUTS + 1 :]
        output, sums = kept or (gradient.new_empty(0), gradient.new_empty(0))
        needs_bias_grads = ctx.needs_input_grad[5:7]
        gradients = differentiate(*tensors, *ctx.spec, output, sums, gradient, needs_bias_grads)
        needed_gradients = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)]
        return (*needed_gradients, *[None] * (2 + len(ctx.spec)))

    attend.register_autograd(backward_from_context, setup_context=setup_context)
    register_flop_formula(getattr(torch.ops.vil, f"{name}_attention"))(_flops)
    register_flop_formula(getattr(torch.ops.vil, f"{name}_attention_backward"))(_flops_backward)

    def call(inputs: Inputs, spec: LocalAttentionSpec) -> Tensor:
        # Drawn on the CPU, to avoid a synchronization; the backward pass drops the same weights.
        seed = torch.randint(2**62, (1,)) if spec.dropout else None
        # The biases are part of the caller's graph: a compiler fuses them, the backward pass has them.
        return attend(*operator_inputs(inputs, spec), seed, *spec)[0]

    return call


def like_tokens(tokens: Tensor) -> Tensor:
    """Return an empty (B, h, N, D) with memory layout (B, N, h, D), so that heads merge without a copy."""
    batch, heads, count, width = tokens.shape
    return tokens.new_empty(batch, count, heads, width).transpose(1, 2)


def empty_gradients(inputs: OperatorInputs, needs_bias_grads: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return empty gradients of the first seven tensors of `inputs`, with the strides of all backends."""
    biases = [
        bias.new_empty(bias.shape) if bias is not None and needed else inputs.query.new_empty(0)
        for bias, needed in zip((inputs.window_bias, inputs.global_bias), needs_bias_grads)
    ]
    return (
        *[like_tokens(x) for x in (inputs.query, inputs.key, inputs.value)],
        *[x.new_empty(x.shape) for x in (inputs.global_key, inputs.global_value)],
        *biases,
    )


def _unpack(arguments: Arguments) -> tuple[OperatorInputs, LocalAttentionSpec, Tensor | None]:
    """Return inputs, spec and seed from the arguments of the operator."""
    seed, size, *options = arguments[_INPUTS:]
    return OperatorInputs(*arguments[:_INPUTS]), LocalAttentionSpec(tuple(size), *options), seed


def _flops(*arguments: Argument, **_: object) -> int:
    """Count scores and weighted sums, 2 per multiply-add. Tensors are given as shapes."""
    (batch, heads, tokens, width), num_globals = arguments[0], arguments[3][2]
    _, side, mask, neighbors = arguments[_INPUTS + 1 : _INPUTS + 5]
    keys = num_globals + keys_per_query(side, mask, "random" if neighbors == "one" else neighbors)
    return 4 * batch * heads * tokens * width * keys


def _flops_backward(*arguments: Argument, **_: object) -> int:
    """Count five matrix products where the forward pass has two, as PyTorch does for its attention."""
    return 5 * _flops(*arguments) // 2
