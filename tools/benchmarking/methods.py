"""Ways to compute a local attention, or what would stand in its place: our backends and the baselines.

Legend: B batch, h heads, N = H·W local tokens, R × C chunks of t = w² tokens, s seen chunks, G global tokens,
D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.benchmarking.problem import Cost, Problem, leaves_of
from vil.attention.local import BACKENDS, local_attention
from vil.attention.local.geometry import STEPS, Inputs, Window, pad_to_chunks, window_bias


class UnavailableError(ValueError):
    """A method cannot do this; the text says why."""


@dataclass
class Prepared:
    """A method ready to run on tensors of its own layout.

    Attributes:
        forward: computes the output, (B, h, queries, D).
        leaves: what gradients are taken of.
        costs: of a forward and a backward pass, at least.
        restored: the output → (B, h, N, D) in the order of the map; None for a method that computes something
            else than the local attention.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    costs: tuple[Cost, Cost]
    restored: Callable[[Tensor], Tensor] | None = None


Method = Callable[[Problem, Inputs], Prepared]


# --- Ours ---------------------------------------------------------------------------------------------------


def _of_backend(name: str, problem: Problem, inputs: Inputs) -> Prepared:
    return _as_local_attention(partial(local_attention, backend=name), problem, inputs)


def _as_local_attention(function: Callable[..., Tensor], problem: Problem, inputs: Inputs) -> Prepared:
    """A function with the arguments of `local_attention`."""
    *tokens, table, bias, neighbor = inputs
    forward = partial(
        function, *tokens, size=problem.size, window=problem.window, mask=problem.mask,
        neighbors=problem.neighbors if neighbor is None else neighbor, bias_table=table, global_bias=bias,
    )  # fmt: skip
    return Prepared(forward, leaves_of(inputs), problem.costs(), lambda output: output)


# --- The paper's own way ------------------------------------------------------------------------------------


def sliding_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    mask: str = "chunk",
    neighbors: str | int | Tensor = "all",
    bias_table: Tensor | None = None,
    global_bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """The sliding-chunk method of the paper's implementation (appendix), as plain operators under autograd.

    The map is cut into chunks. For each chunk that is seen, the whole grid of keys is rolled to where the
    queries are and multiplied with them; the products are put side by side, beside those of the global keys,
    into one tensor of all scores, which the softmax turns into weights; the values are rolled and summed
    likewise. Arguments and result are those of `vil.attention.local.local_attention`, with `backend` ignored.
    """
    number = None if isinstance(neighbors, str) else int(neighbors)
    problem = Window(size, window, mask, "one" if number is not None else neighbors)  # type: ignore[arg-type]
    steps, globals_ = problem.seen(number), global_key.shape[2]
    query = _to_chunks(query * query.shape[-1] ** -0.5, size, window)  # (B, h, R, C, t, D)
    keys, values = _to_chunks(key, size, window), _to_chunks(value, size, window)
    products = [torch.einsum("bhrcqd,bhgd->bhrcqg", query, global_key)]
    products += [torch.einsum("bhrcqd,bhrckd->bhrcqk", query, _rolled(keys, step)) for step in steps]
    scores = torch.cat(products, dim=-1)  # (B, h, R, C, t, G + s·t)
    inputs = Inputs(query, key, value, global_key, global_value, bias_table, global_bias)
    bias = _bias_by_chunk(inputs, problem, steps)
    if bias is not None:
        scores += bias[:, None, None]
    scores.masked_fill_(_hidden(size, window, mask, steps, globals_, query.device), float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    of_globals, *of_chunks = weights.split([globals_, *[window**2] * len(steps)], dim=-1)
    output = torch.einsum("bhrcqg,bhgd->bhrcqd", of_globals, global_value)
    for part, step in zip(of_chunks, steps):
        output = output + torch.einsum("bhrcqk,bhrckd->bhrcqd", part, _rolled(values, step))
    return _from_chunks(output, size, window)


def _to_chunks(tokens: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """(B, h, N, D) → (B, h, R, C, t, D), zeros where the last chunks reach over the map."""
    divides = size[0] % window == 0 and size[1] % window == 0
    grid = tokens.unflatten(2, size) if divides else pad_to_chunks(tokens, size, window)
    grid = grid.unflatten(3, (-1, window)).unflatten(2, (-1, window))  # (B, h, R, w, C, w, D)
    return grid.transpose(3, 4).flatten(4, 5)


def _from_chunks(chunks: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """(B, h, R, C, t, D) → (B, h, N, D)."""
    grid = chunks.unflatten(4, (window, window)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return grid[:, :, : size[0], : size[1]].flatten(2, 3)


def _rolled(chunks: Tensor, step: tuple[int, int]) -> Tensor:
    """(B, h, R, C, t, D) with the chunk that is `step` away in the place of each chunk."""
    return chunks if step == (0, 0) else chunks.roll((-step[0], -step[1]), dims=(2, 3))


def _bias_by_chunk(inputs: Inputs, window: Window, steps: tuple[tuple[int, int], ...]) -> Tensor | None:
    """(h or 1, t, G + s·t): what is added to the scores; None where it is 0."""
    local, of_globals, side = window_bias(inputs, window), inputs.global_bias, window.side
    globals_ = inputs.global_key.shape[2]
    if local is None and of_globals is None:
        return None
    if local is None:
        local = inputs.query.new_zeros(1, side, side, 3 * side, 3 * side)
    by_chunk = local.unflatten(4, (3, side)).unflatten(3, (3, side))  # (h, w, w, 3, w, 3, w)
    by_chunk = by_chunk.transpose(4, 5).flatten(5).flatten(3, 4).flatten(1, 2)  # (h, t, 9, t)
    if len(steps) < len(STEPS):
        by_chunk = by_chunk[:, :, [STEPS.index(step) for step in steps]]
    if of_globals is None:
        of_globals = local.new_zeros(local.shape[0], globals_)
    heads = max(local.shape[0], of_globals.shape[0])
    parts = [of_globals[:, None].expand(heads, side**2, globals_), by_chunk.flatten(2).expand(heads, -1, -1)]
    return torch.cat(parts, dim=-1)


@lru_cache(maxsize=64)
def _hidden(
    size: tuple[int, int],
    window: int,
    mask: str,
    steps: tuple[tuple[int, int], ...],
    globals_: int,
    device: torch.device,
) -> Tensor:
    """(R, C, 1, G + s·t): which positions of the seen chunks are no keys."""
    rows, columns = (
        {step: _real(length, window, mask, step, device) for step in (-1, 0, 1)} for length in size
    )
    real = [rows[row][:, None, :, None] & columns[column][None, :, None, :] for row, column in steps]
    return F.pad(~torch.stack(real, dim=2).flatten(2), (globals_, 0))[:, :, None]


def _real(length: int, window: int, mask: str, step: int, device: torch.device) -> Tensor:
    """(chunks, w): along one axis, which positions of the chunk `step` further are keys."""
    chunks = -(-length // window)
    own = torch.arange(chunks, device=device)[:, None]
    real = (own + step) % chunks * window + torch.arange(window, device=device) < length
    if mask == "cyclic":  # looking back over the edge shows the padding of the last chunk
        return real | ((own == 0) & (step == -1))
    return real & (own + step >= 0) & (own + step < chunks)


def _sliding_chunk(problem: Problem, inputs: Inputs) -> Prepared:
    if isinstance(problem.neighbors, int):  # the paper's code draws on the host, which then does not wait
        inputs = inputs._replace(neighbor=None)
    return _as_local_attention(sliding_chunk_attention, problem, inputs)


# --- Other ways ---------------------------------------------------------------------------------------------


def _full(problem: Problem, inputs: Inputs) -> Prepared:
    """PyTorch's attention of all tokens to all tokens, without a bias: the cost without a window."""
    with torch.no_grad():
        query, key, value = (
            torch.cat([memory, tokens], dim=2).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for memory, tokens in (
                (inputs.global_key, inputs.query),
                (inputs.global_key, inputs.key),
                (inputs.global_value, inputs.value),
            )
        )
    tokens = problem.tokens + problem.global_tokens
    forward = partial(F.scaled_dot_product_attention, query, key, value)
    return Prepared(forward, [query, key, value], problem.costs(tokens, tokens**2))


def _natten(problem: Problem, inputs: Inputs) -> Prepared:
    """NATTEN's neighbourhood of 2w+1 rows and columns, which moves inwards at edges; without a bias."""
    try:
        import natten
    except ImportError:
        raise UnavailableError("natten is not installed") from None
    sides = [2 * problem.window + 1 if length > 2 * problem.window else length for length in problem.size]
    with torch.no_grad():
        query, key, value = (  # (B, H, W, h, D)
            x.transpose(1, 2).unflatten(1, problem.size).clone().requires_grad_()
            for x in (inputs.query, inputs.key, inputs.value)
        )
    leaves, options = [query, key, value], {}
    if problem.global_tokens:
        memory = [
            x.detach().transpose(1, 2).clone().requires_grad_()
            for x in (inputs.global_key, inputs.global_value)
        ]
        leaves += memory
        options = {"additional_keys": memory[0], "additional_values": memory[1]}

    def forward() -> Tensor:
        output = natten.na2d(query, key, value, kernel_size=tuple(sides), **options)
        return output.flatten(1, 2).transpose(1, 2)

    keys = sides[0] * sides[1] + problem.global_tokens
    return Prepared(forward, leaves, problem.costs(pairs=problem.tokens * keys))


def _flex(problem: Problem, inputs: Inputs) -> Prepared:
    """FlexAttention, compiled, with the same mask and biases.

    Tokens stand chunk by chunk, as a model could keep them, so that whole blocks of keys drop out; putting
    them in this order is not timed. The global keys stand in front. On a CPU there is a forward pass alone.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (height, width), side, globals_ = problem.size, problem.window, problem.global_tokens
    chunks, cyclic = [-(-height // side), -(-width // side)], problem.mask == "cyclic"
    if cyclic and (min(chunks) < 3 or height % side or width % side):
        raise UnavailableError("wrapping chunks seen twice, or padding that is seen, are no mask")
    row, column = (
        x.flatten() for x in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    )
    order = torch.argsort(row // side * chunks[1] + column // side, stable=True)
    row, column = (
        torch.cat([x.new_zeros(globals_), x[order]]).to(problem.device, torch.int32) for x in (row, column)
    )
    own_only, two = problem.neighbors == "self", isinstance(problem.neighbors, int)
    neighbor = problem.steps[-1]

    def step(query: Tensor, key: Tensor, count: int) -> Tensor:
        away = key // side - query // side
        return (away + 1) % count - 1 if cyclic else away

    def offset(query: Tensor, key: Tensor, count: int) -> Tensor:
        return query % side - key % side - step(query, key, count) * side

    def visible(_b: Tensor, _h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        query, key = (row[q + globals_], column[q + globals_]), (row[kv], column[kv])
        rows, columns = step(query[0], key[0], chunks[0]), step(query[1], key[1], chunks[1])
        own = (rows == 0) & (columns == 0)
        if own_only:
            seen = own
        elif two:
            seen = own | ((rows == neighbor[0]) & (columns == neighbor[1]))
        else:
            seen = (rows.abs() <= 1) & (columns.abs() <= 1)
        if problem.mask == "exact":
            seen = seen & ((query[0] - key[0]).abs() <= side) & ((query[1] - key[1]).abs() <= side)
        return (kv < globals_) | seen

    def biased(score: Tensor, _b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        query, key = (row[q + globals_], column[q + globals_]), (row[kv], column[kv])
        places = [
            (offset(query[axis], key[axis], chunks[axis]) + 2 * side - 1).clamp(0, 4 * side - 2)
            for axis in (0, 1)  # of keys that are not seen, any place will do
        ]
        bias = table[h, places[0], places[1]]
        if globals_:
            bias = torch.where(kv < globals_, of_globals[h, kv.clamp(max=globals_ - 1)], bias)
        return score + bias

    trains = problem.device.type != "cpu"
    with torch.no_grad():
        query = inputs.query[:, :, order].requires_grad_(trains)
        key, value = (
            torch.cat([memory, tokens[:, :, order]], dim=2).requires_grad_(trains)
            for memory, tokens in ((inputs.global_key, inputs.key), (inputs.global_value, inputs.value))
        )
    leaves = [query, key, value]
    options: dict[str, Any] = {}
    if problem.relative:
        assert inputs.bias_table is not None
        assert inputs.global_bias is not None
        table = inputs.bias_table.detach().clone().requires_grad_(trains)
        of_globals = inputs.global_bias.detach().clone().requires_grad_(trains)
        leaves += [table, of_globals] if globals_ else [table]
        options["score_mod"] = biased
    options["block_mask"] = create_block_mask(
        visible, None, None, problem.tokens, globals_ + problem.tokens, device=str(problem.device)
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    back = torch.argsort(order).to(problem.device)

    def forward() -> Tensor:
        if torch.is_grad_enabled() and not trains:
            raise UnavailableError("FlexAttention has no backward pass on a CPU")
        return compiled(query, key, value, **options)

    return Prepared(forward, leaves, problem.costs(), lambda output: output[:, :, back])


METHODS: dict[str, Method] = {
    **{name: partial(_of_backend, name) for name in (*BACKENDS, "auto")},
    "sliding_chunk": _sliding_chunk,
    "full": _full,
    "flex": _flex,
    "natten": _natten,
}
"""Every method by name: our backends first."""
BASELINE = "sliding_chunk"
"""What ratios are taken of."""


def bytes_needed(name: str, problem: Problem) -> int:
    """Roughly the memory of a training step of a method, where it may be much."""
    images, element = problem.batch * problem.heads, problem.dtype.itemsize
    rows, columns = (-(-length // problem.window) * problem.window for length in problem.size)
    if name == "dense":  # scores, weights and the gradients of both; and the bias by each seen chunk, twice
        keys = problem.global_tokens + rows * columns
        by_chunk = 2 * len(problem.steps) * (problem.heads if problem.relative else 1)
        return problem.tokens * (4 * images * keys * element + by_chunk * rows * columns * element)
    if name == "sliding_chunk":
        keys = problem.global_tokens + len(problem.steps) * problem.window**2
        return 4 * images * rows * columns * keys * element
    return 0
