"""Runs whose image size and batch size change: learning rates, resume, ranks, compiled graphs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_files, tiny_run
from helpers.tiny_run import CPU, find_last, load_last, make_config
from torch import nn

from data import build_loaders
from vil.config import DataConfig, ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.multiscale_vit import MultiScaleViT

DIGITS = DataConfig(workers=0, images_per_class=30)
PLAN = [(0, 8, 150), (0.25, 8, 75), (0.5, 12, 50)]
"""Four epochs with 2, 4, 6 and 6 steps (300 digits)."""
STEPS = [2, 4, 6, 6]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(3 * 4 * 4, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def run(folder: Path, model: nn.Module | None = None, **options: Any) -> list[dict[str, Any]]:
    """Train on the digits, continuing the run in the folder, and return its records without timings."""
    options = {"data": DIGITS, "epochs": 4, "batch_size": 150, **options}
    config = make_config(folder, model=ModelConfig(image_size=8), **options)
    loaders = build_loaders(config, CPU, is_new=True)
    tiny_run.run(config, model or Classifier(), loaders, state=find_last(folder))
    return run_files.records(folder)


def test_epochs_and_evaluations_follow_the_batch_size(tmp_path: Path):
    records = run(tmp_path, progressive_resizing=PLAN)
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, sum(STEPS) + 1))
    assert [record["epoch"] for record in train] == [e + 1 for e, n in enumerate(STEPS) for _ in range(n)]
    evaluations = [(r["step"], r["epoch"]) for r in records if r["kind"] == "validation"]
    assert evaluations == [(2, 1), (6, 2), (12, 3), (18, 4)]
    assert train[-1]["lr"] == pytest.approx(1e-6)
    assert load_last(tmp_path)["epoch"] == 4


@pytest.mark.parametrize("stop", [6, 9])
def test_a_continued_run_is_bit_identical(tmp_path: Path, stop: int):
    options: dict[str, Any] = {
        "progressive_resizing": PLAN,
        "scale_lr_with_batch_size": True,
        "accumulation": 5,
    }
    full = run(tmp_path / "full", **options)
    run(tmp_path / "parts", max_steps=stop, **options)
    continued = run(tmp_path / "parts", **options)
    assert [r for r in continued if r["step"] > stop] == [r for r in full if r["step"] > stop]
    one, other = (load_last(tmp_path / name)["model"] for name in ("full", "parts"))
    assert run_files.is_equal(one, other)


@pytest.mark.parametrize(("scaling", "power"), [("linear", 1), ("sqrt", 0.5)])
def test_the_learning_rate_follows_the_batch_if_asked(tmp_path: Path, scaling: str, power: float):
    options: dict[str, Any] = {"scheduler": "constant", "warmup_epochs": 0, "lr": 1.0, "lr_scaling": scaling}
    records = run(tmp_path, progressive_resizing=PLAN, scale_lr_with_batch_size=True, max_steps=8, **options)
    rates = [record["lr"] for record in records if record["kind"] == "train"]
    assert rates == pytest.approx([1.0] * 2 + [2**-power] * 4 + [3**-power] * 2)


def test_a_rate_that_follows_nothing_is_refused(tmp_path: Path):
    with pytest.raises(UserError) as refused:
        run(tmp_path, scale_lr_with_batch_size=True)
    reason = "needs different batch sizes in schedule.progressive_resizing"
    assert str(refused.value) == f"schedule.scale_lr_with_batch_size: {reason}"


def test_other_batch_sizes_in_finished_epochs_are_refused(tmp_path: Path):
    run(tmp_path, progressive_resizing=PLAN, max_steps=9)
    with pytest.raises(UserError) as refused:
        run(tmp_path, progressive_resizing=[PLAN[0], (0.5, 12, 50)])
    assert str(refused.value) == (
        f"schedule.progressive_resizing: the run in {tmp_path} finished 3 steps of epoch 3, which would now "
        "be 5 steps of epoch 3; keep the batch sizes of finished epochs"
    )
    later = run(tmp_path, progressive_resizing=[*PLAN[:2], (0.5, 8, 50), (0.75, 12, 100)])
    assert later[-1]["step"] == 2 + 4 + 6 + 3


STAGE = StageConfig(dim=8, heads=2, patch=2, window=2)


@pytest.mark.parametrize(
    "options",
    [{"progressive_resizing": [(0, 8, 100), (0.5, 12, 50)]}, {"random_sizes": [8, 12]}],
    ids=["progressive", "random"],
)
def test_each_size_is_compiled_once(tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    shapes = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        shapes.append(next(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4))
        return graph.forward

    torch.compiler.reset()
    compile_network = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, **_: compile_network(network, backend=count, dynamic=False)
    )
    monkeypatch.setattr("vil.training.model_updater.check_compiler", lambda *_: None)
    torch.manual_seed(0)
    model = MultiScaleViT(ModelConfig("vil", 8, 10, stages=[STAGE]))
    options = {"epochs": 2, "batch_size": 100, **options}
    run(tmp_path, model, compile=True, **options)
    torch.compiler.reset()
    second = (50, 3, 12, 12) if "progressive_resizing" in options else (100, 3, 12, 12)
    assert sorted(shapes) == sorted([(100, 3, 8, 8), second])
