"""Test-time augmentation: means of logits over views, and their cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vil.config import EvalConfig, ModelConfig
from vil.evaluation.accuracy import EvaluationDataset, EvaluationOptions, evaluate
from vil.evaluation.report import evaluate_model, table
from vil.evaluation.tta import build_tta_model, count_views, describe_tta
from vil.runtime.distributed import Process

CPU = torch.device("cpu")
PROCESS = Process(0, 0, 1, CPU)


class Mirrored(nn.Module):
    """A model that does not change if its images are mirrored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 4 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + x.flip(-1)).flatten(1))


def batch(crops: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(20, 3, 4, 4, generator=generator)
    return image.repeat(1, crops, 1, 1), torch.arange(20) % 7


@pytest.mark.parametrize("tta", ["hflip", "five_crop", "ten_crop"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_views_without_a_difference_change_nothing(tta: str, precision: str) -> None:
    config = EvalConfig(tta=tta, tta_scales=[1.0, 1.1, 1.2])
    crops = 3 * (1 if tta == "hflip" else 5)
    model, options = Mirrored(), EvaluationOptions(CPU, precision)
    whole, views = (EvaluationDataset("x", [batch(count)], "abcdefg") for count in (1, crops))
    augmented = evaluate(build_tta_model(model, config), views, options)
    assert augmented == evaluate(model, whole, options)


def test_logits_are_the_mean_over_crops_and_mirror_images() -> None:
    torch.manual_seed(0)
    model, crops = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), torch.randn(2, 15, 4, 4)
    for tta in ("five_crop", "ten_crop"):
        views = list(crops.chunk(5, dim=1))
        views += [view.flip(-1) for view in views] if tta == "ten_crop" else []
        expected = torch.stack([model(view) for view in views]).double().mean(dim=0)
        found = build_tta_model(model, EvalConfig(tta=tta))(crops)
        torch.testing.assert_close(found, expected)
        assert found.dtype == torch.float64


def test_views_are_counted_and_named() -> None:
    assert build_tta_model(model := nn.Identity(), EvalConfig()) is model
    for options, views, name in (
        ({}, 1, None),
        ({"tta": "hflip"}, 2, "hflip"),
        ({"tta": "ten_crop", "tta_scales": [1.0, 1.25]}, 20, "ten_crop, scales 1 1.25"),
        ({"tta_scales": [1.1]}, 1, "scales 1.1"),
    ):
        config = EvalConfig(**options)
        assert (count_views(config), describe_tta(config)) == (views, name)


def test_the_cost_of_an_image_is_that_of_its_views() -> None:
    model = ModelConfig(name="tiny", image_size=4)
    plain, augmented = (
        evaluate_model(Mirrored(), [EvaluationDataset("x", [batch()])], config, PROCESS)[0]
        for config in (EvalConfig(model=model), EvalConfig(model=model, tta="hflip"))
    )
    assert (plain["images"], plain["views"], plain["tta"]) == (20, None, None)
    assert (augmented["images"], augmented["views"], augmented["tta"]) == (20, 2, "hflip")
    assert augmented["flops"] == 2 * plain["flops"] == 2 * 48 * 7
    assert augmented["loss"] == plain["loss"]
    text = table([augmented])
    assert "FLOPs: multiply-adds of one image with all of its views." in text
    assert "TTA" in text.splitlines()[0]
    assert "TTA" not in table([plain])


def test_compiled_and_channels_last_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results, by other means; the last batch is smaller."""
    compiled, orders = [], []
    compile_model = torch.compile

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 8, 2), nn.Linear(8, 7)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                orders.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.head(self.conv(x).mean((2, 3)))

    def fake_compile(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return compile_model(model, backend="eager")

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr("vil.evaluation.report.check_compiler", lambda *_: None)
    images, targets = batch()
    config = EvalConfig(model=ModelConfig(name="tiny", image_size=4), tta="hflip")
    results = []
    for options in ({}, {"compile": True}, {"channels_last": True}):
        orders.clear()
        loader = [(images[:12], targets[:12]), (images[12:], targets[12:])]
        if options.get("channels_last"):
            loader = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in loader]
        model = Convolution()
        changed = EvalConfig(**{**vars(config), **options})
        (found,) = evaluate_model(model, [EvaluationDataset("x", loader)], changed, PROCESS)
        results.append(found)
        assert compiled == ([model] if options.get("compile") else [])
        compiled.clear()
        assert all(orders[:4]) == ("channels_last" in options)
        is_last = model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert is_last == ("channels_last" in options)
    for found in results[1:]:
        assert found["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        assert found["flops"] == results[0]["flops"]
