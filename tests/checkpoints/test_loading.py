"""Models by name or by file: the model, its transform and its class names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vil
from data.transforms import evaluation_transform
from vil.checkpoints.loading import load
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import DataConfig, ModelConfig, StageConfig, UserError
from vil.models.zoo import model_from_config

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1_0" / "run"
STAGES = [StageConfig(dim=8, heads=2, patch=8, window=2)]
TRANSFORM = {"crop_pct": 0.8, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def write_model(path: Path, in_chans: int = 3, transform: dict | None = None) -> ModelConfig:
    config = ModelConfig(name="vil", image_size=32, num_classes=3, stages=STAGES, in_chans=in_chans)
    state_dict = model_from_config(config).state_dict()
    names = ("a", "b", "c")
    weights = Weights("x", "run", "raw", state_dict, config, transform=transform or {}, class_names=names)
    write_safetensors(path, weights)
    return config


def random_image(mode: str, size: tuple[int, int]) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0]) if channels == 1 else (size[1], size[0], channels)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("transform", [TRANSFORM, {}], ids=["stored", "default"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("size", [(40, 60), (301, 57), (20, 20)])
def test_the_transform_is_bit_identical_to_evaluation(
    tmp_path: Path, in_chans: int, transform: dict, mode: str, size: tuple[int, int]
) -> None:
    write_model(tmp_path / "x.safetensors", in_chans, transform)
    loaded = load(tmp_path / "x.safetensors")
    image = random_image(mode, size)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in transform.items()}
    expected = evaluation_transform(DataConfig(**values), image_size=32, in_chans=in_chans)(image)
    found = loaded.transform(image)
    assert (found.shape, found.dtype) == ((in_chans, 32, 32), torch.float32)
    assert torch.equal(found, expected)


def test_a_run_is_loaded_for_inference() -> None:
    model, transform, class_names = vil.load(RUN)
    assert not model.training
    assert class_names == tuple("0123456789")
    image = transform(random_image("L", (8, 8)))
    with torch.inference_mode():
        assert model(image[None]).shape == (1, 10)


def test_a_stored_transform_is_validated(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors", transform={"crop_pct": 0.0})
    with pytest.raises(UserError) as caught:
        load(tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors"
    assert str(caught.value) == f"{path}: data.crop_pct: expected a number from 0.01 to 1, got 0.0"


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_arguments_override_the_options_of_the_checkpoint(tmp_path: Path, drop_path: float) -> None:
    config = ModelConfig(name="vil_tiny", image_size=64, num_classes=3, blocks=(1, 1, 1, 1), drop_path=0.2)
    state_dict = model_from_config(config).state_dict()
    write_safetensors(tmp_path / "x.safetensors", Weights("x", "run", "raw", state_dict, config))
    model = vil.create_model("vil_tiny", checkpoint=tmp_path / "x.safetensors", drop_path=drop_path)
    block = model.stages[3].blocks[0]
    assert getattr(block.drop_path1, "drop_prob", 0.0) == drop_path
    assert all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())
