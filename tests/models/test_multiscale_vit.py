"""The model: timm's contract, resolution, pooling, drop path, weight decay and layer groups."""

import pytest
import timm
import torch
from timm.models import group_parameters

import vil
from vil.config import ScheduleConfig, StageConfig
from vil.errors import UserError
from vil.evaluation.cost import saved_bytes
from vil.training.optimizer import parameter_groups

STAGES = [
    StageConfig(dim=16, heads=2, patch=4, window=2),
    StageConfig(dim=32, heads=4, patch=2, attention="full", blocks=2),
    StageConfig(dim=48, heads=4, patch=2, attention="full", global_tokens=0),
]


ALIKE = [StageConfig(dim=16, heads=2, patch=4, window=2), StageConfig(dim=32, heads=4, attention="full")]


def small(**options):
    torch.manual_seed(0)
    return vil.create_model("vil", **{"stages": STAGES, "image_size": 32, "num_classes": 5, **options})


def images(batch=2, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_structure_by_hand():
    """The forward pass, written out for one stage of full attention."""
    model = small(stages=[StageConfig(dim=16, heads=2, patch=8, attention="full")]).eval()
    x, stage = images(), model.stages[0]
    block = stage.blocks[0]
    tokens = stage.patch_embed.norm(stage.patch_embed.proj(x).flatten(2).transpose(1, 2))
    tokens = torch.cat([stage.global_tokens.expand(2, -1, -1), tokens], dim=1)
    tokens = tokens + block.attn(block.norm1(tokens), (4, 4))
    tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(model(x), model.head(model.norm(tokens).mean(dim=1)))
    assert model.norm.eps == block.norm1.eps == 1e-6


def test_initial_weights():
    model = small()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.bias.eq(0).all()
            assert module.weight.abs().max() < 0.2
            assert 0.01 < module.weight.std() < 0.03


def test_pooling():
    model = small(global_tokens=2).eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 2 + 4, 48)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(dim=1))
    model.reset_classifier(3, "token")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert model.forward_head(tokens).shape == (2, 3)
    assert model.get_classifier().out_features == model.num_classes == 3
    model.reset_classifier(0)
    torch.testing.assert_close(model(images()), tokens[:, 0])
    with pytest.raises(UserError, match="pool: cls needs a global token"):
        small().reset_classifier(3, "cls")


def test_feature_maps():
    model = small().eval()
    x = images()
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8), (2, 32, 4, 4), (2, 48, 2, 2)]
    torch.testing.assert_close(final, model.forward_features(x))
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed.flatten(2).transpose(1, 2), final)
    early, some = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert early.shape == (2, 1 + 16, 32)
    torch.testing.assert_close(some[1], maps[1])
    tokens, prefix = model.forward_intermediates(
        x, indices=[1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    assert (tokens.shape, prefix.shape) == ((2, 16, 32), (2, 1, 32))
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (-1,)])
def test_features_only_through_timm(out_indices):
    model = timm.create_model("vil_tiny", features_only=True, out_indices=out_indices, img_size=64)
    maps = model(images(1, 70, 100))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    for feature_map, reduction in zip(maps, model.feature_info.reduction()):
        assert feature_map.shape[2:] == (70 // reduction, 100 // reduction)


@pytest.mark.parametrize(
    ("stages", "expected"), [(STAGES, [0, 0.1, 0.2, 0.3]), (STAGES[:2], [0, 0.15, 0.3]), (ALIKE, [0, 0.3])]
)
def test_drop_path_rises_linearly_over_all_blocks(stages, expected):
    model = small(stages=stages, drop_path=0.3, pool="avg")
    for name in ("drop_path1", "drop_path2"):
        modules = [getattr(block, name) for stage in model.stages for block in stage.blocks]
        assert [getattr(m, "drop_prob", 0.0) for m in modules] == pytest.approx(expected)


def test_every_performer_redraws_its_projection_in_training():
    model = small(attention=["performer", "performer", "full"])
    projections = [value for name, value in model.named_buffers() if name.endswith("random_projection")]
    assert len(projections) == 3
    for step, epoch, is_redrawn in ((0, 0, False), (1, 0, True), (1, 1, False), (6, 1, True)):
        before = [projection.clone() for projection in projections]
        model.set_training_progress(step, epoch)
        changed = [not torch.equal(*pair) for pair in zip(projections, before)]
        assert changed == [is_redrawn] * 3, (step, epoch)


def test_pruning_keeps_what_the_intermediates_need():
    model = small()
    x = images()
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    pruned = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for ours, full in zip(pruned, expected):
        torch.testing.assert_close(ours, full)


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_other_resolutions(position):
    model = small(position=position).eval()
    x = images(2, 45, 60)
    at_run_time = model(x)
    assert at_run_time.shape == (2, 5)
    resized = small(position=position).eval()
    resized.set_input_size((45, 60))
    torch.testing.assert_close(resized(x), at_run_time)
    assert resized.img_size == (45, 60)
    with pytest.raises(UserError, match="image_size: 8×8 pixels are too few"):
        model.set_input_size(8)
    with pytest.raises(ValueError, match="smaller than a patch"):
        model(images(1, 8, 8))
    with pytest.raises(UserError, match="linformer attention has a fixed number of tokens"):
        small(attention=["linformer", "full", "full"]).set_input_size(64)


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_global_tokens_carried_across_stages(position):
    """Written out for two stages: the projected global tokens of the first are those of the second."""
    model = small(stages=ALIKE, global_tokens=2, stage_globals="carry", position=position).eval()
    first, second = model.stages
    assert (first.global_tokens.shape, second.global_tokens) == ((1, 2, 16), None)
    x = images()
    tokens, size = first(x)
    mapped = second.carry(tokens[:, :2])
    local, size = second.patch_embed(first.to_map(tokens, size))
    tokens = torch.cat([mapped, local], dim=1)
    if second.position is not None:
        tokens = second.position(tokens, size)
    expected = model.norm(second.blocks[0](tokens, size))
    torch.testing.assert_close(model.forward_features(x), expected)
    model(x).square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("position", ["relative", "absolute"])
@pytest.mark.parametrize(
    "attention", ["vision_longformer", "full", "performer", "spatial_reduction", "global_only"]
)
def test_external_global_tokens(position, attention):
    stages = [
        StageConfig(dim=16, heads=2, patch=4, window=2, attention=attention, reduction=2),
        StageConfig(dim=32, heads=4, attention="full"),
    ]
    model = small(stages=stages, stage_globals="carry", position=position).eval()
    x, outside = images(), torch.randn(2, 3, 16, requires_grad=True)
    tokens = model.forward_features(x, global_tokens=outside)
    assert tokens.shape == (2, 1 + 3 + 16, 32)
    assert not torch.allclose(tokens[:, 4:], model.forward_features(x)[:, 1:])  # the map has seen them
    assert model(x, global_tokens=outside).shape == (2, 5)
    maps, prefix = model.forward_intermediates(
        x, indices=1, return_prefix_tokens=True, intermediates_only=True, norm=True, global_tokens=outside
    )[0]
    torch.testing.assert_close(prefix, tokens[:, :4])
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens[:, 4:])
    tokens[:, 1:4].square().sum().backward()
    assert outside.grad.abs().sum() > 0
    none = torch.empty(2, 0, 16)
    torch.testing.assert_close(model(x, global_tokens=none), model(x))


def test_invalid_external_global_tokens():
    outside = torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="external global tokens need a model with stage_globals='carry'"):
        small()(images(), global_tokens=outside)
    carrying = small(stages=ALIKE, stage_globals="carry")
    with pytest.raises(ValueError, match=r"global_tokens must be \(2, any number, 16\), got \(2, 3, 8\)"):
        carrying(images(), global_tokens=outside[..., :8])
    with pytest.raises(
        UserError, match="stage_globals: carry needs the same number of global tokens in all stages"
    ):
        small(stage_globals="carry")
    with pytest.raises(UserError, match="stage_globals: expected one of discard, carry, got 'share'"):
        small(stage_globals="share")
    linformer = small(
        stages=[StageConfig(dim=16, heads=2, patch=4, attention="linformer", projected_tokens=4)]
    )
    with pytest.raises(
        ValueError, match="linformer attention has a fixed number of tokens, got 3 external ones"
    ):
        linformer(images(), global_tokens=outside)
    flat = small(stages=[StageConfig(dim=16, heads=2, patch=8, attention="full")])
    assert flat.forward_features(images(), global_tokens=outside).shape == (2, 1 + 3 + 16, 16)


def test_the_zoo_carries_as_many_tokens_as_its_first_stage():
    model = vil.create_model("vil_tiny", image_size=64, num_classes=5, stage_globals="carry")
    assert [stage.num_global_tokens for stage in model.stages] == [1, 1, 1, 1]
    plain = vil.create_model("vil_tiny", image_size=64, num_classes=5, global_tokens=1)
    widths = 48 * 96 + 96 * 192 + 192 * 384
    assert model.multiply_adds() - plain.multiply_adds() == widths


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    model = small(drop_path=0.5, neighbors="random")
    x = images()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        output = model(x)
        output.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append((output, gradients, saved_bytes(lambda: model(x))))
    torch.testing.assert_close(results[0][0], results[1][0])
    for plain, recomputed in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(plain, recomputed)
    assert results[1][2] < 0.5 * results[0][2]


def test_no_weight_decay_on_embeddings_tokens_and_bias_tables():
    relative, absolute = small().no_weight_decay(), small(position="absolute").no_weight_decay()
    assert "stages.0.blocks.0.attn.bias_table" in relative
    assert "stages.0.blocks.0.attn.global_bias.from_local" in relative
    assert {"stages.0.global_tokens", "stages.0.position.rows", "stages.1.position.columns"} <= absolute
    assert not [name for name in relative | absolute if "weight" in name or name.endswith(".bias")]


def test_layer_groups_follow_the_blocks():
    model = small()
    groups = group_parameters(model, model.group_matcher())
    assert list(groups) == sorted(groups)
    names = {name: group for group, members in groups.items() for name in members}
    assert len(names) == len(list(model.parameters()))
    order = [
        names[name]
        for name in ("stages.0.patch_embed.proj.weight", "stages.0.blocks.0.mlp.fc1.weight",
                     "stages.1.blocks.0.mlp.fc1.weight", "stages.1.blocks.1.mlp.fc1.weight",
                     "stages.2.blocks.0.mlp.fc1.weight", "head.weight")
    ]  # fmt: skip
    assert order == sorted(set(order))
    assert names["stages.1.blocks.1.mlp.fc1.weight"] < names["stages.2.patch_embed.proj.weight"]
    assert names["stages.2.patch_embed.proj.weight"] <= names["stages.2.blocks.0.mlp.fc1.weight"]


def test_layer_scale_multiplies_both_branches():
    model = small(stages=[StageConfig(dim=16, heads=2, patch=8, attention="full")], layer_scale=0.25).eval()
    block = model.stages[0].blocks[0]
    assert {name for name in model.state_dict() if "ls" in name} == {
        f"stages.0.blocks.0.ls{number}.gamma" for number in (1, 2)
    }
    torch.nn.init.normal_(block.ls1.gamma)
    tokens, size = torch.randn(2, 17, 16), (4, 4)
    after = tokens + block.ls1.gamma * block.attn(block.norm1(tokens), size)
    after = after + 0.25 * block.mlp(block.norm2(after))
    torch.testing.assert_close(block(tokens, size), after)


def test_layer_scale_has_the_layer_of_its_block_and_no_weight_decay():
    model = small(layer_scale=1e-4)
    schedule = ScheduleConfig(layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(model, schedule)
    found = {p: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for block in (block for stage in model.stages for block in stage.blocks):
        scale = found[block.mlp.fc1.weight][0]
        assert found[block.ls1.gamma] == found[block.ls2.gamma] == (scale, 0.0)


def test_compiles_without_graph_breaks():
    model = small(neighbors="random")
    explanation = torch._dynamo.explain(model)(images())
    assert explanation.graph_break_count == 0


def test_data_configuration_for_timm():
    config = timm.data.resolve_data_config(model=timm.create_model("vil_small", num_classes=0))
    assert config["input_size"] == (3, 224, 224)
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bicubic")


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_a_resize_keeps_parameters_frozen(position):
    model = small(position=position)
    model.stages[1].requires_grad_(False)
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.set_input_size(64, window_size=3)
    assert shapes != {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == expected


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_a_resize_to_the_same_size_keeps_the_parameters(position):
    """Those that an optimizer holds."""
    model = small(position=position)
    parameters = list(model.parameters())
    model.set_input_size(32, window_size=2)
    assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("pool", ["cls", "max"])
def test_a_head_with_a_pooling_that_fails_changes_nothing(pool):
    model = small().eval()
    expected = model(images())
    with pytest.raises(UserError, match=r"^pool: "):
        model.reset_classifier(7, pool)
    assert (model.num_classes, model.global_pool) == (expected.shape[1], "avg")
    assert torch.equal(model(images()), expected)


def test_a_resize_that_fails_changes_nothing():
    model = small(attention=["full", "linformer", "full"]).eval()
    expected = model(images())
    with pytest.raises(UserError, match="linformer attention has a fixed number of tokens"):
        model.set_input_size(64)
    assert model.img_size == (32, 32)
    assert torch.equal(model(images()), expected)
