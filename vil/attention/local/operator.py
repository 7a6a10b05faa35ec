"""A backend as an operator of PyTorch.

`torch.compile`, `torch.export`, gradient checkpointing, distributed wrappers, fake tensors and the FLOP
counter then meet one known operator, `torch.ops.vil.<backend>_attention`, instead of what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vil.attention.local.geometry import Inputs, Window, keys_per_query

Forward = Callable[..., "tuple[Tensor, Tensor]"]
Backward = Callable[..., "tuple[Tensor, ...]"]

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor global_key, Tensor global_value, "
    "Tensor? bias_table, Tensor? global_bias, Tensor? neighbor, Tensor? seed"
)
_WINDOW = "SymInt[2] size, int window, str mask, str neighbors, float dropout"
_INPUTS = len(Inputs._fields)
_OPTIONS = len(Window._fields)


def register(
    name: str, forward: Forward, backward: Backward, *, keeps_sums: bool, can_fall_back: bool = False
) -> Callable[..., Tensor]:
    """Makes `torch.ops.vil.<name>_attention` and its derivative, and returns the function that calls it.

    Args:
        name: of the backend.
        forward: (inputs, window, seed of the dropout or None) → the output (B, h, N, D), laid out as
            `like_tokens` does, and the logarithm of the sum of each query's exponentiated scores (B, h, N),
            float32, or without `keeps_sums` an empty tensor.
        backward: (inputs, window, seed, output, sums, gradient of the output, whether biases need gradients)
            → the gradients of the first seven tensors of `Inputs`; empty for biases that are absent or need
            none. Output and sums are empty without `keeps_sums`.
        keeps_sums: whether output and sums are kept for the derivative, beside the inputs.
        can_fall_back: the operator, `forward` and `backward` have one more argument, whether another backend
            may compute where this one's kernels fail.

    Returns:
        (inputs, window) → the output; with `can_fall_back` (inputs, window, may_fall_back).
    """
    window_schema = f"{_WINDOW}, bool may_fall_back" if can_fall_back else _WINDOW

    @torch.library.custom_op(
        f"vil::{name}_attention",
        mutates_args=(),
        schema=f"({_TENSORS}, {window_schema}) -> (Tensor, Tensor)",
    )
    def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, seed, window, flags = _unpack(arguments)
        return forward(inputs, window, seed, *flags)

    @torch.library.custom_op(
        f"vil::{name}_attention_backward",
        mutates_args=(),
        schema=f"({_TENSORS}, {window_schema}, Tensor output, Tensor sums, Tensor gradient, bool of_biases) "
        f"-> ({', '.join(['Tensor'] * 7)})",
    )
    def differentiate(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, seed, window, flags = _unpack(arguments[:-4])
        return backward(inputs, window, seed, *arguments[-4:], *flags)

    @attend.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor]:
        query = arguments[0]
        sums = query.new_empty(query.shape[:3] if keeps_sums else 0, dtype=torch.float32)
        return like_tokens(query), sums

    @differentiate.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, of_biases = _unpack(arguments[:-4])[0], arguments[-1]
        return empty_gradients(inputs, of_biases)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[: _INPUTS + 1], *(output if keeps_sums else ()))
        ctx.options = inputs[_INPUTS + 1 :]  # the window, and whether to fall back

    def derive(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: what is recomputed may be unpacked a single time
        tensors, kept = saved[: _INPUTS + 1], saved[_INPUTS + 1 :]
        output, sums = kept or (gradient.new_empty(0), gradient.new_empty(0))
        of_biases = any(ctx.needs_input_grad[5:7])
        found = differentiate(*tensors, *ctx.options, output, sums, gradient, of_biases)
        gradients = [g if needed else None for g, needed in zip(found, ctx.needs_input_grad)]
        return (*gradients, *[None] * (2 + len(ctx.options)))

    attend.register_autograd(derive, setup_context=keep)
    register_flop_formula(getattr(torch.ops.vil, f"{name}_attention"))(_flops)
    register_flop_formula(getattr(torch.ops.vil, f"{name}_attention_backward"))(_flops_backward)

    def call(inputs: Inputs, window: Window, *flags: bool) -> Tensor:
        # Drawn on the CPU, so that no device is waited for; the backward pass draws the same weights again.
        seed = torch.randint(2**62, (1,)) if window.dropout else None
        return attend(*inputs, seed, *window, *flags)[0]

    return call


def like_tokens(tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, h, N, D) whose memory is (B, N, h, D), so that the heads merge without a copy."""
    batch, heads, count, width = tokens.shape
    return tokens.new_empty(batch, count, heads, width, dtype=dtype or tokens.dtype).transpose(1, 2)


def empty_gradients(inputs: Inputs, of_biases: bool) -> tuple[Tensor, ...]:
    """Places for the gradients of the first seven tensors of `inputs`, laid out as backends return them."""
    biases = [
        inputs.query.new_empty(0) if bias is None or not of_biases else torch.empty_like(bias)
        for bias in (inputs.bias_table, inputs.global_bias)
    ]
    return (
        *[like_tokens(x) for x in (inputs.query, inputs.key, inputs.value)],
        *[x.new_empty(x.shape) for x in (inputs.global_key, inputs.global_value)],
        *biases,
    )


def _unpack(arguments: tuple[Any, ...]) -> tuple[Inputs, Tensor | None, Window, tuple[bool, ...]]:
    """Inputs, seed, window, and the flag of an operator that can fall back, from the operator's arguments."""
    options, flags = arguments[_INPUTS + 1 : _INPUTS + 1 + _OPTIONS], arguments[_INPUTS + 1 + _OPTIONS :]
    window = Window(tuple(options[0]), *options[1:])
    return Inputs(*arguments[:_INPUTS]), arguments[_INPUTS], window, flags


def _flops(*arguments: Any, **_: Any) -> int:
    """Scores and weighted sums, 2 per multiply-add. Tensors come as shapes."""
    (batch, heads, tokens, width), globals_ = arguments[0], arguments[3][2]
    _, side, mask, neighbors, _ = arguments[_INPUTS + 1 : _INPUTS + 6]
    keys = globals_ + keys_per_query(side, mask, "random" if neighbors == "one" else neighbors)
    return 4 * batch * heads * tokens * width * keys


def _flops_backward(*arguments: Any, **_: Any) -> int:
    """Five products of matrices where the forward pass has two, as PyTorch counts its own attention."""
    return 5 * _flops(*arguments) // 2
