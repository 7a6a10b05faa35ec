"""Parameters and FLOPs: by hand for small modules, and as published for well-known models."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vil.evaluation.complexity import measure_complexity, multiply_adds


class Attention(nn.Module):
    """One head of attention over the pixels of an image, without projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, None]  # (B, 1, N, C)
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


def test_convolution_and_linear_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(8 * 16, 10))
    found = measure_complexity(model, 8, 3)  # a map of 4 × 4
    assert found.params == 8 * 27 + 8 + 1280 + 10
    assert found.flops == 16 * 8 * 27 + 1280


def test_scaled_dot_product_attention_by_hand() -> None:
    assert multiply_adds(Attention(), 6, 4) == 2 * 36 * 36 * 4


def test_shared_parameters_count_once_and_buffers_do_not() -> None:
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 5), first, second, nn.BatchNorm1d(5))
    found = measure_complexity(model, 1, 3)
    assert found.params == 20 + 25 + 10
    assert found.flops == 15 + 25 + 25


@pytest.mark.parametrize(
    ("name", "params", "flops"),
    [
        ("deit_tiny_patch16_224", 5.717416e6, 1.2537e9),
        ("resnet18", 11.689512e6, 1.8141e9),
        ("cait_xxs24_224", 11.956264e6, 2.523e9),
        ("pit_ti_224", 4.8479e6, 0.699e9),
    ],
)
def test_known_models(name: str, params: float, flops: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = measure_complexity(model, 224, 3)
    assert found.params == pytest.approx(params, rel=1e-3)
    assert found.flops == pytest.approx(flops, rel=3e-3)


def test_views_of_parameters_that_require_gradients() -> None:
    """PyTorch's counter fails on them, as in CaiT and PiT."""

    class Expanding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 3)), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.token.expand(len(x), -1, -1))

    model = Expanding()
    assert multiply_adds(model, 4, 3) == 15
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_formula_of_the_model_replaces_counting() -> None:
    class WithFormula(nn.Linear):
        def multiply_adds(self, image_size: tuple[int, int]) -> int:
            height, width = image_size
            return height * width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the formula needs no forward pass")

    assert multiply_adds(WithFormula(2, 2), 7, 3) == 49


def test_the_model_is_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    measure_complexity(model, 4, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
