"""The Triton kernels against the definition: values, all gradients, saved tensors, and unsupported calls.

On a machine without a GPU they run in Triton's interpreter, which is slow: maps are small.
"""

import itertools
import re

import pytest
import torch
import triton
import triton.language as tl
from helpers.local_inputs import largest_difference, make_inputs, run
from torch.utils.deterministic import fill_uninitialized_memory

from vil.attention.local import fused, kernels, local_attention
from vil.attention.local.fused import INTERPRETED
from vil.attention.local.geometry import Inputs, LocalAttentionSpec, OperatorInputs, operator_inputs
from vil.evaluation.cost import saved_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU and no interpreter"),
    # Of the interpreter: an overflow, or a sum that is no number, is a sign of what was read from nowhere.
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill uninitialized memory with NaN, so that missing writes are detected."""
    assert fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def compare(
    size, window, global_tokens, bias, head_dim, *, mask="chunk", neighbors="all", dtype=torch.float32, **rest
):
    """Return the largest difference of output or gradients from the definition in float64, relative to 1."""
    options = {"size": size, "window": window, "mask": mask, "neighbors": neighbors}
    inputs = make_inputs(size, window, global_tokens, bias, head_dim=head_dim, batch=1, device=DEVICE, **rest)
    expected = run(inputs, **options, backend="dense")
    narrow = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    worst = 0.0
    for ours, its in zip(run(narrow, **options, backend="fused"), expected):
        assert ours.isfinite().all()
        if its.numel():
            worst = max(worst, ((ours.double() - its).abs() / its.abs().clamp(min=1)).max().item())
    return worst


MASKS_AND_NEIGHBORS = [("exact", "all"), *itertools.product(["chunk", "cyclic"], ["all", "self", 0, 6])]
MAPS = [((4, 7), 3, 1, True), ((2, 3), 4, 0, True), ((5, 4), 2, 3, False)]
# Every mask with every neighbors, and each of both with every map; a GPU takes all there is of all three.
PAIRS = [
    ((mask, neighbors), map_)
    for (row, (mask, neighbors)), (column, map_) in itertools.product(
        enumerate(MASKS_AND_NEIGHBORS), enumerate(MAPS)
    )
    if DEVICE == "cuda" or mask == "exact" or (row + row // 5 + column) % 3 != 0
]


@pytest.mark.parametrize(("masking", "map_"), PAIRS)
def test_masks_neighbors_and_odd_sizes(masking, map_):
    size, window, global_tokens, bias = map_
    assert compare(size, window, global_tokens, bias, 8, mask=masking[0], neighbors=masking[1]) < 1e-4


@pytest.mark.parametrize(
    ("masking", "map_"), [(("exact", "all"), MAPS[0]), (("cyclic", 6), MAPS[2]), (("chunk", "all"), MAPS[1])]
)
def test_biases_in_the_accumulator(monkeypatch, masking, map_):
    """As on GPUs of compute capability 9 in half precision."""
    monkeypatch.setattr(fused, "_bias_in_accumulator", lambda *_: True)
    size, window, global_tokens, bias = map_
    assert compare(size, window, global_tokens, bias, 8, mask=masking[0], neighbors=masking[1]) < 1e-4


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((9, 0), True), ((10, 0), False)])
def test_where_biases_are_in_the_accumulator(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = torch.device("cuda")
    assert fused._bias_in_accumulator(gpu, torch.bfloat16) == expected
    assert not fused._bias_in_accumulator(gpu, torch.float32)
    assert fused.bias_factor(gpu, torch.float16, 64) == (8 if expected else fused.LOG2E)
    assert not fused._bias_in_accumulator(torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_biases_in_memory_are_more_exact_than_bfloat16(dtype):
    inputs = make_inputs((4, 4), 2, 1, True, head_dim=32, dtype=torch.float32)
    inputs = {name: tensor.detach().to(dtype) for name, tensor in inputs.items()}  # as of a converted model
    spec = LocalAttentionSpec((4, 4), 2)
    call = fused._KernelCall(operator_inputs(Inputs(**inputs), spec), spec)
    found = call.query_bias()[:, :, :37].double() / fused.LOG2E
    table, global_bias = (inputs[name].double() for name in ("bias_table", "global_bias"))
    index = torch.arange(2)[:, None] - torch.arange(6) + 5  # query − (key − 2) + 2·2 − 1
    local = table[:, index[:, None, :, None], index[None, :, None, :]].flatten(3).flatten(1, 2)
    expected = torch.cat([global_bias[:, None].expand(-1, 4, -1), local], dim=-1)
    bound = 2**-23 if dtype == torch.float32 else 2**-11
    assert ((found - expected).abs() <= bound * expected.abs() + 1e-7).all()


@pytest.mark.parametrize("head_dim", [8, 24, 32, 96, 128])
def test_head_widths(head_dim):
    assert compare((3, 4), 2, 1, True, head_dim, heads=1) < 1e-4


@pytest.mark.parametrize(("size", "window"), [((3, 2), 1), ((1, 1), 5), ((6, 7), 5), ((2, 10), 9)])
def test_windows(size, window):
    """A window of 9 has 81 tokens, more than a block of queries."""
    assert compare(size, window, 1, True, 8, heads=1) < 1e-4


@pytest.mark.parametrize("global_tokens", [0, 16, 17, 256])
def test_global_tokens(global_tokens):
    assert compare((3, 4), 2, global_tokens, True, 8, heads=1) < 1e-4


@pytest.mark.parametrize("num_parts", [1, 4, 7, 11])
def test_sums_over_several_chunks_and_images(monkeypatch, num_parts):
    """As with more chunks than programs: 3 × 2 chunks of 3 images, in parts of one or several."""
    monkeypatch.setattr(fused, "_num_parts", lambda programs, limit: min(num_parts, limit))
    inputs = make_inputs((5, 3), 2, 2, True, heads=1, head_dim=8, batch=3, device=DEVICE, dtype=torch.float32)
    options = {"size": (5, 3), "window": 2}
    found, expected = (run(inputs, **options, backend=backend) for backend in ("fused", "dense"))
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("bias", ["bias_table", "global_bias"])
def test_one_bias_without_the_other(bias):
    inputs = make_inputs((3, 4), 2, 2, True, head_dim=8, batch=1, device=DEVICE, dtype=torch.float32)
    del inputs[bias]
    options = {"size": (3, 4), "window": 2}
    for ours, its in zip(run(inputs, **options, backend="fused"), run(inputs, **options, backend="dense")):
        torch.testing.assert_close(ours, its, atol=1e-4, rtol=1e-4)


def test_a_neighbor_drawn_on_the_device_is_not_read_by_the_host():
    neighbor = torch.tensor([5], device=DEVICE)
    assert compare((4, 5), 3, 1, True, 8, neighbors=neighbor) < 1e-4


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter has no bfloat16")
        ),
    ],
)
def test_half_precision(dtype):
    """Sums are float32: the error is that of rounded inputs and outputs."""
    bound = {torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert compare((4, 5), 3, 1, True, 16, dtype=dtype) < bound


def test_heads_interleaved_with_tokens_as_in_projections():
    """(B, N, h, D) in memory, keys and values in one tensor; and a gradient without unit strides."""
    inputs = make_inputs((3, 2), 2, 1, False, head_dim=8, dtype=torch.float32, device=DEVICE)
    inputs["query"] = inputs["query"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    both = torch.stack([inputs["key"], inputs["value"]], dim=-1).detach()  # strides of 2 along the width
    inputs["key"], inputs["value"] = (x.requires_grad_() for x in both.unbind(-1))
    options = {"size": (3, 2), "window": 2}
    expected = run(inputs, **options, backend="dense")
    for ours, its in zip(run(inputs, **options, backend="fused"), expected):
        torch.testing.assert_close(ours, its, atol=1e-4, rtol=1e-4)
    output = local_attention(**inputs, **options, backend="fused")
    assert output.transpose(1, 2).is_contiguous()  # heads merge without a copy
    output.sum().backward()  # a gradient whose strides are all 0
    assert inputs["value"].grad.isfinite().all()


@pytest.mark.parametrize("name", ["value", "global_key"])
def test_keys_and_values_with_different_strides(name):
    inputs = make_inputs((3, 4), 2, 3, True, head_dim=8, dtype=torch.float32, device=DEVICE)
    inputs[name] = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    options = {"size": (3, 4), "window": 2}
    found, expected = (run(inputs, **options, backend=backend) for backend in ("fused", "dense"))
    assert largest_difference(found, expected) < 1e-4


def test_saved_tensors_may_return_with_other_strides():
    """For example from `save_on_cpu`, or any hook that makes them contiguous."""
    inputs = make_inputs((3, 4), 2, 1, bias=True, dtype=torch.float32, device=DEVICE, batch=1)
    expected = run(inputs, size=(3, 4), window=2, backend="dense")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        found = run(inputs, size=(3, 4), window=2, backend="fused")
    assert largest_difference(found, expected) < 1e-4


def test_global_biases_with_any_strides_and_of_any_size():
    """Large ones are rounded to half precision once, for the weights and for their gradients."""
    inputs = make_inputs((4, 4), 2, 3, bias=False, dtype=torch.float16, head_dim=16, device=DEVICE)
    bias = (8 * torch.arange(1.0, 7).view(3, 2)).to(DEVICE).t().requires_grad_()  # (heads, G), not contiguous
    inputs["global_bias"] = bias
    rounded = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = run(rounded, size=(4, 4), window=2, backend="dense")
    found = run(inputs, size=(4, 4), window=2, backend="fused")
    for a, b in zip(found, expected):
        assert (a.double() - b).abs().max() < 2e-2 * max(1, b.abs().max())


def test_neighbor_of_a_small_integer_type():
    inputs = make_inputs((5, 4), 2, 1, bias=True, dtype=torch.float32, device=DEVICE, batch=1, heads=1)
    options = {"size": (5, 4), "window": 2, "backend": "fused"}
    number = torch.tensor(1, dtype=torch.uint8, device=DEVICE)
    found = run(inputs, neighbors=number, **options)
    assert largest_difference(found, run(inputs, neighbors=1, **options)) == 0


@pytest.mark.parametrize("neighbors", ["all", "self", "one"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 8, 15])
def test_biases_are_padded_to_the_block_size(window, neighbors):
    """Kernels read whole blocks of keys, global ones in front, and one of them blocks of local keys alone."""
    for globals_, width in itertools.product((0, 1, 47, 63, 70, 256), (8, 64, 128)):
        tokens, memory = (torch.empty(1, 1, count, width, device="meta") for count in (35, globals_))
        number = torch.empty((), dtype=torch.int64, device="meta")
        call = fused._KernelCall(
            OperatorInputs(*[tokens] * 3, *[memory] * 2, neighbor=number if neighbors == "one" else None),
            LocalAttentionSpec((5, 7), window, "chunk", neighbors),
        )
        columns = call.hidden_keys().shape[1]
        blocks = -(-(globals_ + call.keys) // call.block_k)
        assert columns >= blocks * call.block_k
        assert columns >= globals_ + -(-call.keys // call.block_k) * call.block_k
        assert call.hidden_queries().shape[1] >= -(-call.keys // call.block_k) * call.block_k


def test_gradients_are_deterministic():
    inputs = make_inputs((5, 3), 3, 1, True, head_dim=8, dtype=torch.float32, device=DEVICE, batch=1)
    first, second = (run(inputs, size=(5, 3), window=3, backend="fused") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("backend", ["chunked", "fused"])
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_saved_for_the_backward_pass(backend, bias):
    """The inputs, with biases by position; with fused also the output and one number per query and head."""
    inputs = make_inputs((5, 4), 3, 2, bias, head_dim=8, dtype=torch.float32, device=DEVICE)
    kept = saved_bytes(lambda: local_attention(**inputs, size=(5, 4), window=3, backend=backend))
    expected = sum(tensor.numel() for name, tensor in inputs.items() if name != "bias_table") * 4
    if bias:
        expected += 2 * 3**2 * (3 * 3) ** 2 * 4  # heads, queries, keys
    if backend == "fused":
        expected += (inputs["query"].numel() + inputs["query"].numel() // 8) * 4
    assert kept == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 136}, "head width of 128 at most, got 136"),
        ({"global_tokens": 257}, "256 global tokens at most, got 257"),
        ({"dtype": torch.float64}, "the query is torch.float64"),
    ],
)
def test_unsupported_raises_by_name_and_falls_back_under_auto(change, message):
    arguments = {"head_dim": 8, "global_tokens": 1, "dtype": torch.float32, **change}
    inputs = make_inputs((2, 2), 2, bias=False, device=DEVICE, **arguments)
    with pytest.raises(ValueError, match=rf"fused backend.*{re.escape(message)}"):
        local_attention(**inputs, size=(2, 2), window=2, backend="fused")
    assert local_attention(**inputs, size=(2, 2), window=2).isfinite().all()


def test_no_dropout_in_the_kernel():
    inputs = make_inputs((2, 2), 2, 1, False, dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r"fused backend has no dropout of attention weights, got 0\.1"):
        local_attention(**inputs, size=(2, 2), window=2, dropout=0.1, backend="fused")
    assert local_attention(**inputs, size=(2, 2), window=2, dropout=0.1).isfinite().all()


@triton.jit
def bias_offsets(
    bias, offsets, heads, side, b_kind, b_head, row: tl.constexpr, window: tl.constexpr, block: tl.constexpr
):
    """Store the offsets of the biases that each program reads, (programs, block, block)."""
    tokens, chunk_row, chunk_column, _, head = kernels._program_block(heads, side, side, window, block)
    kinds = (1 << 3 * 4) + (2 << 3 * 3)  # of the second and the last of three chunks
    start = kernels._bias_pointer(
        bias, chunk_row, chunk_column, head, side, side, kinds, kinds, 3, b_kind, b_head
    )
    found = kernels._bias_pointers(start, 0, tokens, row, window, block).to(tl.int64) - bias.to(tl.int64)
    index = tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :]
    tl.store(offsets + tl.program_id(0) * block * block + index, found)


@pytest.mark.parametrize("row", [2**29 - 16, 2**30])  # the last of 4 rows begins below and beyond 2³¹
def test_offsets_of_biases_have_64_bits(row):
    """With three heads, the biases of windows of 48 and more have 2³¹ elements on some maps."""
    heads, side, window, block = 4, 3, 2, 16
    b_kind, b_head = 2**31 - 16, 2**30 + 16
    offsets = torch.zeros(heads * side * side, block, block, dtype=torch.int64, device=DEVICE)
    unused = torch.zeros(16, dtype=torch.int8, device=DEVICE)
    bias_offsets[(len(offsets),)](unused, offsets, heads, side, b_kind, b_head, row, window, block)
    head, kind = torch.arange(heads)[:, None], torch.arange(side * side)
    token = torch.arange(block).clamp(max=window**2 - 1)[:, None]
    expected = (kind * b_kind + head * b_head).view(-1, 1, 1) + token * row + torch.arange(block)
    assert expected.max() > 2**34
    assert torch.equal(offsets.cpu(), expected)
