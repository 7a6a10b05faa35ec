"""tools/export.py: exported models, loaded by their target, compute the same logits."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from helpers import forked
from PIL import Image
from torch import nn

import vil  # registers the models with timm
from tools.programs import export as program
from vil.checkpoints.open import open_weights
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config

STAGES = [
    StageConfig(dim=8, heads=2, patch=4, window=3, global_tokens=2),
    StageConfig(dim=16, heads=2, attention="full", global_tokens=1),
]
ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "fixtures" / "parity"
VIL = ModelConfig(name="vil", image_size=(32, 48), num_classes=5, stages=STAGES, in_chans=1, mask="cyclic",
                  pool="cls", share_global_projection=False, norm_embed=False, drop_path=0.1)  # fmt: skip
ZOO = ModelConfig(name="vil_tiny_3stage", image_size=64, num_classes=5, blocks=(1, 1, 1), pool="cls",
                  distillation_token=True,
                  attention=["linformer", "spatial_reduction", "performer"], projected_tokens=9, reduction=2,
                  random_features=8, share_key_value_projection=False)  # fmt: skip
TIMM = ModelConfig(name="timm/vit_tiny_patch16_224", image_size=32, num_classes=5, timm_options={"depth": 1})
CONFIGS = {"vil": VIL, "zoo": ZOO, "timm": TIMM}
TRANSFORM = {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Write safetensors of a small model with unique weights, transform and class names."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    weights = {
        name: value + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
        for name, value in model_from_config(config).state_dict().items()
    }
    transform = {**TRANSFORM, **({"mean": [0.1] * 3, "std": [0.4] * 3} if config.in_chans == 1 else {})}
    write_safetensors(
        tmp_path / "x.safetensors",
        Weights("x", "run", "ema", weights, config, transform=transform, class_names=NAMES),
    )
    return tmp_path / "x.safetensors"


def images(model: nn.Module, count: int) -> torch.Tensor:
    size = getattr(model, "img_size", (32, 32))
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, getattr(model, "in_chans", 3), *size, generator=generator)


def test_torch_export_computes_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    program.main([str(checkpoint), str(tmp_path / "x.pt2"), "--format", "torch"])
    model, loaded = open_weights(checkpoint).build_model(), torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 3, 8):
        with torch.no_grad():
            x = images(model, count)
            torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["vil", "zoo"], indirect=True)
def test_onnx_export_computes_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    program.main([str(checkpoint), str(tmp_path / "x.onnx"), "--format", "onnx"])
    model, session = open_weights(checkpoint).build_model(), onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for count in (1, 3, 8):
        x = images(model, count)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=0)
    metadata = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in metadata.items()} == {
        "class_names": list(NAMES), "image_size": list(images(model, 1).shape[2:]), "crop_pct": 0.9,
        "crop_mode": "center",
        "interpolation": "bilinear", "mean": list(model.pretrained_cfg["mean"]),
        "std": list(model.pretrained_cfg["std"]),
    }  # fmt: skip
    assert str(ROOT).encode() not in (tmp_path / "x.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.onnx", "x.safetensors"]


def test_hub_folder_is_loaded_by_timm(checkpoint: Path, tmp_path: Path) -> None:
    program.main([str(checkpoint), str(tmp_path / "hub"), "--format", "hf"])
    model = open_weights(checkpoint).build_model()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(model, 2)), model(images(model, 2)))
    data = timm.data.resolve_model_data_config(loaded)
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
    assert data["input_size"] == tuple(images(model, 1).shape[1:])
    assert max(data["std"]) == pytest.approx(0.6 if data["input_size"][0] == 3 else 0.4)
    content = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert content["label_names"] == list(NAMES)
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == names
    assert loaded.pretrained_cfg["label_names"] == list(NAMES)
    timm.models.save_for_hf(loaded, str(tmp_path / "again"), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images(model, 2)), model(images(model, 2)))


RUN = ROOT / "tests" / "fixtures" / "version_0_1_0" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run's folder with a private path as data root, and a summary."""
    folder = tmp_path / "home" / "run"
    shutil.copytree(RUN, folder)
    state = torch.load(folder / "checkpoints" / "best.pt", weights_only=True)
    state["config"]["data"] |= {"source": "folder", "root": "/home/someone/my_photos/"}
    torch.save(state, folder / "checkpoints" / "best.pt")
    (folder / "checkpoints" / "best.pt.sha256").unlink(missing_ok=True)
    (folder / "summary.json").write_text(json.dumps([{"top1": 43.25, "images": 1234}]))
    return folder


def test_a_model_card_says_what_the_model_is_and_no_path(run: Path, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        program.main([str(run), str(tmp_path / "my_model"), "--format", "hf"])
    finally:
        os.umask(mask)
    card = (tmp_path / "my_model" / "README.md").read_text()
    model = vil.load(run).model
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    for line in (
        "# my\\_model",
        "| architecture | vil |",
        "| data | my\\_photos (folder) |",
        "| recipe | 2 epochs, batch size 64, adamw, learning rate 0.005, weight decay 0.05 |",
        "| Top-1 | 43.25 % of 1,234 validation images |",
        f"| parameters | {parameters:.2f} M |",
        f"| FLOPs | {model.multiply_adds((32, 32)) / 1e9:.3f} G multiply-adds per image |",
        "| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
    ):
        assert f"\n{line}\n" in card
    for file in (tmp_path / "my_model").iterdir():
        assert not [path for path in (b"someone", bytes(tmp_path), bytes(ROOT)) if path in file.read_bytes()]
        assert file.stat().st_mode & 0o777 == 0o644


def run_code_of_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what the Python code of the model card prints, beside the exported folder and a photo."""
    Image.new("RGB", (40, 60), (200, 10, 10)).save(folder.parent / "photo.jpg")
    monkeypatch.chdir(folder.parent)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    return printed.getvalue()


def test_the_code_of_a_model_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program.main([str(run), str(tmp_path / "FOLDER"), "--format", "hf"])
    printed = run_code_of_card(tmp_path / "FOLDER", monkeypatch)
    ((expected, _),) = vil.load(run).predict(tmp_path / "photo.jpg", top=1)[0]
    assert printed == f"{expected}\n"


@pytest.mark.parametrize("summary", ["{}", '[{"top1": 1, "images": 1e999}]'])
def test_a_damaged_summary_is_named(run: Path, tmp_path: Path, summary: str) -> None:
    (run / "summary.json").write_text(summary)
    with pytest.raises(UserError) as caught:
        program.main([str(run), str(tmp_path / "x"), "--format", "hf"])
    assert str(caught.value) == f"{run / 'summary.json'}: not a result of train.py"
    (run / "config.yaml").write_text("schedule: {epochs: none}")
    with pytest.raises(UserError) as caught:
        program.main([str(run), str(tmp_path / "x"), "--format", "hf"])
    assert (
        str(caught.value)
        == f"{run / 'config.yaml'}: schedule.epochs: expected an integer of at least 1, got 'none'"
    )


def test_timm_saves_and_loads_models_of_this_project(tmp_path: Path) -> None:
    model = vil.create_model(
        "vil_tiny", image_size=64, num_classes=3, window=5, mask="exact", blocks=(1, 1, 1, 1)
    )
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(model, 1)), model.eval()(images(model, 1)))
    assert (loaded.stages[0].blocks[0].attn.mask, loaded.stages[0].blocks[0].attn.window) == ("exact", 5)


def test_safetensors_of_a_published_checkpoint_from_another_folder(tmp_path: Path) -> None:
    """The logits of the converted file are those of the checkpoint, to the bit."""
    case = PARITY / "linformer_shared_kv"
    published = [case / "model_best.pth", "--released-config", case / "config.yaml"]
    argv = [
        forked.python(),
        ROOT / "tools" / "export.py",
        *published,
        "x.safetensors",
        "--format",
        "safetensors",
    ]
    ended = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "x.safetensors: safetensors, raw weights\n"
    file = open_weights(tmp_path / "x.safetensors")
    assert (file.model.name, file.kind, file.transform["interpolation"]) == ("vil", "raw", "bicubic")
    exported = vil.create_model(None, checkpoint=tmp_path / "x.safetensors").eval()
    model, x = vil.load_released(case / "config.yaml", case / "model_best.pth"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(exported(x), model(x))


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^none: no such file or folder$"):
        program.main(["none", str(tmp_path / "x"), "--format", "safetensors"])


@pytest.mark.parametrize("checkpoint", ["timm"], indirect=True)
def test_differing_export_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differs from the model"):
        program.main([str(checkpoint), str(tmp_path / "x.pt2"), "--format", "torch"])
    assert not (tmp_path / "x.pt2").exists()


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_export_errors_have_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    class Unexportable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum()) if x.sum() > 0 else x

    weights = Weights("x.safetensors", "safetensors", "raw", {}, VIL)
    monkeypatch.setattr(Weights, "build_model", lambda self: Unexportable().eval())
    monkeypatch.setattr(program, "open_weights", lambda *arguments: weights)
    with pytest.raises(UserError, match=r"x\.safetensors: the model cannot be exported: ") as error:
        program.main(["x.safetensors", str(tmp_path / "out"), "--format", form])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_code_of_a_model_card_without_class_names_prints_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dict = model_from_config(VIL).state_dict()
    write_safetensors(tmp_path / "x.safetensors", Weights("x", "run", "raw", state_dict, VIL))
    program.main([str(tmp_path / "x.safetensors"), str(tmp_path / "FOLDER"), "--format", "hf"])
    assert run_code_of_card(tmp_path / "FOLDER", monkeypatch) in {f"{index}\n" for index in range(5)}
