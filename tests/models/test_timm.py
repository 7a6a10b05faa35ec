"""The contract of timm's models, as tested by timm and used by detectors."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import create_feature_extractor, get_pretrained_cfg, save_for_hf
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import vil
from vil.checkpoints.open import open_weights
from vil.checkpoints.published_config import read_published_config
from vil.checkpoints.safetensors_file import write_safetensors
from vil.checkpoints.weights import Weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models.zoo import model_from_config

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


STAGES = [
    StageConfig(dim=8, heads=2, patch=4, window=3),
    StageConfig(dim=16, heads=2, patch=2, attention="full"),
    StageConfig(dim=24, heads=2, patch=2, attention="full", global_tokens=0),
]
CONFIG = ModelConfig(name="vil", image_size=32, num_classes=3, stages=STAGES)
RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1_0" / "run"


@pytest.fixture
def checkpoint(tmp_path):
    """Write safetensors of a model with three stages."""
    torch.manual_seed(0)
    state_dict = model_from_config(CONFIG).state_dict()
    weights = Weights("x", "run", "raw", state_dict, CONFIG, {}, {"crop_pct": 0.9}, ("a", "b", "c"))
    write_safetensors(tmp_path / "x.safetensors", weights)
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("out_indices", [None, (0, 1), [-1]])
def test_features_of_a_checkpoint(checkpoint, out_indices):
    """The maps are those of the whole model, by timm.create_model and by vil.create_model."""
    whole, x = vil.load(checkpoint).model, images(2, 32, 40)
    expected = whole.forward_intermediates(x, None if out_indices is None else list(out_indices),
                                           intermediates_only=True)  # fmt: skip
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    by_timm = timm.create_model("vil", stages=STAGES, img_size=32, num_classes=9, features_only=True,
                                checkpoint_path=checkpoint, **chosen).eval()  # fmt: skip
    by_name = vil.create_model(None, checkpoint=checkpoint, features_only=True, **chosen).eval()
    for model in (by_timm, by_name):
        maps = model(x)
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
        assert model.feature_info.channels() == [m.shape[1] for m in maps]
        assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.9
        assert "num_classes" not in model.pretrained_cfg


def test_checkpoint_path_of_a_run():
    """A folder or a file, with the weights that `vil.load` chooses, at another image size too."""
    loaded = vil.load(RUN).model
    stages, x = loaded.config.stages, images(2, 32, 32)
    for path in (RUN, str(RUN / "checkpoints" / "best.pt")):
        model = timm.create_model("vil", stages=stages, img_size=32, num_classes=10, checkpoint_path=path)
        assert torch.equal(model.eval()(x), loaded(x))
        assert model.pretrained_cfg["label_names"] == tuple("0123456789")
    larger = timm.create_model("vil", stages=stages, img_size=48, num_classes=10, checkpoint_path=RUN).eval()
    loaded.set_input_size(48)
    torch.testing.assert_close(larger(images(1, 48, 48)), loaded(images(1, 48, 48)))
    assert timm.data.resolve_model_data_config(larger)["input_size"] == (3, 48, 48)


def test_published_weights_of_features_only():
    model, expected = published_model(
        features_only=True, checkpoint_path=str(PUBLISHED / "model_best.pth"), out_indices=(0,)
    )
    whole, _ = published_model(checkpoint_path=str(PUBLISHED / "model_best.pth"))
    maps = whole.forward_intermediates(expected["input"], [0], intermediates_only=True)
    assert torch.equal(model(expected["input"])[0], maps[0])


def test_averaged_weights_of_a_checkpoint_of_timm_are_preferred_as_in_timm(tmp_path):
    raw, averaged = (timm.create_model("vil", stages=STAGES, img_size=32, num_classes=3) for _ in range(2))
    state = {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save(state, tmp_path / "x.pth")
    model = timm.create_model("vil", stages=STAGES, img_size=32, num_classes=3,
                              checkpoint_path=str(tmp_path / "x.pth"))  # fmt: skip
    assert torch.equal(model.head.weight, averaged.head.weight)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": "cyclic"}, "mask chunk, not cyclic"),
        ({"neighbors": "self"}, "neighbors all, not self"),
        ({"window": 2}, "stages[0].window 3, not 2"),
        ({"global_pool": "token", "global_tokens": 1}, "pool avg, not cls"),
    ],
)
def test_weights_of_a_model_that_computes_something_else_are_refused(checkpoint, options, reason):
    """Their shapes fit, or would be resized to fit."""
    hint = "give timm.create_model its options, or use vil.create_model(None, checkpoint=...)"
    with pytest.raises(UserError) as caught:
        timm.create_model("vil", stages=STAGES, img_size=32, num_classes=3, checkpoint_path=checkpoint,
                          **options)  # fmt: skip
    assert str(caught.value) == f"{checkpoint}: holds a model vil with {reason}; {hint}"


def test_weights_of_another_mask_than_the_default_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, mask="exact")
    weights = Weights("x", "run", "raw", model_from_config(config).state_dict(), config)
    write_safetensors(tmp_path / "x.safetensors", weights)
    options = {
        "stages": STAGES,
        "img_size": 32,
        "num_classes": 3,
        "checkpoint_path": tmp_path / "x.safetensors",
    }
    with pytest.raises(UserError, match="holds a model vil with mask exact, not chunk; "):
        timm.create_model("vil", **options)
    timm.create_model("vil", mask="exact", **options)


def test_weights_of_a_model_of_timm_are_refused(tmp_path):
    config = ModelConfig(name="timm/test_vit", image_size=160, num_classes=3)
    weights = Weights("x", "run", "raw", model_from_config(config).state_dict(), config)
    write_safetensors(tmp_path / "x.safetensors", weights)
    with pytest.raises(UserError) as caught:
        timm.create_model("vil", stages=STAGES, img_size=32, checkpoint_path=tmp_path / "x.safetensors")
    assert str(caught.value) == f"{tmp_path}/x.safetensors: holds a model timm/test_vit"


def test_models_of_timm_read_checkpoints_as_before(tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    loaded = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(tmp_path / "x.pth"))
    assert torch.equal(loaded.head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_features_of_a_run_of_a_timm_model(tmp_path, name):
    size = 64 if name == "resnet10t" else 160
    config = ModelConfig(name=f"timm/{name}", image_size=size, num_classes=3)
    torch.manual_seed(0)
    whole = model_from_config(config).eval()
    write_safetensors(tmp_path / "x.safetensors", Weights("x", "run", "raw", whole.state_dict(), config))
    model = vil.create_model(None, checkpoint=tmp_path / "x.safetensors", features_only=True).eval()
    x = images(1, size, size)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, 3, intermediates_only=True)
        assert torch.equal(model(x)[-1], expected[-1])


def test_options_of_features():
    model = vil.create_model("vil", stages=STAGES, image_size=32, features_only=True, out_indices=2)
    assert model.feature_info.channels() == [16, 24]
    with pytest.raises(UserError, match=r"^out_indices: requires features_only=True$"):
        vil.create_model("vil", stages=STAGES, image_size=32, out_indices=2)
    with pytest.raises(UserError, match=r"^out_indices: feature index 3 is out of range \(0 to 2\)$"):
        vil.create_model("vil", stages=STAGES, image_size=32, features_only=True, out_indices=[3])
    with pytest.raises(UserError, match=r"^new_head: requires a checkpoint$"):
        vil.create_model("vil", stages=STAGES, image_size=32, new_head=True)


def test_a_model_whose_pooling_was_changed_is_saved_for_timm(tmp_path):
    model = timm.create_model(NAME, num_classes=3, global_pool="token", blocks=(1,) * 4).eval()
    model.reset_classifier(5, "avg")
    # Newer versions of timm find the arguments of the model by themselves.
    save_for_hf(model, tmp_path, model_args={**model._model_args, "num_classes": 5, "global_pool": "avg"})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    inputs = torch.rand(1, 3, 224, 224)  # the size of untrained models, which timm 1.0.21 builds in any case
    assert torch.equal(again(inputs), model(inputs))


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
def test_features_by_another_class_of_timm_are_refused(feature_cls):
    with pytest.raises(UserError, match=r"^feature_cls: must be getter"):
        timm.create_model(NAME, features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_efficientnet"])
def test_levels_that_a_model_of_timm_lacks(name):
    reason = rf"^out_indices: timm/{name} lacks one of the levels \(0, 17\)$"
    with pytest.raises(UserError, match=reason):
        vil.create_model(f"timm/{name}", 160, features_only=True, out_indices=(0, 17))


def test_a_new_head_for_a_checkpoint(checkpoint):
    whole = vil.load(checkpoint).model
    model = vil.create_model(None, checkpoint=checkpoint, num_classes=7, new_head=True)
    assert torch.equal(model.norm.weight, whole.norm.weight)
    assert model.head.out_features == 7
    assert model.pretrained_cfg["label_names"] is None
    same = vil.create_model(None, checkpoint=checkpoint, new_head=True)
    assert not torch.equal(same.head.weight, whole.head.weight)


def test_a_flat_model_has_a_feature_level_per_block():
    """As timm's ViTs do: the last three by default."""
    model = timm.create_model("evit_tiny_patch16", img_size=64, blocks=(4,)).eval()
    vit = timm.create_model("vit_tiny_patch16_224", depth=4, features_only=True)
    assert [info["num_chs"] for info in model.feature_info] == [192] * 4
    assert [info["reduction"] for info in model.feature_info] == [16] * 4
    features = timm.create_model("evit_tiny_patch16", img_size=64, blocks=(4,), features_only=True).eval()
    assert list(features.feature_info.out_indices) == list(vit.feature_info.out_indices) == [1, 2, 3]
    x, outputs = images(), []
    model.stages[0](x, None, outputs)
    tokens, maps = model.forward_intermediates(x)
    assert torch.equal(tokens, model.forward_features(x))
    assert len(maps) == len(outputs) == 4
    for feature_map, output in zip(maps, outputs):
        assert torch.equal(feature_map, output[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    normed = model.forward_intermediates(x, [1, 3], norm=True, output_fmt="NLC", intermediates_only=True)
    for level, feature_map in zip((1, 3), normed, strict=True):
        assert torch.equal(feature_map, model.norm(outputs[level])[:, 1:])
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages[0].blocks) == 2
    (last,) = model.forward_intermediates(x, [1], intermediates_only=True)
    assert torch.equal(last, maps[1])


def test_another_window(checkpoint):
    """Tables are resized as for weights that are loaded into a model with this window."""
    model = vil.load(checkpoint).model
    model.set_input_size(window_size=2)
    config = dataclasses.replace(CONFIG, window=2)
    expected = model_from_config(config)
    open_weights(checkpoint).load_into(expected)
    x = images(2, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.eval()(x))
    assert model.stages[0].blocks[0].attn.bias_table.shape == (2, 7, 7)
    assert (model.config.window, model.stages[0].config.window, model._model_args["window"]) == (2, 2, 2)
    model.set_input_size((48, 40), window_size=4)
    assert (model.img_size, model.stages[0].blocks[0].attn.window) == ((48, 40), 4)
    again = timm.create_model("vil", num_classes=3, **model._model_args)
    again.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match=r"^window: expected an integer from 1 to 1,000,000 or null, got 0$"):
        model.set_input_size(window_size=0)
    flat = timm.create_model("evit_tiny_patch16", img_size=32, blocks=(1,))
    with pytest.raises(
        UserError, match=r"^window_size: no stage of the model has vision_longformer attention$"
    ):
        flat.set_input_size(window_size=4)


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
