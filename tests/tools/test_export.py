"""tools/export.py: what it writes, loaded by whom it is written for, computes what the model does."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import nn

import vil  # registers the models with timm
from tools import export as program
from vil import weight_files
from vil.config import ConfigError, ModelConfig, StageConfig
from vil.models.released import open_model
from vil.models.zoo import model_from_config
from vil.weight_files import WeightsFile, write_safetensors

STAGES = [
    StageConfig(dim=8, heads=2, patch=4, window=3, global_tokens=2),
    StageConfig(dim=16, heads=2, attention="full", global_tokens=1),
]
PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
VIL = ModelConfig(name="vil", image_size=32, num_classes=5, stages=STAGES, in_chans=1, mask="cyclic",
                  pool="cls", share_global_projection=False, norm_embed=False, drop_path=0.1)  # fmt: skip
ZOO = ModelConfig(name="vil_tiny_3stage", image_size=64, num_classes=5, blocks=(1, 1, 1), pool="cls",
                  attention=["linformer", "spatial_reduction", "performer"], projected_tokens=9, reduction=2,
                  random_features=8, share_key_value_projection=False)  # fmt: skip
TIMM = ModelConfig(name="timm/vit_tiny_patch16_224", image_size=32, num_classes=5, timm_options={"depth": 1})
CONFIGS = {"vil": VIL, "zoo": ZOO, "timm": TIMM}
TRANSFORM = {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Safetensors of a small model with weights, transform and classes that nothing else has."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    weights = {
        name: value + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
        for name, value in model_from_config(config).state_dict().items()
    }
    transform = {**TRANSFORM, **({"mean": [0.1] * 3, "std": [0.4] * 3} if config.in_chans == 1 else {})}
    write_safetensors(
        tmp_path / "x.safetensors", WeightsFile("x", "run", "ema", weights, config, transform, NAMES)
    )
    return tmp_path / "x.safetensors"


def images(model: nn.Module, count: int) -> torch.Tensor:
    size = getattr(model, "img_size", (32, 32))
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, getattr(model, "in_chans", 3), *size, generator=generator)


def test_torch(checkpoint: Path, tmp_path: Path) -> None:
    program.export([str(checkpoint), str(tmp_path / "x.pt2"), "--format", "torch"])
    model, loaded = open_model(checkpoint)[0], torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 3, 8):
        with torch.no_grad():
            x = images(model, count)
            torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=0)


def test_onnx(checkpoint: Path, tmp_path: Path) -> None:
    program.export([str(checkpoint), str(tmp_path / "x.onnx"), "--format", "onnx"])
    model, session = open_model(checkpoint)[0], onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for count in (1, 3, 8):
        x = images(model, count)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.safetensors"]


def test_folder_of_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    program.export([str(checkpoint), str(tmp_path / "hub"), "--format", "hf"])
    model = open_model(checkpoint)[0]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(model, 2)), model(images(model, 2)))
    data = timm.data.resolve_model_data_config(loaded)
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
    assert data["input_size"] == tuple(images(model, 1).shape[1:])
    assert max(data["std"]) == pytest.approx(0.6 if data["input_size"][0] == 3 else 0.4)
    content = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert content["label_names"] == list(NAMES)
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors"]
    timm.models.save_for_hf(loaded, str(tmp_path / "again"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images(model, 2)), model(images(model, 2)))


def test_a_model_of_ours_is_saved_by_timm_itself(tmp_path: Path) -> None:
    model = vil.create_model(
        "vil_tiny", image_size=64, num_classes=3, window=5, mask="exact", blocks=(1, 1, 1, 1)
    )
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(model, 1)), model.eval()(images(model, 1)))
    assert (loaded.stages[0].blocks[0].attn.mask, loaded.stages[0].blocks[0].attn.window) == ("exact", 5)


def test_safetensors_and_a_published_checkpoint(tmp_path: Path) -> None:
    case = PARITY / "performer_partial"
    words = [str(case / "model_best.pth"), "--released-config", str(case / "config.yaml")]
    program.export([*words, str(tmp_path / "x.safetensors"), "--format", "safetensors"])
    file = weight_files.read(tmp_path / "x.safetensors")
    assert (file.model.name, file.kind) == ("vil", "raw")
    assert file.data["interpolation"] == "bicubic"


@pytest.mark.parametrize("checkpoint", ["timm"], indirect=True)
def test_an_export_that_differs_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "TOLERANCE", -1.0)
    with pytest.raises(ConfigError, match="differs from the model"):
        program.export([str(checkpoint), str(tmp_path / "x.pt2"), "--format", "torch"])
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_a_model_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    class Unexportable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum()) if x.sum() > 0 else x

    file = WeightsFile("x.safetensors", "converted", "raw", {}, VIL)
    monkeypatch.setattr(program, "open_model", lambda **words: (Unexportable().eval(), file))
    with pytest.raises(ConfigError, match=r"x\.safetensors: the model cannot be exported: ") as error:
        program.export(["x.safetensors", str(tmp_path / "out"), "--format", form])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
