"""The contract of timm's models, as tested by timm and used by detectors."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import create_feature_extractor, get_pretrained_cfg
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import vil
from vil.checkpoints.published_config import read_published_config
from vil.config import UserError

NAME = "vil_tiny"


def images(batch=1, height=64, width=64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", vil.list_models())
def test_default_configuration(name):
    cfg = get_pretrained_cfg(name)
    assert timm.is_model(name)
    assert name in timm.list_models(f"{name[:4]}*")
    assert cfg.input_size == (3, 224, 224)
    assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (0.875, "bicubic", 1000)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert dict(model.named_modules())[cfg.classifier].out_features == 1000
    assert dict(model.named_modules())[cfg.first_conv].in_channels == 3
    state = model.state_dict()
    assert f"{cfg.classifier}.weight" in state
    assert f"{cfg.first_conv}.weight" in state


def test_arguments_of_timm():
    model = timm.create_model(
        NAME, pretrained=False, num_classes=7, img_size=(64, 96), in_chans=1, drop_path_rate=0.2,
        global_pool="token", drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, pos_drop_rate=0.1,
    )  # fmt: skip
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 7)
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (7, 384, 384)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(NAME, pretrained=True)


def test_arguments_of_timm_have_their_names_and_meaning():
    model = timm.create_model(
        NAME, img_size=(64, 96), in_chans=1, num_classes=3, global_pool="token", drop_path_rate=0.2,
        drop_rate=0.1, pos_drop_rate=0.3, attn_drop_rate=0.4, proj_drop_rate=0.5,
    )  # fmt: skip
    stage, block = model.stages[0], model.stages[-1].blocks[-1]
    assert (model.img_size, model.in_chans, model.num_classes, model.global_pool) == ((64, 96), 1, 3, "cls")
    assert block.drop_path1.drop_prob == pytest.approx(0.2)
    assert (model.head_drop.p, stage.pos_drop.p) == (0.1, 0.3)
    assert (block.attn.attention_dropout, block.attn.output_dropout.p, block.mlp.drop1.p) == (0.4, 0.5, 0.5)
    # In timm, proj_drop_rate does not include the embeddings, as the option dropout does.
    assert timm.create_model(NAME, img_size=64, proj_drop_rate=0.5).stages[0].pos_drop.p == 0
    with pytest.raises(UserError, match="drop_block_rate: unknown key"):
        timm.create_model(NAME, drop_block_rate=0.1)


def test_device_and_dtype():
    """timm's distillation tasks pass both to timm.create_model."""
    model = timm.create_model(NAME, img_size=64, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert not {"device", "dtype"} & model._model_args.keys()


def test_without_pooling():
    model = timm.create_model(NAME, img_size=64, num_classes=0, global_pool="")
    assert model(images()).shape == (1, 4, 384)


def test_checkpoint_path(tmp_path):
    model = timm.create_model(NAME, num_classes=4, img_size=64)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = timm.create_model(NAME, num_classes=4, img_size=64, checkpoint_path=str(tmp_path / "model.pt"))
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))


PUBLISHED = Path(__file__).parents[1] / "fixtures" / "parity" / "vil_rpe_chunk"


def published_model(**options):
    """The model of a published checkpoint, by timm, and its expected outputs."""
    config = read_published_config(PUBLISHED / "config.yaml").model
    model = timm.create_model("vil", stages=config.stages, num_classes=10, img_size=64, **options)
    return model.eval(), load_file(PUBLISHED / "expected.safetensors")


def test_published_checkpoints_by_checkpoint_path():
    model, expected = published_model(checkpoint_path=str(PUBLISHED / "model_best.pth"))
    torch.testing.assert_close(model(expected["input"]), expected["logits"], atol=2e-5, rtol=2e-5)


def test_published_checkpoints_as_pretrained_weights():
    """By `checkpoint_filter_fn`, with another number of classes, as timm users fine-tune."""
    overlay = {"file": str(PUBLISHED / "model_best.pth"), "num_classes": 10}
    model, expected = published_model(pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model(expected["input"]), expected["logits"], atol=2e-5, rtol=2e-5)
    weights = torch.load(PUBLISHED / "model_best.pth", weights_only=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"net": {k: v for k, v in weights["net"].items() if "head" not in k}})


def test_forward_features_and_head_make_the_forward_pass():
    model = timm.create_model(NAME, img_size=64).eval()
    tokens = model.forward_features(images())
    torch.testing.assert_close(model.forward_head(tokens), model(images()))
    assert model.forward_head(tokens, pre_logits=True).shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(images()).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(images()).shape == tokens.shape


def test_input_of_a_model_built_for_another_size():
    model = timm.create_model(NAME, img_size=64).eval()
    model.set_input_size(img_size=96)
    assert model(images(1, 96, 96)).shape == (1, 1000)


def test_channels_last_and_half_precision_inputs():
    model = timm.create_model(NAME, img_size=64, num_classes=3).eval()
    x = images(2)
    ordinary = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), ordinary)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), ordinary, atol=0.1, rtol=0.1)


def test_fx_feature_extraction():
    model = timm.create_model(NAME, img_size=64).eval()
    features = create_feature_extractor(model, return_nodes={"norm": "tokens", "head": "logits"})(images())
    torch.testing.assert_close(features["logits"], model(images()))
    torch.testing.assert_close(features["tokens"], model.forward_features(images()))


def test_traced_by_jit():
    """Tracing works for one size; scripting does not (see docs/models.md)."""
    model = timm.create_model(NAME, img_size=64).eval()
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images(1) * 2), model(images(1) * 2))


@pytest.mark.parametrize("height", [64, 75])
def test_feature_maps_have_the_stated_channels_and_reductions(height):
    model = timm.create_model("vil_tiny_3stage", features_only=True, img_size=64)
    maps = model(images(1, height, 100))
    assert model.feature_info.channels() == [96, 192, 384]
    assert model.feature_info.reduction() == [8, 16, 32]
    for feature_map, info in zip(maps, model.feature_info):
        assert feature_map.shape[1] == info["num_chs"]
        assert feature_map.shape[2:] == (height // info["reduction"], 100 // info["reduction"])


class Backbone(nn.Module):
    """Feature maps into a pyramid, as in torchvision's detectors."""

    def __init__(self):
        super().__init__()
        self.body = timm.create_model(NAME, features_only=True, drop_path_rate=0.1)
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
        self.out_channels = 32

    def forward(self, x):
        return self.pyramid({str(level): m for level, m in enumerate(self.body(x))})


def test_backbone_of_a_detector_trains_a_step():
    levels = [str(level) for level in range(4)]
    model = MaskRCNN(
        Backbone(), num_classes=3, min_size=120, max_size=200,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in (8, 16, 32, 64)), ((1.0,),) * 4),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2), mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
    )  # fmt: skip
    mask = torch.zeros(1, 120, 200, dtype=torch.uint8)
    mask[:, 20:60, 30:90] = 1
    target = {"boxes": torch.tensor([[30.0, 20.0, 90.0, 60.0]]), "labels": torch.tensor([1]), "masks": mask}
    losses = model([torch.rand(3, 120, 200)], [target])
    sum(losses.values()).backward()
    body = dict(model.backbone.body.named_parameters())
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, parameter in body.items() if parameter.grad is None]
