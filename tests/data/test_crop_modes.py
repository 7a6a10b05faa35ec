"""Crop modes of evaluation, and the crops of test-time augmentation."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision import transforms

import vil
from data.decoding import EncodedImage
from data.transforms import evaluation_transform, tta_transform
from tools.image_reader import ImageReader
from tools.programs import export
from vil.checkpoints import loading
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import DataConfig, EvalConfig, ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.timm_models import pretrained_transform
from vil.models.zoo import model_from_config

MODES = ("center", "squash", "border")


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_a_crop_mode_is_that_of_timm(mode, size, image):
    data = DataConfig(crop_mode=mode)
    found = evaluation_transform(data, image_size=size, in_chans=3)(image)
    expected = create_transform(
        size, crop_pct=0.875, crop_mode=mode, interpolation="bicubic", mean=data.mean, std=data.std
    )
    torch.testing.assert_close(found, expected(image))


def test_modes_differ_and_gray_images_have_them_too(image):
    for in_chans in (1, 3):
        found = [
            evaluation_transform(DataConfig(crop_mode=mode), image_size=32, in_chans=in_chans)(image)
            for mode in MODES
        ]
        assert all(views.shape == (in_chans, 32, 32) for views in found)
        assert not any(torch.equal(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    # The bars above and below the image have the mean color, which is normalized to about 0.
    assert found[2][:, 0].abs().max() < 0.02 < found[2][:, 16].abs().max()


def test_a_long_image_fits_into_the_border(image):
    long = image.resize((1000, 5))
    for transform in (
        evaluation_transform(DataConfig(crop_mode="border"), image_size=16, in_chans=3),
        loading.evaluation_transform(DataConfig(crop_mode="border"), 16, 3),
    ):
        assert transform(long).isfinite().all()


def test_a_mean_that_is_no_color_cannot_be_padded_with():
    reason = "border pads with the color data.mean, which must be between 0 and 1, got 123.7, 116.3, 103.5"
    data = DataConfig(crop_mode="border", mean=(123.7, 116.3, 103.5))
    with pytest.raises(UserError) as refused:
        evaluation_transform(data, image_size=32, in_chans=3)
    assert str(refused.value) == f"data.crop_mode: {reason}"
    with pytest.raises(UserError) as refused:
        loading.evaluation_transform(data, 32, 3)
    assert str(refused.value) == f"data.crop_mode: {reason}"


def test_the_crop_mode_is_stored_with_weights(tmp_path, image):
    stages = [StageConfig(dim=8, heads=2, patch=8, attention="full")]
    config = ModelConfig(name="vil", image_size=32, num_classes=3, stages=stages)
    transform = {"crop_mode": "squash", "crop_pct": 0.9}
    weights = Weights("x", "run", "raw", model_from_config(config).state_dict(), config, transform=transform)
    write_safetensors(tmp_path / "x.safetensors", weights)
    expected = evaluation_transform(DataConfig(crop_mode="squash", crop_pct=0.9), image_size=32, in_chans=3)(
        image
    )
    loaded = vil.load(tmp_path / "x.safetensors")
    torch.testing.assert_close(loaded.transform(image), expected)
    data_config = resolve_model_data_config(loaded.model)
    torch.testing.assert_close(create_transform(**data_config)(image), expected)
    image.save(tmp_path / "a.png")
    reader = ImageReader(config, transform, "x")
    torch.testing.assert_close(reader(tmp_path / "a.png"), expected)
    export.main([str(tmp_path / "x.safetensors"), str(tmp_path / "hub"), "--format", "hf"])
    stored = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]
    assert (stored["crop_mode"], stored["crop_pct"]) == ("squash", 0.9)


def test_the_crop_mode_of_weights_of_timm():
    name = next(n for n in timm.list_pretrained() if timm.get_pretrained_cfg(n).crop_mode == "squash")
    assert pretrained_transform(f"timm/{name}")["crop_mode"] == "squash"


@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_crops_of_test_time_augmentation(in_chans, image):
    """Scale by scale: five crops of the resized image, the last of them that of evaluation."""
    model, data = ModelConfig(image_size=(24, 32), in_chans=in_chans), DataConfig(crop_pct=0.8)
    config = EvalConfig(model=model, data=data, tta="five_crop", tta_scales=[1.0, 1.5])
    mode = "RGB" if in_chans == 3 else "L"
    encoded = EncodedImage(image, mode)
    views = tta_transform(config).pixels(encoded)
    assert views.shape == (2 * 5 * in_chans, 24, 32)
    for scale, crops in zip((1.0, 1.5), views.split(5 * in_chans)):
        data = DataConfig(crop_pct=0.8 / scale)
        transform = evaluation_transform(data, image_size=(24, 32), in_chans=in_chans)
        assert torch.equal(crops[-in_chans:], transform.pixels(image))
        resized = transform.crop.steps[0](image.convert(mode))
        for crop, expected in zip(crops.split(in_chans), transforms.FiveCrop((24, 32))(resized)):
            pixels = torch.from_numpy(np.array(expected)).view(24, 32, in_chans).permute(2, 0, 1)
            assert torch.equal(crop, pixels)
    alone = EvalConfig(model=model, data=DataConfig(), tta="hflip")
    plain = evaluation_transform(DataConfig(), image_size=(24, 32), in_chans=in_chans)
    assert torch.equal(tta_transform(alone).pixels(encoded), plain.pixels(image))


def test_crops_beyond_the_image_are_refused():
    for options, message in (
        (
            {"tta_scales": [1.0, 0.8]},
            "tta_scales: 0.8 is less than data.crop_pct, 0.875: the crop would be larger than the image",
        ),
        (
            {"tta_scales": [10.0], "model": ModelConfig(image_size=1000)},
            "tta_scales: image_size * 10 / crop_pct is more than 8,192 pixels",
        ),
        (
            {"tta": "ten_crop", "data": DataConfig(crop_mode="border")},
            "tta: ten_crop requires data.crop_mode center or squash, got border",
        ),
    ):
        with pytest.raises(UserError) as refused:
            tta_transform(EvalConfig(**options))
        assert str(refused.value) == message
