"""Models by name or by file: the model, its transform and its class names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vil
from data.transforms import evaluation_transform
from vil.checkpoints.loading import load
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import DataConfig, ModelConfig, StageConfig
from vil.errors import UserError
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


def test_predictions_are_the_most_probable_classes(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors", transform=TRANSFORM)
    loaded = vil.load(tmp_path / "x.safetensors")
    images = [random_image("RGB", (40, 60)), random_image("L", (50, 33)), random_image("RGBA", (64, 64))]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    with torch.no_grad():
        rows = loaded.model(torch.stack([loaded.transform(image) for image in images])).softmax(dim=1)
    predictions = loaded.predict([images[0], str(tmp_path / "1.png"), tmp_path / "2.png"], batch_size=2)
    for row, prediction in zip(rows, predictions, strict=True):
        expected = sorted(zip("abc", row.tolist()), key=lambda pair: -pair[1])
        assert [name for name, _ in prediction] == [name for name, _ in expected]
        assert [value for _, value in prediction] == pytest.approx([value for _, value in expected], abs=1e-6)
    assert [len(p) for p in loaded.predict(images, top=2)] == [2, 2, 2]
    assert loaded.predict(images[0], top=1)[0] == loaded.predict([tmp_path / "0.png"], top=1)[0]
    assert loaded.predict([]) == []


def test_predictions_name_what_they_cannot_use(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors")
    loaded = vil.load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"^top: expected a number from 1, got 0$"):
        loaded.predict([], top=0)
    with pytest.raises(UserError, match=rf"^{tmp_path}/no\.png: cannot be read: No such file or directory$"):
        loaded.predict(tmp_path / "no.png")
    (tmp_path / "1.png").write_bytes(b"text")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/1\.png: cannot be read: not an image of a supported format$"
    ):
        loaded.predict(tmp_path / "1.png")


@pytest.mark.parametrize("images", [None, b"x", 3, {"x": 1}, iter(()), [None], [b"x"], ["x.png", 3]])
def test_other_types_of_images_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    write_model(tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"^images: expected an image of Pillow or the path of an image file,"
    ):
        vil.load(tmp_path / "x.safetensors").predict(images)


def test_an_image_of_floats_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors")
    reason = "cannot be used: its pixels are floats, of no defined range; expected 8 or 16 unsigned bits"
    with pytest.raises(UserError, match=rf"^images: <PIL\.Image\.Image .* mode=F .*> {reason}$"):
        vil.load(tmp_path / "x.safetensors").predict(Image.new("F", (8, 8)))


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=rf"^{tmp_path}/pipe\.png: cannot be read: is not a regular file$"):
        vil.load(tmp_path / "x.safetensors").predict(tmp_path / "pipe.png")


def test_a_row_of_pixels_is_not_resized_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "x.safetensors")
    resized = []
    original = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        resized.append(tuple(size))
        assert max(size) < 10_000
        return original(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", resize)
    image = random_image("RGB", (3000, 1))
    found = vil.load(tmp_path / "x.safetensors").transform(image)
    assert resized
    assert torch.equal(found, evaluation_transform(DataConfig(), image_size=32, in_chans=3)(image))


def test_gray_images_of_16_bits_keep_their_upper_bits(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors")
    transform = vil.load(tmp_path / "x.safetensors").transform
    deep = Image.fromarray(np.full((32, 32), 0x80FF, dtype=np.uint16))
    assert torch.equal(transform(deep), transform(Image.new("L", (32, 32), 0x80)))


@pytest.mark.parametrize("in_chans", [3, 1])
def test_timm_resolves_the_transform_and_the_names_of_the_classes(tmp_path: Path, in_chans: int) -> None:
    write_model(tmp_path / "x.safetensors", in_chans, TRANSFORM)
    mean, std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if in_chans == 3 else ((0.2,), (0.5,))
    for model in (vil.load(tmp_path / "x.safetensors").model,
                  vil.create_model(None, checkpoint=tmp_path / "x.safetensors")):  # fmt: skip
        data = timm.data.resolve_model_data_config(model)
        assert data["mean"] == pytest.approx(mean)
        assert data["std"] == pytest.approx(std)
        assert (data["crop_pct"], data["interpolation"]) == (0.8, "bilinear")
        assert data["input_size"] == (in_chans, 32, 32)
        assert model.pretrained_cfg["label_names"] == ("a", "b", "c")
        assert model.pretrained_cfg["num_classes"] == 3
    fewer = vil.create_model(None, checkpoint=tmp_path / "x.safetensors", num_classes=2, image_size=(40, 48))
    assert fewer.pretrained_cfg["label_names"] == ("a", "b")
    assert timm.data.resolve_model_data_config(fewer)["input_size"] == (in_chans, 40, 48)


def test_timm_models_of_a_run_have_its_transform_not_their_own(tmp_path: Path) -> None:
    config = ModelConfig(name="timm/test_vit", image_size=64, num_classes=2)
    state_dict = model_from_config(config).state_dict()
    weights = Weights("x", "run", "raw", state_dict, config, transform=TRANSFORM, class_names=("a", "b"))
    write_safetensors(tmp_path / "x.safetensors", weights)
    model = vil.load(tmp_path / "x.safetensors").model
    data = timm.data.resolve_model_data_config(model, use_test_size=True)
    assert (data["input_size"], data["crop_pct"], data["mean"]) == ((3, 64, 64), 0.8, (0.1, 0.2, 0.3))
    assert model.pretrained_cfg["label_names"] == ("a", "b")


def test_published_checkpoints_have_the_transform_of_their_configuration() -> None:
    case = RUN.parents[1] / "parity" / "vil_rpe_chunk"
    model = vil.load_released(case / "config.yaml", case / "model_best.pth")
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["interpolation"]) == ((3, *model.img_size), "bicubic")
    assert (model.pretrained_cfg["num_classes"], model.pretrained_cfg["label_names"]) == (10, None)


def test_an_image_without_finite_logits_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors")
    loaded = load(tmp_path / "x.safetensors")
    image = random_image("RGB", (40, 40))
    assert len(loaded.predict([image] * 3, batch_size=2)) == 3
    with torch.no_grad():
        loaded.model.head.weight[1] = float("inf")
    with pytest.raises(UserError, match=r"^images: the logits are not finite for image 0$"):
        loaded.predict(image)


def test_an_output_other_than_logits_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "x.safetensors")
    loaded = load(tmp_path / "x.safetensors")
    loaded.model.reset_classifier(3, "")
    reason = r"its output is of shape \(1, 17, 3\), expected one logit per class"
    with pytest.raises(UserError, match=f"^model: {reason}$"):
        loaded.predict(random_image("RGB", (40, 40)))


def test_a_model_without_classes_predicts_none(tmp_path: Path) -> None:
    config = write_model(tmp_path / "x.safetensors")
    model = vil.create_model(None, checkpoint=tmp_path / "x.safetensors", num_classes=0)
    loaded = load(tmp_path / "x.safetensors")._replace(model=model)
    with pytest.raises(UserError, match=r"^model\.num_classes: the model has no classifier"):
        loaded.predict(random_image("RGB", config.size))
