"""Backends as operators of PyTorch: compiled, exported, counted, faked, recomputed; and how one is chosen."""

import re

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.local_inputs import make_inputs, run
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vil.attention.local import ENVIRONMENT, choose, local_attention
from vil.attention.local.chunked import chunked_attention
from vil.attention.local.dense import dense_attention
from vil.attention.local.fused import INTERPRETED
from vil.attention.local.gathered import gathered_attention
from vil.attention.local.geometry import Inputs, LocalAttentionSpec, operator_inputs
from vil.errors import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_KERNELS = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU and no interpreter")
BACKENDS = ["chunked", pytest.param("fused", marks=NEEDS_KERNELS)]
OPTIONS = {"size": (3, 4), "window": 2}


def inputs_of(**change):
    arguments = {**OPTIONS, "global_tokens": 1, "bias": True, "heads": 1, "head_dim": 8, **change}
    return make_inputs(**arguments, dtype=torch.float32, device=DEVICE)


def arguments_of(backend, bias=True, neighbors="all"):
    """Return the arguments of the operator, in order."""
    neighbor = torch.tensor([3], device=DEVICE) if neighbors == "one" else None
    inputs = Inputs(**inputs_of(bias=bias), neighbor=neighbor)
    tensors = [
        tensor if tensor is None or tensor is neighbor else tensor.detach().requires_grad_()
        for tensor in operator_inputs(inputs, LocalAttentionSpec((3, 4), 2))
    ]
    operator = getattr(torch.ops.vil, f"{backend}_attention").default
    return operator, (*tensors, None, [3, 4], 2, "chunk", neighbors, 0.0, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bias", "neighbors"), [(True, "all"), (False, "one")])
def test_opcheck(backend, bias, neighbors):
    """PyTorch's own test of an operator: schema, autograd, fake tensors, tracing with symbolic shapes."""
    torch.library.opcheck(*arguments_of(backend, bias, neighbors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    inputs = inputs_of()

    def function(*tensors):
        return local_attention(**dict(zip(inputs, tensors)), **OPTIONS, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    output = compiled(*inputs.values())
    gradients = torch.autograd.grad(output.square().sum(), list(inputs.values()))
    expected = function(*inputs.values())
    torch.testing.assert_close(output, expected)
    for ours, its in zip(gradients, torch.autograd.grad(expected.square().sum(), list(inputs.values()))):
        torch.testing.assert_close(ours, its)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_scatter_in_compiled_graphs(backend):
    """Inductor would compute it with atomic additions, in another order in every run."""
    inputs, operators = inputs_of(), set()

    def record(graph, _):
        operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def function(*tensors):
        return local_attention(**dict(zip(inputs, tensors)), **OPTIONS, backend=backend)

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    compiled(*inputs.values()).sum().backward()
    assert f"vil.{backend}_attention_backward.default" in operators
    assert not [name for name in operators if re.search(r"scatter|index_(put|add)|unfold_backward", name)]


class Model(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, query, memory):
        return local_attention(query, query, query, memory, memory, **OPTIONS, backend=self.backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_exports(backend):
    """Requested by name as one operator; under `auto` as plain operators that run without this package."""
    inputs = inputs_of()
    arguments = (inputs["query"].detach(), inputs["global_key"].detach())
    model = Model(backend)
    program = torch.export.export(model, arguments, dynamic_shapes=({0: torch.export.Dim("batch")},) * 2)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ours = {name for name in names if name.startswith("vil.")}
    assert ours == (set() if backend == "auto" else {f"vil.{backend}_attention.default"})
    more = tuple(torch.cat([x, x + 1, x]) for x in arguments)  # another batch size
    torch.testing.assert_close(program.module()(*more), model(*more))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_recomputes(backend):
    inputs = inputs_of()

    def function(*tensors):
        return local_attention(**dict(zip(inputs, tensors)), **OPTIONS, backend=backend)

    output = checkpoint(function, *inputs.values(), use_reentrant=False)
    gradients = torch.autograd.grad(output.square().sum(), list(inputs.values()))
    expected = torch.autograd.grad(function(*inputs.values()).square().sum(), list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("neighbors", "keys"), [("all", 9 * 4 + 1), ("self", 4 + 1), (3, 2 * 4 + 1)])
def test_flops_are_counted(backend, neighbors, keys):
    """Two per multiply-add: scores and sums of what a query sees, and 5/2 of that in the backward pass."""
    inputs = inputs_of()
    with FlopCounterMode(display=False) as counter:
        output = local_attention(**inputs, **OPTIONS, neighbors=neighbors, backend=backend)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * 2 * 2 * 12 * keys * 8  # scores and sums, batch, queries, keys, width
    assert counter.get_total_flops() == forward * 7 // 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_have_the_real_ones_strides(backend):
    operator, arguments = arguments_of(backend)
    real = operator(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments])
    for ours, its in zip(fake, real):
        assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
            its.shape,
            its.stride(),
            its.dtype,
            its.device,
        )


@pytest.mark.parametrize("backend", ["dense", *BACKENDS])
def test_autocast_sets_the_precision(backend):
    inputs, half = inputs_of(), torch.bfloat16
    if backend == "fused" and INTERPRETED:  # the interpreter has no bfloat16
        half = torch.float16
    with torch.autocast(DEVICE, half):
        output = local_attention(**inputs, **OPTIONS, backend=backend)
    assert output.dtype == half
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.values())
    torch.testing.assert_close(
        output.float(), run(inputs, **OPTIONS, backend="dense")[0], atol=0.05, rtol=0.05
    )


def test_choice(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    inputs = inputs_of()
    problem = Inputs(**{name: inputs[name] for name in Inputs._fields[:7]}), LocalAttentionSpec((3, 4), 2)
    if DEVICE == "cpu":  # the interpreter is for tests alone
        assert choose(*problem) is chunked_attention
    assert choose(*problem, "dense") is dense_attention
    monkeypatch.setenv(ENVIRONMENT, "dense")
    assert choose(*problem) is dense_attention
    assert choose(*problem, "chunked") is chunked_attention  # the argument takes precedence
    monkeypatch.setenv(ENVIRONMENT, "auto")
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert choose(*problem) is gathered_attention
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(
        ValueError, match=f"{ENVIRONMENT}: backend must be one of auto, dense, chunked, fused"
    ):
        choose(*problem)


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_forward_mode_derivatives(backend):
    """The registered operators have none, and PyTorch returns zeros for them."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs((3, 4), 2, 1, bias=True).items()}
    directions = {name: torch.cos(tensor) for name, tensor in inputs.items()}

    def function(inputs):
        return local_attention(**inputs, **OPTIONS, backend=backend)

    step = 1e-6
    after, before = (
        function({name: inputs[name] + s * step * directions[name] for name in inputs}) for s in (1, -1)
    )
    expected = (after - before) / (2 * step)
    torch.testing.assert_close(jvp(function, (inputs,), (directions,))[1], expected)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(inputs[name], directions[name]) for name in inputs}
        torch.testing.assert_close(forward_ad.unpack_dual(function(duals)).tangent, expected)


def test_forward_mode_derivatives_of_a_function_that_is_compiled_already():
    inputs = {name: tensor.detach() for name, tensor in inputs_of().items()}

    def function(query):
        return local_attention(**{**inputs, "query": query}, **OPTIONS)

    compiled = torch.compile(function, backend="aot_eager")
    compiled(inputs["query"])
    tangents = []
    for f in (function, compiled):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs["query"], torch.ones_like(inputs["query"]))
            tangents.append(forward_ad.unpack_dual(f(dual)).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_by_name_are_refused_where_they_have_no_derivatives(backend):
    inputs = {name: tensor.detach() for name, tensor in inputs_of().items()}

    def loss(query):
        return local_attention(**{**inputs, "query": query}, **OPTIONS, backend=backend).sum()

    message = f"attention_backend: {backend} has no derivatives in forward mode and in torch.func"
    with pytest.raises(UserError, match=message):
        jvp(loss, (inputs["query"],), (inputs["query"],))
    with pytest.raises(UserError, match=message):
        grad(loss)(inputs["query"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensors on two devices")
def test_tensors_on_two_devices():
    inputs = inputs_of()
    inputs["key"] = inputs["key"].detach().cpu()
    with pytest.raises(ValueError, match="key must be on cuda:0 as the query, is on cpu"):
        local_attention(**inputs, **OPTIONS)


@pytest.mark.parametrize("name", ["key", "value", "global_key", "global_value"])
def test_every_tensor_must_match_the_query(name):
    inputs = inputs_of()
    with pytest.raises(ValueError, match=f"{name} must be on .* as the query, is on meta"):
        local_attention(**{**inputs, name: inputs[name].to("meta")}, **OPTIONS)
    with pytest.raises(ValueError, match=f"{name} must be torch.float32 as the query, is torch.float64"):
        local_attention(**{**inputs, name: inputs[name].double()}, **OPTIONS)
    with pytest.raises(ValueError, match=f"{name} must be \\(2, 1, .*, 8\\), got"):
        local_attention(**{**inputs, name: inputs[name][..., :4]}, **OPTIONS)
