"""Projections of tokens: one conversion under autocast, and gradients in one tensor, to the same bits."""

import pytest
import torch
from helpers.attention_builder import build_small_attention as build
from helpers.attention_builder import random_tokens as tokens
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vil.attention.base import Attention, ProjectedTokens
from vil.evaluation.cost import saved_bytes

SIZE = (6, 5)
PROJECTIONS = {
    "vision_longformer": {},
    "global_only": {"share_global_projection": False},
    "linformer": {},
    "spatial_reduction": {},
}


def unconverted_inputs(x, count):
    return (x,) * count


def normalized_tokens(attention):
    """Float32 and not a leaf, as in a model; of leaves autocast itself remembers the conversion."""
    return F.layer_norm(tokens(attention).requires_grad_(), (attention.dim,))


def run_in_half(attention, dtype):
    """Return the output under autocast and the gradients of the input and the parameters."""
    x = normalized_tokens(attention)
    with torch.autocast("cpu", dtype):
        output = attention(x, SIZE)
    return output, *torch.autograd.grad(output.float().square().sum(), (x, *attention.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_one_conversion_under_autocast_gives_the_same_bits(name, dtype, monkeypatch):
    attention = build(name, **PROJECTIONS[name])
    found = run_in_half(attention, dtype)
    monkeypatch.setattr(Attention, "projection_inputs", staticmethod(unconverted_inputs))
    for ours, expected in zip(found, run_in_half(attention, dtype), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_one_conversion_under_autocast_saves_the_memory_of_another(name, monkeypatch):
    attention = build(name, **PROJECTIONS[name])
    x = normalized_tokens(attention)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return attention(x, SIZE)

    found = saved_bytes(forward)
    monkeypatch.setattr(Attention, "projection_inputs", staticmethod(unconverted_inputs))
    converted = x if name != "spatial_reduction" else x[:, 2:]  # its convolution sees no global tokens
    assert found == saved_bytes(forward) - 2 * converted.numel()


class OnOneMap(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, SIZE)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:Converting a tensor to")
@pytest.mark.parametrize("name", PROJECTIONS)
def test_traces_under_autocast_equal_eager(name):
    attention = OnOneMap(build(name, **PROJECTIONS[name])).eval()
    x = tokens(attention.attention)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
        traced = torch.jit.trace(attention, x, check_trace=False)
        exported = torch.export.export(attention, (x,))
        for output in (traced(x), exported.module()(x)):
            torch.testing.assert_close(output, attention(x), atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_single_images_under_autocast():
    attention = build("linformer")
    x = tokens(attention)
    parameters = dict(attention.named_parameters())

    def loss(parameters, image):
        with torch.autocast("cpu", torch.bfloat16):
            return functional_call(attention, parameters, (image[None], SIZE)).float().square().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for index, image in enumerate(x):
        for key, gradient in grad(loss)(parameters, image).items():
            torch.testing.assert_close(together[key][index], gradient, atol=5e-2, rtol=5e-2)


GLOBAL_MEMORY = {
    "shared": {},
    "separate": {"share_global_projection": False},
    "no global tokens": {"global_tokens": 0},
    "relative": {"position": "relative"},
}


def split_by_autograd(attention, x, count, num_globals):
    split = [num_globals, x.shape[1] - num_globals]
    heads = (attention.split_heads(part) for part in x.chunk(count, dim=-1))
    return tuple(ProjectedTokens(tokens, *tokens.split(split, dim=2)) for tokens in heads)


def gradients(attention, x):
    return torch.autograd.grad(attention(x, SIZE).square().sum(), (x, *attention.parameters()))


@pytest.mark.parametrize("options", GLOBAL_MEMORY.values(), ids=GLOBAL_MEMORY)
def test_gradients_of_projections_in_one_tensor_have_the_same_bits(options, monkeypatch):
    attention = build("vision_longformer", **options)
    x = tokens(attention).requires_grad_()
    found = gradients(attention, x)
    monkeypatch.setattr(Attention, "split_projection", split_by_autograd)
    for ours, expected in zip(found, gradients(attention, x), strict=True):
        assert torch.equal(ours, expected)


class WrittenBytes(TorchDispatchMode):
    """Count the bytes that operators write which copy, pad or add gradients."""

    NAMES = ("cat", "stack", "clone", "copy_", "add", "add_", "zeros", "slice_backward", "select_backward")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.NAMES:
            self.count += result.nbytes
        return result


def test_gradients_of_projections_are_copied_less_often(monkeypatch):
    def written_bytes():
        output = attention(x, SIZE).square().sum()
        with WrittenBytes() as written:
            output.backward()
        return written.count

    attention = build("vision_longformer", dim=48)
    x = tokens(attention, batch=8).requires_grad_()
    found = written_bytes()
    monkeypatch.setattr(Attention, "split_projection", split_by_autograd)
    assert found < 0.6 * written_bytes()


@pytest.mark.parametrize(("count", "num_globals"), [(1, 0), (1, 2), (2, 2)])
def test_second_derivatives_of_split_projections(count, num_globals):
    attention = build("global_only", heads=2)
    x = torch.randn(2, 5, 4 * count, dtype=torch.float64, requires_grad=True)

    def split(x):
        return [view.sin() for parts in attention.split_projection(x, count, num_globals) for view in parts]

    assert torch.autograd.gradcheck(split, x, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(split, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["global_only", "vision_longformer"])
def test_gradients_of_single_images(name):
    attention = build(name)
    x = tokens(attention).requires_grad_()
    loss = attention(x, SIZE).square().sum()
    with sdpa_kernel(SDPBackend.MATH):
        per_image = vmap(grad(lambda image: attention(image[None], SIZE).square().sum()))(x.detach())
    torch.testing.assert_close(per_image, torch.autograd.grad(loss, x)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["global_only", "vision_longformer"])
def test_forward_mode_derivatives_agree_with_gradients(name):
    attention = build(name)
    x, direction = tokens(attention), tokens(attention).flip(1)

    def loss(x):
        return attention(x, SIZE).square().sum()

    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        _, derivative = jvp(loss, (x,), (direction,))
        torch.testing.assert_close(derivative, (grad(loss)(x) * direction).sum())


def test_autocast_to_float32_converts_nothing(monkeypatch):
    """As on a GPU, whose autocast accepts float32: a gradient must not be added in place."""
    monkeypatch.setattr("vil.attention.base.is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.float32)
    x = torch.randn(2, 3, requires_grad=True) * 1
    assert all(given is x for given in Attention.projection_inputs(x, 2))
