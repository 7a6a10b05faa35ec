"""Counted bytes against counts by hand; speed and measured peaks with a fake clock and a fake GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vil.config import EvalConfig, ModelConfig
from vil.evaluation import cost
from vil.evaluation.cost import (
    Memory,
    images_per_second,
    measure_cost,
    measure_memory,
    peak_bytes,
    saved_bytes,
)

CPU = torch.device("cpu")
FLOAT = 4  # bytes


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def memory(model: nn.Module, image_size: int, in_chans: int, precision: str = "float32") -> Memory:
    return measure_memory(
        model, image_size, in_chans, device=CPU, train_precision=precision, eval_precision=precision
    )


def test_saved_are_inputs_and_both_sides_of_gelu() -> None:
    model, x = perceptron(), torch.zeros(5, 8)
    assert saved_bytes(lambda: model(x), model.parameters()) == 5 * (8 + 16 + 16) * FLOAT


def test_parameters_count_unless_they_are_constant() -> None:
    model, x = nn.Linear(8, 4), torch.zeros(5, 8, requires_grad=True)
    assert saved_bytes(lambda: model(x), model.parameters()) == 5 * 8 * FLOAT
    assert saved_bytes(lambda: model(x)) == (5 * 8 + 8 * 4) * FLOAT


def test_a_storage_counts_once_and_in_full() -> None:
    weight = torch.ones(6, 2, requires_grad=True)
    base = torch.ones(10, 6)
    assert saved_bytes(lambda: base @ weight + base[:1] @ weight, [weight]) == 60 * FLOAT
    assert saved_bytes(lambda: base[:2] @ weight, [weight]) == 60 * FLOAT


def test_a_saved_output_counts_until_its_graph_is_freed() -> None:
    x = torch.zeros(7, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 7 * FLOAT
    assert saved_bytes(lambda: (x.exp(), x * 2)[1]) == 0  # the graph of exp is gone


def test_gradients_are_correct_while_counting() -> None:
    x = torch.ones(3, requires_grad=True)
    kept = []
    saved_bytes(lambda: kept.append((x.exp() * x).sum()) or kept[0])
    kept[0].backward()
    assert torch.allclose(x.grad, 2 * torch.ones(3).exp())


def test_gradient_checkpointing_saves_only_the_input() -> None:
    model, x = perceptron(), torch.zeros(5, 8, requires_grad=True)
    kept = saved_bytes(lambda: checkpoint(model, x, use_reentrant=False), model.parameters())
    assert kept == 5 * 8 * FLOAT


def test_a_result_without_a_graph_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"^the result of the function does not require a gradient$"):
        saved_bytes(lambda: torch.zeros(3) + 1)


@torch.no_grad()
def test_peak_counts_tensors_alive_at_the_same_time() -> None:
    model = perceptron()
    run = lambda: model(torch.zeros(5, 8))  # noqa: E731
    # The input lives to the end; at the peak also both sides of GELU.
    assert peak_bytes(run, model.parameters()) == 5 * (8 + 16 + 16) * FLOAT


@torch.no_grad()
def test_views_and_in_place_operations_add_no_bytes() -> None:
    assert peak_bytes(lambda: torch.zeros(4, 6).view(24).t().add_(1)[:3]) == 24 * FLOAT


@torch.no_grad()
def test_tensors_computed_from_constants_do_not_count() -> None:
    weight = torch.ones(100, 6)
    run = lambda: torch.zeros(2, 6, dtype=torch.float64) @ weight.double().t()  # noqa: E731
    assert peak_bytes(run, [weight]) == (2 * 6 + 2 * 100) * 8


def test_memory_per_image() -> None:
    model = nn.Sequential(nn.Flatten(), *perceptron())
    found = memory(model, 2, 2)
    # Training also keeps the logarithms of the softmax, (4,), the target, int64, and a total weight that is
    # one number for the batch.
    assert found.train == (8 + 16 + 16 + 4) * FLOAT + 8
    assert found.eval == (8 + 16 + 16) * FLOAT
    assert found.kind == "counted bytes"


def test_cost_is_in_megabytes_and_multiply_adds_of_one_image() -> None:
    model = nn.Sequential(nn.Flatten(), *perceptron())
    config = EvalConfig(model=ModelConfig(image_size=2, in_chans=2), batch_size=3)
    found = measure_cost(model, config, CPU)
    assert (found.params, found.flops) == (8 * 16 + 16 + 16 * 4 + 4, 8 * 16 + 16 * 4)
    assert found.train_memory_mb == ((8 + 16 + 16 + 4) * FLOAT + 8) / 1e6
    assert found.eval_memory_mb == (8 + 16 + 16) * FLOAT / 1e6
    assert found.images_per_second is not None
    assert (found.memory, found.train_precision) == ("counted bytes", "float32")


def test_mixed_precision_saves_less() -> None:
    model = nn.Sequential(nn.Flatten(), *perceptron())
    assert memory(model, 2, 2, "bfloat16").train < memory(model, 2, 2).train


def test_memory_is_reproducible_and_leaves_the_model_unchanged() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert memory(model, 8, 1) == memory(model, 8, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_images_per_second_is_the_median_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # The batches take 9 (warm-up), then 2, 1, 4 seconds.
    ticks = iter([0, 9, 10, 12, 20, 21, 30, 34])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    shapes = []

    class Spy(nn.Flatten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shapes.append((tuple(x.shape), self.training))
            return super().forward(x)

    speed = images_per_second(Spy(), 4, 3, device=CPU, precision="float32", batch_size=6, seconds=5)
    assert speed == 6 / 2
    assert shapes == [((6, 3, 4, 4), False)] * 4


def test_measured_peak_halves_the_batch_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU of 40 bytes: 10 are allocated before a step, and each image needs 3.
    before, per_image, room = 10, 3, 40
    steps = []

    def step(batch: int) -> None:
        steps.append(batch)
        if before + per_image * batch > room:
            raise torch.OutOfMemoryError

    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: before)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: before + per_image * steps[-1])
    assert cost._measure_peak(step, 32, CPU) == per_image
    assert steps == [32, 16, 8, 8]
    assert cost._measure_peak(lambda _: step(100), 4, CPU) is None


class LimitedMemory(nn.Flatten):
    """Runs out of memory with more than `most` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError
        return super().forward(x)


def test_speed_halves_the_batch_until_it_fits() -> None:
    options = {"device": CPU, "precision": "float32", "batch_size": 24, "seconds": 0}
    model = LimitedMemory(most=7).train()
    assert images_per_second(model, 4, 3, **options) > 0
    assert model.seen == [24, 12, 6, 6, 6, 6]
    assert images_per_second(LimitedMemory(most=0), 4, 3, **options) is None
    assert model.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_peak_on_a_gpu_is_near_the_counted_bytes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32 * 64 * 64, 10)
    )
    options = {"train_precision": "float32", "eval_precision": "float32", "batch_size": 64}
    counted = measure_memory(model, 64, 3, device=CPU, **options)
    device = torch.device("cuda")
    measured = measure_memory(model.to(device), 64, 3, device=device, **options)
    assert measured.kind == "measured peak"
    assert counted.train <= measured.train < 4 * counted.train
    assert 0.9 * counted.eval <= measured.eval < 4 * counted.eval


def test_softmax_attention_grows_with_the_square_of_the_tokens() -> None:
    def kept(tokens: int) -> int:
        x = torch.zeros(1, tokens, 4, requires_grad=True)
        return saved_bytes(lambda: F.softmax(x @ x.transpose(1, 2), dim=-1) @ x)

    linear = 3 * 4 * FLOAT  # bounds of what grows with the tokens alone
    for tokens in (16, 32, 64):
        assert tokens**2 * FLOAT <= kept(tokens) <= tokens**2 * FLOAT + linear * tokens
