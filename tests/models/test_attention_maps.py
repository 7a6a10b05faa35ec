"""`MultiScaleViT.attention_maps` and `attention_rollout`, and the sheet that training logs."""

import numpy as np
import pytest
import timm
import torch

import vil
from vil.config import ModelConfig, StageConfig
from vil.models.attention_image import GAP_WIDTH, PANEL_HEIGHT, QUERY, attention_sheet
from vil.models.attention_maps import ROLLOUT_ROWS
from vil.models.multiscale_vit import MultiScaleViT

STAGES = [
    StageConfig(dim=8, heads=2, patch=4, window=3, global_tokens=2, blocks=2),
    StageConfig(dim=16, heads=4, attention="full", global_tokens=1, blocks=3),
    StageConfig(dim=16, heads=2, attention="full", global_tokens=0),
]
IMAGE = (38, 45)  # maps of 9 × 11, 4 × 5 and 2 × 2; some pixels fill no patch


def build(stages=STAGES, **options):
    torch.manual_seed(0)
    config = ModelConfig(name="vil", stages=stages, num_classes=3, **options)
    model = MultiScaleViT(config, IMAGE)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(count=2, channels=3):
    return torch.randn(count, channels, *IMAGE, generator=torch.Generator().manual_seed(1))


def test_queries_are_pixels():
    maps = build().attention_maps(images(), [(0, 0), (37, 44), (16, 31)])
    assert [len(blocks) for blocks in maps] == [2, 3, 1]
    expected = [((0, 0), (8, 10), (4, 7)), ((0, 0), (3, 4), (2, 3)), ((0, 0), (1, 1), (1, 1))]
    for number, (blocks, queries) in enumerate(zip(maps, expected)):
        for place, block in enumerate(blocks):
            assert (block.stage, block.block, block.queries) == (number, place, queries)
            assert block.patch == (4, 8, 16)[number]
            heads, globals_ = STAGES[number].heads, STAGES[number].global_tokens
            assert block.from_queries.to_map.shape == (2, heads, 3, *block.size)
            assert block.from_queries.to_globals.shape == (2, heads, 3, globals_)
            assert block.from_globals.to_map.shape == (2, heads, globals_, *block.size)
            assert block.from_globals.seen.all()
    assert maps[0][0].from_queries.seen[1].nonzero().min(dim=0).values.tolist() == [3, 6]  # its corner
    middle = build().attention_maps(images())
    assert [blocks[0].queries for blocks in middle] == [((4, 5),), ((2, 2),), ((1, 1),)]
    assert len(build().attention_maps(images(1), "all")[1][0].queries) == 20


def test_weights_are_those_of_the_forward_pass():
    """From the maps of all queries, a block's attention is computed again as its module computed it."""
    model, x = build(), images()
    outputs = []
    block = model.stages[1].blocks[1]
    hook = block.attn.register_forward_hook(lambda module, given, output: outputs.append((given[0], output)))
    with torch.no_grad():
        model(x)
    hook.remove()
    tokens, expected = outputs[0]
    found = model.attention_maps(x, "all")[1][1]
    weights = [
        torch.cat([part.to_globals, part.to_map.flatten(-2)], dim=-1)
        for part in (found.from_globals, found.from_queries)
    ]
    values = block.attn.split_heads_many(block.attn.query_key_value(tokens), 3)[2]
    again = block.attn.projection(block.attn.merge_heads(torch.cat(weights, dim=2) @ values))
    assert torch.allclose(again, expected, atol=1e-5)


def test_model_is_unchanged():
    model, x = build(drop_path=0.5, attention_dropout=0.5, neighbors="random"), images()
    before = model.attention_maps(x)[2][0].from_queries.to_map
    model.train()
    model.stages[1].eval()  # as for frozen stages
    assert torch.equal(model.attention_maps(x)[2][0].from_queries.to_map, before)
    assert [stage.training for stage in model.stages] == [True, False, True]
    assert not any(block.attn._forward_pre_hooks for stage in model.stages for block in stage.blocks)
    with pytest.raises(ValueError, match="smaller than a patch"):
        model.attention_maps(torch.zeros(1, 3, 2, 2))
    assert not any(block.attn._forward_pre_hooks for stage in model.stages for block in stage.blocks)


@pytest.mark.parametrize("queries", [[(0, 45)], [(38, 0)], [(-1, 0)], "some"])
def test_queries_outside(queries):
    with pytest.raises(ValueError, match=r"outside the images of 38×45|positions \(row, column\)"):
        build().attention_maps(images(), queries)


def test_external_tokens_are_global_tokens():
    stages = [StageConfig(dim=8, heads=2, patch=4, window=3, global_tokens=1),
              StageConfig(dim=8, heads=2, window=3, global_tokens=1)]  # fmt: skip
    model = build(stages, stage_globals="carry")
    maps = model.attention_maps(images(), [(0, 0)], global_tokens=torch.randn(2, 4, 8))
    assert all(blocks[0].from_queries.to_globals.shape[-1] == 5 for blocks in maps)


def naive_rollout(model, x, stage):
    """Abnar & Zuidema's product of the normalized (A + I), as full matrices."""
    product = None
    for block in model.attention_maps(x, "all")[stage]:
        parts = (block.from_globals, block.from_queries)
        weights = torch.cat([torch.cat([p.to_globals, p.to_map.flatten(-2)], -1) for p in parts], dim=2)
        mixing = weights.mean(dim=1) + torch.eye(weights.shape[-1])
        mixing = mixing / mixing.sum(-1, keepdim=True)
        product = mixing if product is None else mixing @ product
    return product


@pytest.mark.parametrize("mask", ["chunk", "cyclic"])
def test_rollout(monkeypatch, mask):
    monkeypatch.setattr("vil.models.attention_maps.ROLLOUT_ROWS", 7)  # in many parts
    assert ROLLOUT_ROWS > 7
    model, x = build(mask=mask), images()
    found = model.attention_rollout(x, [(0, 0), (20, 30)])
    for number in range(2):
        expected, part = naive_rollout(model, x, number), found[number]
        globals_, columns = STAGES[number].global_tokens, part.size[1]
        places = [globals_ + row * columns + column for row, column in part.queries]
        for weights, rows in ((part.from_queries, places), (part.from_globals, [*range(globals_)])):
            flat = torch.cat([weights.to_globals, weights.to_map.flatten(-2)], dim=-1)[:, 0]
            assert torch.allclose(flat, expected[:, rows], atol=1e-6)
            assert torch.allclose(flat.sum(-1), torch.ones(()), atol=1e-5)
    # Through two blocks a corner reaches what its window's corners see, and by the global tokens everything.
    assert found[0].from_queries.seen.all()


def test_rollout_with_another_default_dtype():
    model, x = build(), images()
    expected = model.attention_rollout(x)[0].from_queries.to_map
    torch.set_default_dtype(torch.float64)
    try:
        found = model.attention_rollout(x)[0].from_queries.to_map
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_attentions_without_rollout():
    stages = [StageConfig(dim=8, heads=2, patch=4, attention="linformer", projected_tokens=4),
              StageConfig(dim=8, heads=2, attention="spatial_reduction", reduction=2),
              StageConfig(dim=8, heads=2, attention="performer", random_features=8),
              StageConfig(dim=8, heads=2, blocks=0)]  # fmt: skip
    model = build(stages)
    assert [rollout is None for rollout in model.attention_rollout(images())] == [True, True, False, True]
    assert [len(blocks) for blocks in model.attention_maps(images())] == [1, 1, 1, 0]
    sheet = attention_sheet(model, images(), (0.5,) * 3, (0.5,) * 3)
    width = round(PANEL_HEIGHT * IMAGE[1] / IMAGE[0])
    assert sheet.shape == (
        3,
        2 * PANEL_HEIGHT + GAP_WIDTH,
        5 * width + 4 * GAP_WIDTH,
    )  # nothing of linformer, and of no blocks


def test_sheet():
    model, mean, std = build(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    pixels = torch.rand(5, 3, *IMAGE, generator=torch.Generator().manual_seed(2))
    x = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    sheet = attention_sheet(model.train(), x, mean, std)
    width = round(PANEL_HEIGHT * IMAGE[1] / IMAGE[0])
    assert sheet.dtype == torch.uint8
    assert sheet.shape == (
        3,
        4 * PANEL_HEIGHT + 3 * GAP_WIDTH,
        6 * width + 5 * GAP_WIDTH,
    )  # four images; no tokens in stage 3
    assert model.training
    # The image itself is the first panel, and the query's box stands where the middle of the image is.
    means = sheet[:, :PANEL_HEIGHT, :width].float().mean(dim=(1, 2)) / 255
    assert torch.allclose(means, pixels[0].mean(dim=(1, 2)), atol=0.01)
    start = 2 * (width + GAP_WIDTH)
    panel = sheet[:, :PANEL_HEIGHT, start : start + width].permute(1, 2, 0)
    blue = (panel == QUERY[:, 0].mul(255).round().byte()).all(dim=-1).nonzero()
    scale = PANEL_HEIGHT / IMAGE[0]
    assert blue.min(dim=0).values.tolist() == [
        pytest.approx(4 * 4 * scale, abs=2),
        pytest.approx(5 * 4 * scale, abs=2),
    ]
    assert blue.max(dim=0).values.tolist() == [
        pytest.approx(5 * 4 * scale, abs=2),
        pytest.approx(6 * 4 * scale, abs=2),
    ]


def test_sheet_shows_the_largest_weight():
    stage = StageConfig(dim=8, heads=2, patch=4, attention="full", position="absolute", global_tokens=1)
    model = build([stage])
    picture = torch.zeros(1, 3, *IMAGE)
    maps = model.attention_maps(picture)[0][0].from_globals.to_map[0].mean(dim=(0, 1))
    row, column = divmod(int(maps.argmax()), maps.shape[1])
    sheet = attention_sheet(model, picture, (0.0,) * 3, (1.0,) * 3).float().sum(dim=0)
    width = round(PANEL_HEIGHT * IMAGE[1] / IMAGE[0])
    panel = sheet[:, width + GAP_WIDTH : 2 * width + GAP_WIDTH].numpy()
    brightest = np.argwhere(panel == panel.max()).mean(axis=0) / PANEL_HEIGHT * IMAGE[0] / 4
    assert brightest.tolist() == [pytest.approx(row + 0.5, abs=0.2), pytest.approx(column + 0.5, abs=0.2)]


def test_sheet_of_grayscale_images_and_other_models():
    gray = build(in_chans=1)
    assert attention_sheet(gray, images(1, 1), (0.5,) * 3, (0.5,) * 3).shape[0] == 3
    other = timm.create_model("resnet10t", num_classes=2)
    with pytest.raises(ValueError, match=r"^attention maps need a MultiScaleViT, got ResNet$"):
        attention_sheet(other, images(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="at least one image"):
        attention_sheet(gray, images(0, 1), (0.5,), (0.5,))


def test_maps_of_a_zoo_model():
    model = vil.create_model("vil_tiny", image_size=64, num_classes=2, blocks=(1, 1, 1, 1))
    assert [blocks[0].size for blocks in model.attention_maps(torch.zeros(1, 3, 64, 64))] == [
        (16, 16), (8, 8), (4, 4), (2, 2),
    ]  # fmt: skip
