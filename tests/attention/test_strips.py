"""The layout of keys for `chunked`: the slice of a chunk contains its visible keys, and copies are few."""

import itertools

import pytest
import torch
from helpers.local_inputs import largest_difference, make_inputs, run

from vil.attention.local import chunked, local_attention
from vil.attention.local.geometry import LocalAttentionSpec, key_ranges
from vil.attention.local.strips import strips

SIZES = [(12, 12), (13, 10), (10, 13), (4, 4), (3, 21), (21, 3), (8, 9)]
NEIGHBORS = [("all", None), ("self", None), *[("one", number) for number in range(8)]]


@pytest.mark.parametrize("globals_", [0, 1, 5])
@pytest.mark.parametrize(("neighbors", "neighbor"), NEIGHBORS)
@pytest.mark.parametrize("mask", ["chunk", "cyclic"])
@pytest.mark.parametrize("size", SIZES)
def test_each_chunk_has_each_key_once(size, mask, neighbors, neighbor, globals_):
    spec = LocalAttentionSpec(size, 4, mask, neighbors)
    seen = spec.chunk_offsets(neighbor)
    steps = [((-1, 0, 1), (-1, 0, 1))] if neighbors == "all" else [((r,), (c,)) for r, c in seen]
    met = torch.zeros(size, dtype=torch.int)
    for strip in strips(spec, seen, globals_, 2, 10**6):
        assert 1 <= strip.count <= 2
        for row, chunk in enumerate(strip.chunks):
            columns = slice(strip.columns.start, strip.columns.stop + (strip.count - 1) * 4)
            met[chunk.rows, columns] += 1
            taken = list(range(chunk.global_key, chunk.global_key + globals_))
            for block in chunk.blocks:
                taken += range(block.keys.start, block.keys.stop)
            assert sorted(taken) == list(range(chunk.keys.stop - chunk.keys.start))
            inside = [at for at in strip.global_keys if chunk.keys.start <= at < chunk.keys.stop]
            assert not globals_ or inside == [chunk.keys.start + chunk.global_key]
            column = strip.columns.start // 4
            expected = sum(
                rows.length * columns.length
                for row_steps, column_steps in steps
                for rows, columns in itertools.product(
                    key_ranges(size[0], 4, mask, row, row_steps),
                    key_ranges(size[1], 4, mask, column, column_steps),
                )
            )
            assert len(taken) == globals_ + expected
    assert (met == 1).all()


def test_keys_are_copied_three_times():
    """A map of 8 × 8 chunks: nine chunks of keys for each of 64, less what is off the map, would be 484."""
    spec = LocalAttentionSpec((56, 56), 7)
    found = strips(spec, spec.chunk_offsets(None), 1, 2, 10**6)
    assert [strip.count for strip in found] == [1, 2, 2, 2, 1]
    local = sum(
        strip.count * (block.keys.stop - block.keys.start) for strip in found for block in strip.blocks
    )
    assert local == 22 * 8 * 49
    chunks = sum(
        strip.count * (chunk.keys.stop - chunk.keys.start) for strip in found for chunk in strip.chunks
    )
    assert chunks == 484 * 49 + 64


def test_strips_of_long_columns_are_narrow():
    """Working memory does not grow with the area of the map, even if chunks have few scores."""
    spec = LocalAttentionSpec((56, 56), 1, neighbors="self")
    found = strips(spec, spec.chunk_offsets(None), 256, 10**6, 50_000)
    assert {strip.length for strip in found} == {56 * 257}
    assert {strip.count for strip in found} == {3, 2}  # of 56


@pytest.mark.parametrize("scores", [1, 200, 1000, 3000, 10**6])
@pytest.mark.parametrize(
    ("mask", "neighbors"),
    [("chunk", "all"), ("cyclic", "all"), ("exact", "all"), ("chunk", "self"), ("cyclic", 2)],
)
def test_any_number_of_scores_at_once(monkeypatch, mask, neighbors, scores):
    """Few images and columns at a time, or all: the same numbers."""
    inputs = make_inputs((13, 22), 3, 2, bias=True, batch=3)
    options = {"size": (13, 22), "window": 3, "mask": mask, "neighbors": neighbors}
    expected = run(inputs, **options, backend="dense")
    monkeypatch.setattr(chunked, "MAX_SCORES", scores)
    found = run(inputs, **options, backend="chunked")
    assert largest_difference(found, expected) < 1e-10


def test_far_keys_are_hidden_in_blocks_of_the_kernel():
    """PyTorch's kernel takes 512 keys at a time; with this window some queries see none of the first."""
    inputs = make_inputs((45, 45), 15, 1, bias=True, batch=1, heads=1, head_dim=2)
    expected = run(inputs, size=(45, 45), window=15, mask="exact", backend="dense")
    found = run(inputs, size=(45, 45), window=15, mask="exact", backend="chunked")
    assert largest_difference(found, expected) < 1e-10


@pytest.mark.parametrize("scores", [100, 2000])
@pytest.mark.parametrize(("mask", "neighbors"), [("chunk", "all"), ("cyclic", "all"), ("chunk", 2)])
def test_gradients_are_those_of_the_weights_that_were_dropped(monkeypatch, mask, neighbors, scores):
    """Over several slices of images, strips and chunks, the backward pass draws what the forward did."""
    monkeypatch.setattr(chunked, "MAX_SCORES", scores)
    inputs = make_inputs((5, 7), 2, 1, bias=True, batch=2, heads=1, head_dim=2)

    def attend(*tensors):
        torch.manual_seed(0)
        return local_attention(
            **dict(zip(inputs, tensors)), size=(5, 7), window=2, mask=mask, neighbors=neighbors,
            dropout=0.3, backend="chunked",
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("has_fast_matmul", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_with_and_without_autocast(monkeypatch, dtype, bound, has_fast_matmul):
    """All gradients; and autocast changes nothing but the precision of queries, keys and values."""
    monkeypatch.setattr(chunked, "_has_fast_matmul", lambda *_: has_fast_matmul)
    exact = make_inputs((14, 10), 4, 1, bias=True, head_dim=16, dtype=torch.float32)
    half = {name: x.detach().to(dtype) if "bias" not in name else x.detach() for name, x in exact.items()}
    half = {name: x.requires_grad_() for name, x in half.items()}
    options = {"size": (14, 10), "window": 4}
    rounded = {name: x.detach().double().requires_grad_() for name, x in half.items()}
    expected = run(rounded, **options, backend="dense")
    found = run(half, **options, backend="chunked")
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < bound * b.abs().max()
    with torch.autocast("cpu", dtype), torch.no_grad():
        output = local_attention(**exact, **options, backend="chunked")
    assert torch.equal(output, found[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpus_without_half_precision_products_compute_in_float32(monkeypatch, dtype, dropout):
    """Outputs and gradients are those of float32, rounded once."""
    monkeypatch.setattr(chunked, "_has_fast_matmul", lambda _, dtype: dtype == torch.float32)
    single = make_inputs((13, 10), 4, 1, bias=True, head_dim=8, dtype=torch.float32)
    half = {name: x.detach().to(dtype) if "bias" not in name else x.detach() for name, x in single.items()}
    results = []
    for tensors in (half, {name: x.float() for name, x in half.items()}):
        tensors = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        torch.manual_seed(0)
        output = local_attention(**tensors, size=(13, 10), window=4, dropout=dropout, backend="chunked")
        generator = torch.Generator().manual_seed(1)
        output.backward(torch.randn(output.shape, generator=generator).to(dtype).to(output.dtype))
        results.append([output, *(x.grad for x in tensors.values())])
    for rounded, exact in zip(*results, strict=True):
        assert torch.equal(rounded, exact.to(rounded.dtype))


@pytest.mark.parametrize("is_supported", [True, False])
def test_products_are_those_that_pytorch_has_instructions_for(monkeypatch, is_supported):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: not is_supported)
    assert chunked._has_fast_matmul(cpu, torch.bfloat16) == is_supported
    assert chunked._has_fast_matmul(cpu, torch.float16) != is_supported
    assert chunked._has_fast_matmul(cpu, torch.float32)
    assert chunked._has_fast_matmul(cpu, torch.float64)
    assert chunked._has_fast_matmul(gpu, torch.bfloat16)
