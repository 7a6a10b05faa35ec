"""Inputs of the local attention, its outputs and gradients."""

import torch

from vil.attention.local import local_attention


def make_inputs(
    size, window, global_tokens, bias, heads=2, head_dim=4, batch=2, dtype=torch.float64, seed=0, device="cpu"
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator).to(device).requires_grad_()

    tokens = size[0] * size[1]
    inputs = {name: random(batch, heads, tokens, head_dim) for name in ("query", "key", "value")}
    inputs |= {name: random(batch, heads, global_tokens, head_dim) for name in ("global_key", "global_value")}
    if bias:
        inputs["bias_table"] = random(heads, 4 * window - 1, 4 * window - 1)
        inputs["global_bias"] = random(heads, global_tokens)
    return inputs


def run(inputs, **options):
    """Return the output and the gradients of a weighted sum of it."""
    output = local_attention(**inputs, **options)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(
        output.shape
    )
    gradients = torch.autograd.grad((weights * output).sum(), list(inputs.values()), allow_unused=True)
    zero = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), gradients)]
    return [output, *zero]


def largest_difference(a, b):
    return max(((x - y).abs().max().item() if x.numel() else 0.0) for x, y in zip(a, b))
