"""Every option of a stage and of a model reaches what it configures: one entry per field, none by default."""

import dataclasses

import pytest
import torch

import vil
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError
from vil.models import model_from_config
from vil.models.zoo import resolve_stages

STAGES = [
    StageConfig(dim=24, heads=2, patch=4, attention="vision_longformer", window=3, global_tokens=1),
    StageConfig(dim=32, heads=4, attention="linformer", projected_tokens=5),
    StageConfig(dim=32, heads=4, attention="performer", random_features=6),
    StageConfig(dim=32, heads=4, patch=1, attention="spatial_reduction", reduction=2, global_tokens=3),
]
BASE = ModelConfig(name="vil", image_size=32, num_classes=5, stages=STAGES)


def attention(model, stage, block=0):
    return model.stages[stage].blocks[block].attn


def build_stage(index, **changes):
    """BASE with one stage changed."""
    stages = [dataclasses.replace(stage) for stage in STAGES]
    stages[index] = dataclasses.replace(stages[index], **changes)
    return model_from_config(dataclasses.replace(BASE, stages=stages))


# Option of a stage: (index of the stage, another value, what it configures in the built model, its values
# in BASE and in the changed model).
STAGE_OPTIONS = {
    "dim": (0, 48, lambda model: model.stages[0].patch_embed.proj.out_channels, 24, 48),
    "heads": (0, 3, lambda model: attention(model, 0).bias_table.shape[0], 2, 3),
    "blocks": (1, 2, lambda model: len(model.stages[1].blocks), 1, 2),
    "patch": (0, 2, lambda model: model.stages[0].patch_embed.proj.stride, (4, 4), (2, 2)),
    "attention": (
        0, "full", lambda model: type(attention(model, 0)).__name__, "VisionLongformerAttention",
        "FullAttention",
    ),
    "global_tokens": (0, 4, lambda model: model.stages[0].global_tokens.shape, (1, 1, 24), (1, 4, 24)),
    "position": (0, "absolute", lambda model: model.stages[0].position is not None, False, True),
    "window": (0, 2, lambda model: attention(model, 0).bias_table.shape[1:], (11, 11), (7, 7)),
    "projected_tokens": (1, 7, lambda model: attention(model, 1).key_mixture.shape, (17, 5), (17, 7)),
    "random_features": (2, 9, lambda model: attention(model, 2).random_projection.shape, (6, 8), (9, 8)),
    "reduction": (3, 1, lambda model: attention(model, 3).reduce.stride, (2, 2), (1, 1)),
}  # fmt: skip

# Option of a model: (another value, what it configures, its values in BASE and in the changed model).
MODEL_OPTIONS = {
    "image_size": (64, lambda model: model.stages[0].size, (8, 8), (16, 16)),
    "num_classes": (7, lambda model: model.head.out_features, 5, 7),
    "in_chans": (1, lambda model: model.stages[0].patch_embed.proj.in_channels, 3, 1),
    "pool": ("cls", lambda model: model.global_pool, "avg", "cls"),
    "attention": (
        ["full", "linformer", "performer", "full"], lambda model: type(attention(model, 3)).__name__,
        "SpatialReductionAttention", "FullAttention",
    ),
    "blocks": ((1, 3, 1, 1), lambda model: len(model.stages[1].blocks), 1, 3),
    "position": ("absolute", lambda model: model.stages[0].position is not None, False, True),
    "mask": ("cyclic", lambda model: attention(model, 0).mask, "chunk", "cyclic"),
    "neighbors": ("random", lambda model: attention(model, 0).neighbors, "all", "random"),
    "window": (2, lambda model: attention(model, 0).bias_table.shape[1:], (11, 11), (7, 7)),
    "global_tokens": (2, lambda model: [s.num_global_tokens for s in model.stages], [1, 1, 1, 3], [2] * 4),
    "distillation_token": (True, lambda model: model.stages[3].dist_token is not None, False, True),
    "stage_globals": ("carry", lambda model: model.stages[1].carry is not None, False, True),
    "share_global_projection": (
        False, lambda model: hasattr(attention(model, 0), "global_query"), False, True,
    ),
    "projected_tokens": (7, lambda model: attention(model, 1).key_mixture.shape, (17, 5), (17, 7)),
    "share_key_value_projection": (
        False, lambda model: attention(model, 1).value_mixture is not None, False, True,
    ),
    "random_features": (9, lambda model: attention(model, 2).random_projection.shape, (6, 8), (9, 8)),
    "reduction": (1, lambda model: attention(model, 3).reduce.stride, (2, 2), (1, 1)),
    "attention_backend": ("dense", lambda model: attention(model, 0).backend, "auto", "dense"),
    "drop_path": (
        0.3, lambda model: getattr(model.stages[3].blocks[0].drop_path1, "drop_prob", 0.0), 0.0, 0.3,
    ),
    "dropout": (
        0.2, lambda model: [model.stages[0].pos_drop.p, attention(model, 1).output_dropout.p,
                            model.stages[2].blocks[0].mlp.drop2.p], [0.0] * 3, [0.2] * 3,
    ),
    "position_dropout": (
        0.2, lambda model: [model.stages[0].pos_drop.p, attention(model, 0).output_dropout.p],
        [0.0, 0.0], [0.2, 0.0],
    ),
    "attention_dropout": (0.2, lambda model: attention(model, 0).dropout_p(), 0.0, 0.2),
    "head_dropout": (0.2, lambda model: model.head_drop.p, 0.0, 0.2),
    "mlp_ratio": (2.5, lambda model: model.stages[1].blocks[0].mlp.fc1.out_features, 128, 80),
    "stages": (
        [*STAGES[:3], StageConfig(dim=16, heads=2, patch=1, attention="full")],
        lambda model: model.head.in_features, 32, 16,
    ),
    "layer_scale": (
        0.5, lambda model: [p[0].item() for p in model.stages[2].blocks[0].ls2.parameters()], [], [0.5],
    ),
    "norm_embed": (
        False, lambda model: type(model.stages[2].patch_embed.norm).__name__, "LayerNorm", "Identity",
    ),
}  # fmt: skip

ELSEWHERE = {
    "name": "test_name_selects_the_sizes",
    "timm_options": "test_zoo.test_baselines_of_timm",
    "init_from": "read by train.py and eval.py",
    "init_released_config": "read by train.py",
    "new_head": "test_weights.test_a_new_head",
}
"""Options that do not configure `MultiScaleViT` -> their tests."""


def test_every_option_has_an_entry():
    assert STAGE_OPTIONS.keys() == {field.name for field in dataclasses.fields(StageConfig)}
    assert {*MODEL_OPTIONS, *ELSEWHERE} == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("option", STAGE_OPTIONS)
def test_option_of_a_stage(option):
    index, value, configured, before, after = STAGE_OPTIONS[option]
    assert value != getattr(STAGES[index], option)
    assert before != after
    assert configured(model_from_config(BASE)) == before
    model = build_stage(index, **{option: value})
    assert configured(model) == after
    side = model.img_size[0]
    assert model(torch.randn(1, 3, side, side)).shape == (1, 5)


@pytest.mark.parametrize("option", MODEL_OPTIONS)
def test_option_of_a_model(option):
    value, configured, before, after = MODEL_OPTIONS[option]
    base = BASE
    if option == "stage_globals":  # needs the same number of global tokens in all stages
        base = dataclasses.replace(BASE, global_tokens=1)
    assert value != getattr(base, option)
    assert before != after
    assert configured(model_from_config(base)) == before
    model = model_from_config(dataclasses.replace(base, **{option: value}))
    assert configured(model) == after
    assert model(torch.randn(1, model.in_chans, *model.img_size)).shape == (1, model.num_classes)


def test_create_model_takes_every_option_of_a_model():
    for option, (value, configured, _, after) in MODEL_OPTIONS.items():
        options = {"stages": STAGES, "image_size": 32, "num_classes": 5, option: value}
        if option == "stage_globals":
            options["global_tokens"] = 1
        assert configured(vil.create_model("vil", **options)) == after, option


def test_name_selects_the_sizes():
    assert [stage.dim for stage in resolve_stages(ModelConfig("vil_tiny"))] == [48, 96, 192, 384]
    assert [stage.dim for stage in resolve_stages(ModelConfig("vil_small"))] == [96, 192, 384, 768]


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="windows: unknown key; did you mean window"):
        vil.create_model("vil_tiny", windows=3)
