"""The zoo against the paper's tables, and every argument of `create_model`."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vil
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models import model_from_config

PAPER = json.loads((Path(__file__).parents[2] / "tools" / "paper_results.json").read_text())
ZOO_NAMES = {
    "Tiny": "vil_tiny", "Small": "vil_small", "Medium-D": "vil_medium_deep", "Medium-W": "vil_medium_wide",
    "Base-D": "vil_base_deep", "Base-W": "vil_base_wide",
    "Tiny-3stage": "vil_tiny_3stage", "Small-3stage": "vil_small_3stage",
}  # fmt: skip
TINY_STAGES = [
    StageConfig(dim=16, heads=2, patch=4, window=2, projected_tokens=8, random_features=8, reduction=2),
    StageConfig(dim=32, heads=4, patch=2, attention="full"),
]


def on_meta(name, **options):
    with torch.device("meta"):
        return vil.create_model(name, **options)


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize("size", list(PAPER["table1"]))
def test_table_1_sizes(size):
    model = on_meta(ZOO_NAMES[size])
    stages = [
        {
            "blocks": len(stage.blocks),
            "patch": stage.patch_embed.patch,
            "heads": stage.blocks[0].attn.heads,
            "dim": stage.config.dim,
        }
        for stage in model.stages
    ]
    assert stages == PAPER["table1"][size]


@pytest.mark.parametrize("row", [r for r in PAPER["table2"] if r["kind"] != "flat"], ids=lambda r: r["model"])
def test_table_2_parameters_and_flops(row):
    """Absolute position and the exact window with w = 7, as the paper's table has them."""
    name = f"vil_{row['size']}" + ("_3stage" if len(row["blocks"]) == 3 else "")
    attention = "full" if row["attention"] == "full" else None
    model = on_meta(name, attention=attention, position="absolute", mask="exact", blocks=row["blocks"])
    assert millions(model) == pytest.approx(row["params_m"], abs=0.01)
    assert model.multiply_adds() / 1e9 == pytest.approx(row["gflops"], rel=0.01)


@pytest.mark.parametrize(("name", "params", "gflops"), [("tiny", 5.7, 1.3), ("small", 22.1, 4.6)])
def test_flat_models_round_to_table_2(name, params, gflops):
    """Printed with one decimal; E-ViT-Small has DeiT-S's parameters there, whose embedding is larger."""
    model = on_meta(f"evit_{name}_patch16")
    assert millions(model) == pytest.approx(params, abs=0.08)
    assert model.multiply_adds() / 1e9 == pytest.approx(gflops, abs=0.05)


@pytest.mark.parametrize("name", vil.list_models())
def test_create_model_and_timm_build_the_same_model(name):
    ours = on_meta(name, image_size=64, num_classes=7)
    with torch.device("meta"):
        timms = timm.create_model(name, img_size=64, num_classes=7)
    assert ours.state_dict().keys() == timms.state_dict().keys()
    assert timms(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)
    assert timms.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": (64, 96)}, {"num_classes": 0}, {"pool": "cls"}, {"blocks": (1, 2, 3, 1)},
        {"in_chans": 1}, {"position": "absolute"}, {"window": 4}, {"global_tokens": 3},
        {"global_tokens": 0}, {"drop_path": 0.2},
        {"mask": "exact"}, {"mask": "cyclic"}, {"neighbors": "self"}, {"neighbors": "random"},
        {"share_global_projection": False}, {"attention_dropout": 0.1}, {"dropout": 0.1},
        {"attention": "full"}, {"attention": "linformer"}, {"attention": "linformer", "projected_tokens": 32},
        {"attention": "performer"}, {"attention": "spatial_reduction"},
        {"attention": "global_only", "global_tokens": 2},
        {"attention": ["full", "performer", "vision_longformer", "linformer"]},
    ],
    ids=str,
)  # fmt: skip
def test_every_argument_makes_a_model_that_learns(options):
    model = vil.create_model("vil_tiny", **{"image_size": 64, "num_classes": 5, **options})
    height, width = model.img_size
    output = model(torch.randn(2, model.in_chans, height, width))
    assert output.shape == (2, options.get("num_classes", 5) or 384)
    output.square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_arguments_have_their_effect():
    plain = vil.create_model("vil_tiny", image_size=64)
    assert [len(stage.blocks) for stage in plain.stages] == [1, 1, 9, 1]
    assert [stage.num_global_tokens for stage in plain.stages] == [1, 1, 1, 0]
    kinds = [type(stage.blocks[0].attn).__name__ for stage in plain.stages]
    assert kinds == ["VisionLongformerAttention"] * 2 + ["FullAttention"] * 2
    assert vil.create_model("vil_tiny", image_size=64, pool="cls").stages[-1].num_global_tokens == 1
    windows = vil.create_model("vil_tiny", image_size=64, window=3).stages[0].blocks[0].attn.window
    assert windows == 3
    dropping = vil.create_model("vil_tiny", image_size=64, drop_path=0.22)
    rates = [block.drop_path1 for stage in dropping.stages for block in stage.blocks]
    assert [getattr(rate, "drop_prob", 0.0) for rate in rates] == pytest.approx([0.02 * i for i in range(12)])
    mixed = vil.create_model("vil_tiny", image_size=64, attention="linformer")
    assert [stage.position is not None for stage in mixed.stages] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vil_tinny", {}, "name: there is no model 'vil_tinny'; did you mean vil_tiny?"),
        (
            "vil_tiny",
            {"image_size": 16},
            "image_size: 16×16 pixels are too few for stage 4 of 4, which needs 32",
        ),
        ("vil_tiny", {"pool": "cls", "global_tokens": 0}, "pool: cls needs a global token in the last stage"),
        ("vil_tiny", {"pool": "max"}, "pool: expected one of avg, cls or null, got 'max'"),
        ("vil_tiny", {"blocks": (1, 2)}, "blocks: needs 4 numbers, one per stage"),
        ("vil_tiny", {"attention": ["full"]}, "attention: needs 4 names, one per stage"),
        ("vil_tiny", {"global_tokens": [1, 0]}, "global_tokens: needs 4 numbers, one per stage"),
        ("vil_tiny", {"attention": "fast"}, "attention: expected one of full, vision_longformer"),
        ("vil_tiny", {"drop_path": 1.5}, "drop_path: expected a number from 0 to below 1, got 1.5"),
        (
            "vil_tiny",
            {"mask": "exact", "neighbors": "random"},
            "neighbors: the exact mask is defined for all",
        ),
        (
            "vil_tiny",
            {"stages": TINY_STAGES},
            "stages: name: vil requires a list of stages, and a list of stages requires name: vil",
        ),
        ("vil_tiny", {"global_tokens": -1}, "global_tokens: expected an integer from 0 to 1,000,000"),
        (
            "vil_tiny",
            {"image_size": 10**9},
            "image_size: expected an integer from 1 to 8,192 or a list of 2 integers from 1 to 8,192, got 1",
        ),
        ("evit_tiny_patch16", {"attention": "linformer"}, "attention: evit_tiny_patch16 has no sparse stage"),
        ("vil", {}, "stages: name: vil requires a list of stages, and a list of stages requires name: vil"),
        (
            "vil",
            {"stages": [StageConfig(dim=8, heads=2), StageConfig(dim=30, heads=4)]},
            "stages[1].heads: 4 heads do not divide the width 30",
        ),
        (
            "vil",
            {"stages": [StageConfig(dim=3, heads=1, position="absolute")]},
            "dim: absolute position needs",
        ),
        ("vil", {"stages": TINY_STAGES, "image_size": 4}, "image_size: 4×4 pixels are too few for stage 2"),
    ],
)
def test_impossible_models_are_refused_in_one_line(name, options, message):
    with pytest.raises(UserError) as error:
        vil.create_model(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_of_stages_is_a_model():
    config = ModelConfig(name="vil", image_size=32, stages=TINY_STAGES, pool="cls", neighbors="random")
    model = model_from_config(config, num_classes=4)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert model.global_pool == "cls"
    absolute = [StageConfig(dim=16, heads=2, position="absolute", window=2)]
    embedded = model_from_config(ModelConfig(name="vil", stages=absolute, image_size=8), 4)
    assert embedded.stages[0].position is not None


def test_numbers_of_numpy():
    """As of `labels.max() + 1`."""
    model = on_meta("vil_tiny", image_size=np.int64(64), num_classes=np.int64(7), drop_path=np.float32(0.5))
    assert (model.img_size, model.num_classes, model.config.drop_path) == ((64, 64), 7, 0.5)
    assert timm.create_model("vil_tiny", num_classes=np.int64(7), device="meta").num_classes == 7


def test_baselines_of_timm():
    model = vil.create_model("timm/deit_tiny_patch16_224", image_size=32, num_classes=7, drop_path=0.1)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    with pytest.raises(UserError, match="window: timm/resnet18 has no such option"):
        vil.create_model("timm/resnet18", window=7)
    config = ModelConfig(name="timm/deit_tiny_patch16_224", image_size=32, drop_path=0.1, pool="avg")
    assert model_from_config(config, 10)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert model_from_config(ModelConfig(name="timm/resnet18", image_size=64), 10)(
        torch.randn(1, 3, 64, 64)
    ).shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(name="timm/deit_tinny"), "name: timm has no model 'deit_tinny'; did you mean timm/"),
        (ModelConfig(name="timm/vit_tiny_patch16_224.foo"), "timm_options: timm cannot create vit_tiny"),
        (ModelConfig(name="timm/resnet18", window=7), "window: timm/resnet18 has no such option"),
        (
            ModelConfig(name="timm/resnet18", timm_options={"depth": 3}),
            "timm_options: timm cannot create resnet18",
        ),
        (ModelConfig(name="vil_tiny", timm_options={"a": 1}), "timm_options: only for a timm/<name> model"),
        (ModelConfig(name="vil_tiny", stages=TINY_STAGES), "stages: name: vil requires a list of stages"),
        (ModelConfig(name="vil"), "stages: name: vil requires a list of stages"),
    ],
)
def test_impossible_sections_are_refused(config, message):
    with pytest.raises(UserError) as error:
        model_from_config(config, 10)
    assert message in str(error.value)


def test_number_of_classes_is_needed():
    with pytest.raises(UserError, match="num_classes: is needed"):
        model_from_config(ModelConfig(name="vil_tiny"))


def test_gradients_have_the_strides_of_the_parameters():
    """DDP compares them, also along axes of size 1: here one head and one global token in stage 1."""
    model = vil.create_model("vil_tiny", image_size=32, num_classes=2)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    strides = {name: (x.grad.stride(), x.stride()) for name, x in model.named_parameters()}
    assert {name for name, (gradient, parameter) in strides.items() if gradient != parameter} == set()
