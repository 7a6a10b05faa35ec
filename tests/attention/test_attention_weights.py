"""Attention weights: they sum to 1, reproduce the output, and are nonzero within the mask only."""

import pytest
import torch
from helpers.attention_builder import build_attention
from torch.nn import functional as F

from vil.attention import ATTENTIONS
from vil.attention.global_only import GlobalMemoryAttention
from vil.attention.local.dense import dense_bias
from vil.attention.local.geometry import Inputs, LocalAttentionSpec

SIZE = (7, 10)  # windows of 3 divide neither side
DIM, HEADS = 12, 3
LOCAL = [
    {"mask": "chunk"}, {"mask": "exact"}, {"mask": "cyclic"}, {"mask": "chunk", "neighbors": "self"},
    {"mask": "chunk", "neighbors": "random"}, {"mask": "cyclic", "share_global_projection": False},
]  # fmt: skip
CASES = [
    *[("vision_longformer", options) for options in LOCAL],
    ("vision_longformer", {"position": "absolute"}),
    ("full", {}), ("full", {"position": "absolute"}), ("global_only", {}), ("linformer", {}),
    ("linformer", {"share_key_value_projection": False}), ("performer", {}), ("spatial_reduction", {}),
]  # fmt: skip


def test_every_attention_has_a_case():
    assert {name for name, _ in CASES} == ATTENTIONS.keys()


def build(name, global_tokens, size=SIZE, **options):
    options = {"window": 3, "projected_tokens": 8, "random_features": 16, "reduction": 3, **options}
    attention = build_attention(name, size, dim=DIM, heads=HEADS, global_tokens=global_tokens, **options)
    for key, parameter in attention.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "bias" in key else DIM**-0.5)  # biases that matter
    return attention.eval().double()


def tokens(attention, outside=0, size=SIZE):
    count = attention.global_tokens + outside + size[0] * size[1]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)


def values(attention, x, globals_):
    """Return values (B, h, keys, D) of local queries, in the order of their weights; padding has none."""
    name = next(name for name, kind in ATTENTIONS.items() if type(attention) is kind)
    if name in ("full", "performer"):
        return attention.split_heads_many(attention.query_key_value(x), 3)[2]
    if name == "linformer":
        mixture = attention.key_mixture if attention.value_mixture is None else attention.value_mixture
        return attention.split_heads(mixture.t() @ attention.key_value(x)[..., DIM:])
    if name == "spatial_reduction":
        grid = attention.reduce(x[:, globals_:].transpose(1, 2).unflatten(2, SIZE)).flatten(2)
        grid = (grid - grid.mean(-1, keepdim=True)) / (grid.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        x = torch.cat([x[:, :globals_], grid.transpose(1, 2)], dim=1)
    return attention.split_heads(attention.key_value(x)[..., DIM:])


@pytest.mark.parametrize("outside", [0, 2])
@pytest.mark.parametrize("global_tokens", [0, 1, 3])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_weights_sum_to_one_and_reproduce_the_output(name, options, global_tokens, outside):
    if (name == "global_only" and not global_tokens) or (name == "linformer" and outside):
        pytest.skip("is refused")
    attention = build(name, global_tokens, **options)
    if not global_tokens and outside and not getattr(attention, "shares_projection", True):
        pytest.skip("no projections of their own")
    x, globals_ = tokens(attention, outside), global_tokens + outside
    corners = [globals_ + place for place in (0, 9, 34, 60, 69)]
    queries = torch.tensor([*corners[:2], *reversed(range(globals_)), *corners[2:]])
    with torch.no_grad():
        weights = attention.attention_weights(x, SIZE, queries)
        flat = torch.cat([weights.to_globals, weights.to_map.flatten(-2)], dim=-1)  # (B, h, n, keys)
        assert (flat >= 0).all()
        total = flat.sum(-1) + weights.to_rest.sum(-1)
        assert torch.allclose(total, torch.ones_like(total))
        seen = weights.seen.flatten(1)  # (n, positions)
        assert not flat[..., weights.to_globals.shape[-1] :].masked_select(~seen).any()

        expected = attention(x, SIZE)[:, queries]
        if name == "linformer":
            flat = weights.to_rest
        flat = flat.to(x.dtype)
        output = attention.merge_heads(flat @ values(attention, x, globals_))
        is_global = queries < globals_
        found = attention.projection(output)
        if isinstance(attention, GlobalMemoryAttention) and not attention.shares_projection:
            own = attention.split_heads(attention.global_key_value(x)[..., DIM:])
            memory = attention.global_projection(attention.merge_heads(flat[:, :, is_global] @ own))
            found[:, is_global] = memory
        # The kernels' own output; performer computes in float32.
        tolerance = 1e-5 if name == "performer" else 1e-9
        assert torch.allclose(found, expected, atol=tolerance), (found - expected).abs().max()


def seen_along(length, mask, neighbors="all", w=3):
    """Return a mask (length, length) of the keys that a query sees along one axis, by counting."""
    found = torch.zeros(length, length, dtype=torch.bool)
    chunks = -(-length // w)
    for query in range(length):
        for key in range(length):
            apart = key // w - query // w
            if neighbors == "self":
                found[query, key] = apart == 0
            elif mask == "cyclic":
                found[query, key] = apart % chunks in (0, 1, chunks - 1)
            else:
                found[query, key] = abs(apart) <= 1 and (mask == "chunk" or abs(key - query) <= w)
    return found


@pytest.mark.parametrize("size", [(7, 10), (15, 12), (2, 3)])
@pytest.mark.parametrize(
    ("mask", "neighbors"), [("chunk", "all"), ("exact", "all"), ("cyclic", "all"), ("chunk", "self")]
)
def test_nonzero_weights_match_the_mask(mask, neighbors, size):
    """At borders and corners, and everywhere else."""
    attention = build("vision_longformer", 1, size, mask=mask, neighbors=neighbors)
    locals_ = size[0] * size[1]
    with torch.no_grad():
        weights = attention.attention_weights(
            tokens(attention, size=size), size, torch.arange(1, 1 + locals_)
        )
    rows, columns = (seen_along(length, mask, neighbors) for length in size)
    expected = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)  # (N, H, W)
    assert torch.equal(weights.seen, expected)
    assert torch.equal(weights.to_map > 0, expected.expand_as(weights.to_map))
    # The padding shows in the cyclic mask alone, to the chunks that look back over the edge.
    padded = [length % 3 > 0 for length in size]
    first = torch.arange(locals_).view(size)
    looks_back = ((first // size[1] < 3) & padded[0]) | ((first % size[1] < 3) & padded[1])
    if mask == "cyclic":
        assert torch.equal(weights.to_rest[0, 0, :, 0] > 0, looks_back.flatten())
    else:
        assert weights.to_rest.shape[-1] == 0


def test_global_tokens_attend_to_all_and_global_only_to_globals():
    attention = build("global_only", 2)
    weights = attention.attention_weights(tokens(attention), SIZE, torch.tensor([0, 5]))
    assert weights.seen.flatten(1).all(dim=1).tolist() == [True, False]
    assert not weights.seen[1].any()


def test_cells_of_the_spatial_reduction():
    attention = build("spatial_reduction", 1)
    weights = attention.attention_weights(tokens(attention), SIZE, torch.arange(4))
    assert (weights.cell, weights.to_map.shape) == (3, (2, HEADS, 4, 2, 3))  # 7 // 3, 10 // 3
    mixtures = build("linformer", 1).attention_weights(tokens(build("linformer", 1)), SIZE, torch.arange(4))
    assert (mixtures.has_positions, mixtures.to_rest.shape[-1]) == (False, 8)


def test_bias_of_selected_queries_equals_rows_of_the_full_bias():
    """`dense_bias`, the definition, returns the same rows for some queries as for all."""
    tensors = [torch.randn(1, 2, 70, 4) for _ in range(3)]
    inputs = Inputs(*tensors, *[torch.randn(1, 2, 1, 4)] * 2, torch.randn(2, 11, 11))
    for mask in ("chunk", "exact", "cyclic"):
        some = torch.tensor([69, 0, 33])
        window = LocalAttentionSpec(SIZE, 3, mask)
        assert torch.equal(dense_bias(inputs, window, some), dense_bias(inputs, window)[:, some])


def test_weights_ignore_dropout_and_random_shift():
    attention = build("vision_longformer", 1, neighbors="random", attention_dropout=0.5)
    x, queries = tokens(attention), torch.arange(5)
    evaluated = attention.attention_weights(x, SIZE, queries)
    assert torch.equal(attention.train().attention_weights(x, SIZE, queries).to_map, evaluated.to_map)


def test_half_precision_of_autocast():
    attention = build("vision_longformer", 2, mask="cyclic").float()
    x = tokens(attention).float()
    exact = attention.attention_weights(x, SIZE, torch.arange(20))
    with torch.autocast("cpu", torch.bfloat16):
        rough = attention.attention_weights(x, SIZE, torch.arange(20))
    assert F.l1_loss(rough.to_map.float(), exact.to_map) < 0.01
