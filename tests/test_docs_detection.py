"""docs/detection.md: its code runs on three tiny images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import ModelConfig
from vil.models.zoo import model_from_config

PAGE = Path(__file__).parents[1] / "docs" / "detection.md"


def test_the_recipe_trains_and_detects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name="vil_tiny", image_size=64, num_classes=3, blocks=(1, 1, 1, 1))
    state_dict = model_from_config(config).state_dict()
    transform = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2]}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, Weights("x", "run", "raw", state_dict, config, transform=transform))
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80), torch.rand(3, 70, 50)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5.0, 40.0, 35.0]]), "labels": torch.tensor([label])}
        for label in (1, 2, 1)
    ]
    names: dict[str, Any] = {
        "CHECKPOINT": path,
        "NUM_CLASSES": 2,
        "MIN_SIZE": 64,
        "batches": [(images, targets)],
    }
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, names)
    body = names["backbone"].body.model
    assert names["model"].transform.image_mean == (0.4, 0.5, 0.6)
    assert names["strides"] == [4, 8, 16, 32, 64]
    assert bool(names["loss"].isfinite())
    parameters = dict(body.named_parameters())
    assert not [name for name, parameter in parameters.items() if parameter.grad is None]
    changed = [name for name, parameter in parameters.items() if not torch.equal(parameter, state_dict[name])]
    assert len(changed) == len(parameters)  # a step from the weights of the checkpoint
    assert all(
        torch.allclose(parameter, state_dict[name], atol=1e-3) for name, parameter in parameters.items()
    )
    assert [set(detection) for detection in names["detections"]] == [{"boxes", "labels", "scores"}] * 3
