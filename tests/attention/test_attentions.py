"""The common contract of all attentions, and the specific behavior of each."""

from typing import get_args, get_type_hints

import pytest
import torch
from helpers.attention_builder import build_small_attention as build
from helpers.attention_builder import random_tokens as tokens
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vil.attention import ATTENTIONS
from vil.attention.local import BACKENDS
from vil.config import AttentionName, ModelConfig
from vil.errors import UserError
from vil.evaluation.cost import saved_bytes

ALL = sorted(ATTENTIONS)
SIZE = (6, 5)


def counted(attention, size):
    """Count the floating-point operations of one forward pass with torch's counter."""
    math = sdpa_kernel(SDPBackend.MATH)  # the fused kernels for CPUs have no formula there
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
        attention.eval()(tokens(attention, size, batch=1), size)
    return counter.get_total_flops()


def test_attention_names_equal_the_registry():
    assert set(get_args(AttentionName)) == set(ATTENTIONS)
    backend = get_type_hints(ModelConfig)["attention_backend"]
    assert set(get_args(backend)) == {"auto", *BACKENDS}


@pytest.mark.parametrize("name", ALL)
def test_keeps_the_shape_and_reaches_every_parameter(name):
    attention = build(name)
    x = tokens(attention)
    output = attention(x, SIZE)
    assert output.shape == x.shape
    output.square().sum().backward()
    for key, parameter in attention.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ALL)
def test_float64_is_not_rounded_to_float32(name):
    attention = build(name, size=(3, 4)).double()
    x = tokens(attention, (3, 4), batch=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention(x, (3, 4)), x, fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_the_meta_device(name):
    attention = build(name).to("meta")
    x = tokens(attention).to("meta")
    assert attention(x, SIZE).shape == x.shape


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_another_default_dtype(name, default_dtype):
    attention = build(name)
    attention.set_training_progress(1, 0)
    x = tokens(attention)
    assert x.dtype == attention(x, SIZE).dtype == default_dtype
    assert {parameter.dtype for parameter in attention.parameters()} == {default_dtype}


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_no_images(name):
    attention = build(name)
    x = tokens(attention)[:0].requires_grad_()
    output = attention(x, SIZE)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", sorted({*ALL} - {"linformer"}))  # which has a fixed number of tokens
def test_fewer_tokens_than_the_map_are_refused(name):
    attention = build(name)
    with pytest.raises(ValueError, match=r"^a 6×5 map has 30 tokens, got 29$"):
        attention(tokens(attention)[:, :29], SIZE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("option", ["attention_dropout", "dropout"])
def test_dropout_changes_training_and_not_evaluation(name, option):
    attention, without = build(name, **{option: 0.5}), build(name)
    x = tokens(attention)
    assert not torch.equal(attention.train()(x, SIZE), attention(x, SIZE))
    torch.testing.assert_close(attention.eval()(x, SIZE), without.eval()(x, SIZE), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(4, 4), (4, 6)])
def test_multiply_adds_agree_with_torchs_counter(name, size):
    """On a map that one window covers, where the dense backend computes no hidden keys."""
    if name == "vision_longformer" and size != (4, 4):
        pytest.skip("windows are square")
    attention = build(name, dim=32, heads=4, size=size, window=4, neighbors="self", attention_backend="dense")
    assert counted(attention, size) == 2 * attention.multiply_adds(size)


def test_separate_global_projections_agree_with_torchs_counter():
    for name in ("vision_longformer", "global_only"):
        attention = build(
            name, dim=32, heads=4, size=(4, 4), window=4, neighbors="self", attention_backend="dense",
            share_global_projection=False,
        )  # fmt: skip
        assert counted(attention, (4, 4)) == 2 * attention.multiply_adds((4, 4)), name


@pytest.mark.parametrize("name", ALL)
def test_heads_must_divide_the_width(name):
    with pytest.raises(UserError, match="heads: 5 heads do not divide the width 24"):
        build(name, heads=5)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("vision_longformer", {"mask": "exact", "neighbors": "random"}, "neighbors"),
        ("vision_longformer", {"attention_backend": "fast"}, "attention_backend"),
        ("spatial_reduction", {"reduction": 6}, "reduction"),
        ("global_only", {"global_tokens": 0}, "global_tokens"),
    ],
)
def test_impossible_options_name_their_key(name, options, key):
    with pytest.raises(UserError) as error:
        build(name, **options)
    assert error.value.location == key


@pytest.mark.parametrize("name", sorted(ATTENTIONS.keys() - {"linformer"}))
def test_another_map_at_run_time(name):
    attention = build(name)
    assert attention(tokens(attention, (9, 8)), (9, 8)).shape == (2, 74, 24)


def test_linformer_refuses_another_map():
    attention = build("linformer")
    with pytest.raises(ValueError, match="built for a map of 6×5 tokens, got 9×8"):
        attention(tokens(attention, (9, 8)), (9, 8))
    with pytest.raises(UserError, match="image_size: linformer attention has a fixed number of tokens"):
        attention.resize((9, 8))


def test_full_attention_is_softmax_attention_with_a_bias_per_offset():
    attention = build("full", size=(2, 3), global_tokens=1)
    x = tokens(attention, (2, 3))
    query, key, value = attention.query_key_value(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * 8**-0.5
    places = [(row, column) for row in range(2) for column in range(3)]
    bias, table = attention.global_bias, attention.bias_table
    for i in range(7):
        for j in range(7):
            if i == 0 or j == 0:
                added = (
                    (bias.among[:, 0, 0] if i == j else bias.to_local[:, 0])
                    if i == 0
                    else bias.from_local[:, 0]
                )
            else:
                (a, b), (c, d) = places[i - 1], places[j - 1]
                added = table[:, a - c + 1, b - d + 2]
            scores[:, :, i, j] = scores[:, :, i, j] + added
    expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, (2, 3)), attention.projection(expected))


def test_vil_with_masked_local_keys_equals_global_only():
    """With scores of local keys at −∞ (a bias of −1e9), only the global keys have weight."""
    window, memory = build("vision_longformer", heads=2), build("global_only", heads=2)
    memory.load_state_dict(
        {k: v for k, v in window.state_dict().items() if "bias_" not in k and "global_b" not in k}
    )
    with torch.no_grad():
        window.bias_table.fill_(-1e9)
        for parameter in window.global_bias.parameters():
            parameter.zero_()
    x = tokens(window)
    torch.testing.assert_close(window(x, SIZE), memory(x, SIZE))


def test_random_shift_draws_all_eight_neighbors_in_training_only():
    attention = build("vision_longformer", neighbors="random")
    x = tokens(attention, batch=1)
    fixed = []
    for neighbor in range(8):
        attention.set_neighbors(neighbor)
        fixed.append(attention(x, SIZE))
    attention.set_neighbors("random")
    torch.manual_seed(0)
    outputs = [attention(x, SIZE) for _ in range(80)]
    drawn = [[torch.allclose(output, y) for y in fixed].index(True) for output in outputs]
    assert set(drawn) == set(range(8))
    attention.eval()
    every = attention(x, SIZE)
    attention.set_neighbors("all")
    assert torch.equal(every, attention(x, SIZE))
    attention.set_neighbors("self")
    assert not torch.equal(every, attention(x, SIZE))


def test_random_shift_is_the_same_when_recomputed():
    """Gradient checkpointing restores the generator: the backward pass sees the same neighbor."""
    attention = build("vision_longformer", neighbors="random")
    x = tokens(attention).requires_grad_()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        output = checkpoint(attention, x, SIZE, use_reentrant=False) if recompute else attention(x, SIZE)
        gradients.append(torch.autograd.grad(output.square().sum(), x)[0])
    assert torch.equal(*gradients)


def test_performer_features_approximate_the_exponential_kernel():
    """φ(q)·φ(k) is exp(q·k / √D) up to one factor per query, which the quotient cancels."""
    performer = build("performer", dim=8, heads=1, random_features=16384)
    query, key = torch.randn(2, 1, 1, 40, 8).clamp(-1, 1).unbind(0)
    features = performer._features(query, is_query=True), performer._features(key, is_query=False)
    near = features[0] @ features[1].transpose(-2, -1)
    exact = (query @ key.transpose(-2, -1) * 8**-0.5).exp()
    ratio = near / exact
    assert (ratio.std(dim=-1) / ratio.mean(dim=-1)).mean() < 0.15
    assert (exact.std(dim=-1) / exact.mean(dim=-1)).mean() > 0.4  # so a flat kernel would not pass


def redrawn_steps(attention, epoch, count):
    """Steps, counted from 0, before which the projection changes."""
    steps = []
    for step in range(count):
        before = attention.random_projection.clone()
        attention.set_training_progress(step, epoch)
        if not torch.equal(before, attention.random_projection):
            steps.append(step)
    return steps


def test_performer_redraws_orthogonal_rows_every_2_plus_5_epochs_steps():
    attention = build("performer", dim=24, heads=3, random_features=20)
    # As a counter does that starts at 0, rises with every step, and has the projection redrawn, and itself
    # set to 0 again, in a step that begins with it at 1 + 5·epoch.
    assert redrawn_steps(attention, 0, 8) == [1, 3, 5, 7]
    assert redrawn_steps(attention, 1, 22) == [6, 13, 20]
    assert redrawn_steps(attention, 3, 40) == [16, 33]
    block = F.normalize(attention.random_projection[:8], dim=1)
    torch.testing.assert_close(block @ block.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [4, 16])
def test_performer_kernel_estimates_have_no_bias(width):
    """E exp(w·u − |u|²/2) is 1 for every u; with Q as LAPACK signs it, it is not along ±(1, …, 1)."""
    performer = build("performer", dim=width, heads=1, random_features=4096)
    rows = []
    for _ in range(16):
        performer.redraw()
        rows.append(performer.random_projection.clone())
    generator = torch.Generator().manual_seed(2)
    directions = [torch.ones(width), -torch.ones(width), torch.eye(width)[0], -torch.eye(width)[-1]]
    directions += [torch.randn(width, generator=generator) for _ in range(4)]
    units = F.normalize(torch.stack(directions), dim=1)  # (directions, width)
    means = (torch.cat(rows) @ units.T - 0.5).exp().mean(dim=0)
    torch.testing.assert_close(means, torch.ones(8), atol=0.03, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_linformer_projections_start_uniform(shared):
    """In ±k^−½, as in the paper's code: its deviation is the bound over √3."""
    attention = build("linformer", size=(40, 40), projected_tokens=64, share_key_value_projection=shared)
    mixtures = [attention.key_mixture] if shared else [attention.key_mixture, attention.value_mixture]
    assert (attention.value_mixture is None) == shared
    for mixture in mixtures:
        assert 0.124 < mixture.abs().max() <= 0.125
        assert mixture.std().item() == pytest.approx(0.125 / 3**0.5, rel=0.02)
        assert mixture.mean().item() == pytest.approx(0, abs=2e-3)
        counts = torch.histc(mixture.detach(), 8, -0.125, 0.125) / mixture.numel()
        assert (counts - 1 / 8).abs().max() < 0.01


def test_spatial_reduction_works_down_to_a_single_key():
    attention = build("spatial_reduction", size=(4, 4), reduction=4)
    assert attention(tokens(attention, (4, 4)), (4, 4)).isfinite().all()


@pytest.mark.parametrize("name", sorted(ATTENTIONS.keys() - {"performer"}))
def test_evaluation_on_a_cpu_keeps_scores_in_the_fused_kernel(name):
    attention = build(name).eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        attention(tokens(attention), SIZE)
    called = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not called & {"aten::_softmax", "aten::_scaled_dot_product_attention_math"}


@pytest.mark.parametrize("backend", ["chunked"])
def test_training_memory_of_the_window_grows_linearly(backend):
    """Bytes kept for the backward pass at 28², 56² and 112²: biases by position, and a number per token."""
    kept = []
    for side in (28, 56, 112):
        attention = build("vision_longformer", dim=8, heads=1, size=(side, side), window=7, global_tokens=1,
                          attention_backend=backend)  # fmt: skip
        x = torch.zeros(1, 1 + side**2, 8, requires_grad=True)
        kept.append(saved_bytes(lambda m=attention, x=x, s=side: m(x, (s, s))))
    per_token = [(kept[i + 1] - kept[i]) / (3 * 28**2 * 4**i) for i in range(2)]
    assert max(per_token) / min(per_token) < 1.01
    dense = build(
        "vision_longformer",
        dim=8,
        heads=1,
        size=(28, 28),
        window=7,
        global_tokens=1,
        attention_backend="dense",
    )
    x = torch.zeros(1, 1 + 28**2, 8, requires_grad=True)
    assert (
        saved_bytes(lambda: dense(x, (28, 28))) / 28**2 > 2 * per_token[0]
    )  # so the measure does see growth
