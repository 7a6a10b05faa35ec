"""torch.compile on fake CUDA tensors: one graph without a break, with the kernels' operator in it.

Nothing is computed, so no GPU is needed.
"""

import os
import re

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.fake_gpu import fake_gpu, move_to_fake_gpu
from torch._dynamo.backends.common import aot_autograd

import vil
from vil.attention import ATTENTIONS
from vil.config import ModelConfig, StageConfig
from vil.models import MultiScaleViT


def trace(model, dtype, monkeypatch):
    """Compile a forward pass of a 64 × 64 image; return the operators of all graphs, and how many graphs."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with fake_gpu(monkeypatch):
        move_to_fake_gpu(model)
        images = torch.empty(2, 3, 64, 64, device="cuda")
        compiled = torch.compile(model, backend=keep, fullgraph=True)  # raises where the graph would break
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = compiled(images)
    assert logits.device.type == "cuda"
    assert logits.dtype == dtype
    modules = [m for graph in graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for module in modules for node in module.graph.nodes]
    return [node.target for node in nodes if node.op == "call_function"], len(graphs)


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("vil_tiny", {"blocks": (1, 2, 1, 1)}, torch.bfloat16),
        ("vil_tiny", {"blocks": (1, 1, 1, 1), "neighbors": "random", "drop_path": 0.1}, torch.float32),
        ("vil_tiny", {"blocks": (1, 1, 1, 1), "position": "absolute", "mask": "exact"}, torch.float16),
        ("vil_tiny_3stage", {"blocks": (1, 1, 1), "pool": "cls"}, torch.bfloat16),
    ],
)
def test_one_graph_with_the_fused_operator(name, options, dtype, monkeypatch):
    model = vil.create_model(name, image_size=64, **options).train()
    local = sum(stage.config.attention == "vision_longformer" for stage in model.stages for _ in stage.blocks)
    operators, graphs = trace(model, dtype, monkeypatch)
    assert graphs == 1
    assert operators.count(torch.ops.vil.fused_attention.default) == local
    assert not any("autograd_function" in str(operator) for operator in operators)  # compilers see operators


def test_one_graph_with_gradient_checkpointing(monkeypatch):
    model = vil.create_model("vil_tiny", image_size=64, blocks=(1, 1, 1, 1)).train()
    model.set_grad_checkpointing(True)
    operators, graphs = trace(model, torch.bfloat16, monkeypatch)
    assert graphs == 1
    assert operators.count(torch.ops.vil.fused_attention.default) == 2


def test_biases_of_full_attention_have_four_dimensions_unless_exported(monkeypatch):
    """With three, for exporters, PyTorch uses plain operators instead of its fused attention kernels."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, bias=None, dropout=0.0):
        seen.append(None if bias is None else bias.dim())
        return attend(query, key, value, bias, dropout)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    model = vil.create_model("vil_tiny", image_size=64, blocks=(1, 1, 1, 1)).train()
    trace(model, torch.bfloat16, monkeypatch)
    assert set(seen) == {4}
    seen.clear()
    model = vil.create_model("vil_tiny", image_size=64, blocks=(1, 1, 1, 1))
    torch.export.export(model.eval(), (torch.zeros(1, 3, 64, 64),))
    assert set(seen) == {3}


@pytest.mark.parametrize("attention", sorted(ATTENTIONS))
def test_no_scatter_in_compiled_graphs(attention):
    """Inductor would compute it with atomic additions, in another order in every run."""
    options = {"neighbors": "random"} if attention == "vision_longformer" else {}
    model = vil.create_model("vil_tiny", image_size=64, blocks=(1, 1, 1, 1), attention=attention, **options)
    operators = set()

    def record(graph, _):
        operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    compiled = torch.compile(model.train(), backend=aot_autograd(fw_compiler=record), fullgraph=True)
    compiled(torch.zeros(2, 3, 64, 64)).sum().backward()
    assert [name for name in operators if "backward" in name]
    assert not [name for name in operators if re.search(r"scatter|index_(put|add)|unfold_backward", name)]


SLOW = pytest.mark.skipif(
    "VIL_SLOW_TESTS" not in os.environ, reason="minutes of compiling: make lowest runs it"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiled_training_step_equals_eager(backend):
    """Forward, backward and optimizer in float32 on the CPU."""
    stages = [
        StageConfig(attention="vision_longformer", dim=16, blocks=1, heads=2, patch=4, window=3),
        StageConfig(attention="full", dim=32, blocks=1, heads=2, patch=2, global_tokens=0),
    ]
    config = ModelConfig(name="vil", stages=stages, num_classes=4, image_size=32)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    steps = []
    torch.compiler.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = MultiScaleViT(config).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        network = torch.compile(model, backend=backend, fullgraph=True, dynamic=False) if compiled else model
        torch.nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()
        steps.append(model.state_dict())
    torch.manual_seed(0)
    initial = MultiScaleViT(config).state_dict()
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(steps[0][name], value) for name, value in initial.items())
