"""The local attention: its definition against a loop over keys, every backend against the definition."""

import itertools
import math

import pytest
import torch
from helpers.local_inputs import largest_difference, make_inputs, run
from hypothesis import given, settings
from hypothesis import strategies as st

from vil.attention.local import BACKENDS, keys_per_query, local_attention
from vil.attention.local.gathered import gathered_attention

NEIGHBORS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def by_hand(inputs, batch, head, query_at, *, size, window, mask, neighbors):
    """Compute the output for one query in loops: the score of every appearance of every key, one softmax."""
    height, width = size
    rows, columns = -(-height // window), -(-width // window)
    query = inputs["query"][batch, head, query_at[0] * width + query_at[1]]
    scores, values = [], []
    for g in range(inputs["global_key"].shape[2]):
        bias = inputs["global_bias"][head, g] if "global_bias" in inputs else 0.0
        scores.append(query @ inputs["global_key"][batch, head, g] / math.sqrt(len(query)) + bias)
        values.append(inputs["global_value"][batch, head, g])
    own = (query_at[0] // window, query_at[1] // window)
    seen = {"all": [(0, 0), *NEIGHBORS], "self": [(0, 0)]}.get(neighbors) or [(0, 0), NEIGHBORS[neighbors]]
    for step in seen:
        appears = (own[0] + step[0], own[1] + step[1])
        real = appears
        if mask == "cyclic":
            real = (appears[0] % rows, appears[1] % columns)
        elif not (0 <= appears[0] < rows and 0 <= appears[1] < columns):
            continue
        for i, j in itertools.product(range(window), range(window)):
            row, column = real[0] * window + i, real[1] * window + j
            row_back = mask == "cyclic" and own[0] == 0 and step[0] == -1
            column_back = mask == "cyclic" and own[1] == 0 and step[1] == -1
            if (row >= height and not row_back) or (column >= width and not column_back):
                continue
            offset = (query_at[0] - (appears[0] * window + i), query_at[1] - (appears[1] * window + j))
            if mask == "exact" and max(map(abs, offset)) > window:
                continue
            if row < height and column < width:
                key = inputs["key"][batch, head, row * width + column]
                value = inputs["value"][batch, head, row * width + column]
            else:
                key = value = torch.zeros_like(query)
            bias = 0.0
            if "bias_table" in inputs:
                bias = inputs["bias_table"][head, offset[0] + 2 * window - 1, offset[1] + 2 * window - 1]
            scores.append(query @ key / math.sqrt(len(query)) + bias)
            values.append(value)
    return torch.stack(scores).softmax(dim=0) @ torch.stack(values)


@pytest.mark.parametrize(
    ("mask", "neighbors"),
    [("exact", "all"), *itertools.product(["chunk", "cyclic"], ["all", "self", 1, 6])],
)
@pytest.mark.parametrize(
    ("size", "window", "global_tokens"), [((5, 7), 2, 1), ((4, 4), 3, 0), ((3, 8), 4, 2), ((6, 6), 2, 1)]
)
def test_dense_backend_equals_the_papers_definition(mask, size, window, global_tokens, neighbors):
    inputs = make_inputs(size, window, global_tokens, bias=True)
    options = {"size": size, "window": window, "mask": mask, "neighbors": neighbors}
    output = local_attention(**inputs, **options, backend="dense")
    for row, column in itertools.product(range(size[0]), range(size[1])):
        expected = by_hand(inputs, 1, 1, (row, column), **options)
        torch.testing.assert_close(output[1, 1, row * size[1] + column], expected)


# The fused backend has tests of its own, test_fused.py: interpreted it is slow, and it has no float64.
PLAIN = ["dense", "chunked", "gathered"]


@pytest.fixture(autouse=True)
def _gathered_by_name(monkeypatch):
    """Make the backend of exported graphs, which users cannot select, selectable for tests."""
    monkeypatch.setitem(BACKENDS, "gathered", gathered_attention)


@pytest.mark.parametrize("backend", PLAIN[1:])
@pytest.mark.parametrize("mask", ["chunk", "exact", "cyclic"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (13, 29)])
@pytest.mark.parametrize("global_tokens", [0, 1, 4, 16])
def test_backends_equal_the_dense_backend(backend, mask, size, global_tokens):
    window, bias = 3, global_tokens != 1
    inputs = make_inputs(size, window, global_tokens, bias, dtype=torch.float32)
    for neighbors in ["all"] if mask == "exact" else ["all", "self", 4, torch.tensor([2])]:
        options = {"size": size, "window": window, "mask": mask, "neighbors": neighbors}
        expected = run(inputs, **options, backend="dense")
        for ours, its in zip(run(inputs, **options, backend=backend), expected):
            torch.testing.assert_close(ours, its, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    window=st.integers(1, 8),
    mask=st.sampled_from(["chunk", "exact", "cyclic"]),
    global_tokens=st.sampled_from([0, 1, 4, 16]),
    bias=st.booleans(),
    neighbors=st.sampled_from(["all", "self", *range(8)]),
    head_dim=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 2**31),
)
def test_backends_equal_the_dense_backend_for_random_shapes(
    size, window, mask, global_tokens, bias, neighbors, head_dim, seed
):
    inputs = make_inputs(size, window, global_tokens, bias, head_dim=head_dim, batch=1, seed=seed)
    options = {"size": size, "window": window, "mask": mask}
    options["neighbors"] = "all" if mask == "exact" else neighbors
    expected = run(inputs, **options, backend="dense")
    for backend in PLAIN[1:]:
        assert largest_difference(expected, run(inputs, **options, backend=backend)) < 1e-9


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("mask", ["chunk", "exact", "cyclic"])
def test_gradients_agree_with_finite_differences(backend, mask):
    inputs = make_inputs((3, 4), 2, 1, bias=True, heads=1, head_dim=2, batch=1)
    names = list(inputs)

    def function(*tensors):
        return local_attention(**dict(zip(names, tensors)), size=(3, 4), window=2, mask=mask, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("backend", PLAIN)
def test_dropout_preserves_the_mean(backend):
    inputs = make_inputs((4, 4), 2, 1, bias=False, dtype=torch.float32)
    inputs["value"] = torch.ones_like(inputs["value"])
    inputs["global_value"] = torch.ones_like(inputs["global_value"])
    torch.manual_seed(0)
    outputs = torch.stack(
        [local_attention(**inputs, size=(4, 4), window=2, dropout=0.5, backend=backend) for _ in range(200)]
    )
    assert outputs.std() > 0.1  # without dropout, weights sum to 1 and every output is 1
    assert abs(outputs.mean() - 1) < 0.02


@pytest.mark.parametrize("backend", PLAIN)
def test_half_precision_under_autocast(backend):
    inputs = make_inputs((7, 5), 3, 1, bias=True, dtype=torch.float32)
    expected = local_attention(**inputs, size=(7, 5), window=3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        halves = {k: v.bfloat16() if "bias" not in k else v for k, v in inputs.items()}
        output = local_attention(**halves, size=(7, 5), window=3, backend=backend)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "round"}, "mask must be one of chunk, exact, cyclic"),
        ({"window": 0}, "window must be at least 1"),
        ({"size": (4, 5)}, "4×5 map has 20 tokens, the query has 16"),
        ({"neighbors": "some"}, "neighbors must be all, self or a number"),
        ({"neighbors": 8}, "neighbors must be all, self or a number"),
        ({"mask": "exact", "neighbors": 3}, "exact mask is defined for all neighbors only"),
        ({"bias_table": torch.zeros(2, 3, 3)}, r"bias_table must be \(2, 7, 7\)"),
        ({"global_bias": torch.zeros(2, 3)}, r"global_bias must be \(2, 1\)"),
        ({"backend": "fast"}, "backend must be one of auto, dense, chunked, fused"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = make_inputs((4, 4), 2, 1, bias=False)
    with pytest.raises(ValueError, match=message):
        local_attention(**{**inputs, "size": (4, 4), "window": 2, **change})


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_a_batch_of_no_images(backend):
    tokens, memory = torch.zeros(0, 2, 49, 8, requires_grad=True), torch.zeros(0, 2, 1, 8)
    output = local_attention(tokens, tokens, tokens, memory, memory, size=(7, 7), window=3, backend=backend)
    output.sum().backward()
    assert output.shape == tokens.shape == tokens.grad.shape


def test_keys_per_query_are_the_papers():
    assert keys_per_query(7) == 441
    assert keys_per_query(7, "exact") == 225
    assert keys_per_query(7, neighbors="random") == 98
    assert keys_per_query(7, neighbors="self") == keys_per_query(7, neighbors=3) - 49 == 49
