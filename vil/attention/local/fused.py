"""2-D local attention as Triton kernels: scores never reach memory, the backward pass computes them again.

`kernels.py` has the kernels; here is what they are called with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vil.attention.local import chunked, kernels
from vil.attention.local.fallback import run_kernels
from vil.attention.local.geometry import Inputs, Window, fold_window_bias, window_bias
from vil.attention.local.operator import empty_gradients, like_tokens, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_WIDTH = 128
MAX_GLOBAL_TOKENS = 256
LOG2E = kernels.LOG2E.value
PROGRAMS = 1024
"""Programs that keep a large GPU busy: sums over images are split into so many parts."""
COLUMNS_MULTIPLE = 128
"""The biases of a query are padded to a multiple of this, so that blocks of them are read without a check."""

INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET=1: the kernels run on the CPU, for tests."""


def unsupported(
    device: torch.device, dtype: torch.dtype, head_width: int, globals_: int, dropout: float
) -> str | None:
    """Why the kernels cannot do this, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU, this is {device}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher"
    if dtype not in DTYPES:
        return f"computes in {', '.join(map(str, DTYPES))}, the query is {dtype}"
    if head_width > MAX_HEAD_WIDTH:
        return f"has a head width of {MAX_HEAD_WIDTH} at most, got {head_width}"
    if globals_ > MAX_GLOBAL_TOKENS:
        return f"has {MAX_GLOBAL_TOKENS} global tokens at most, got {globals_}"
    if dropout:
        return f"has no dropout of attention weights, got {dropout}"
    return None


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, inputs: Inputs, window: Window) -> None:
        self.inputs, self.window = inputs, window
        self.query, self.key, self.value, self.global_key, self.global_value = map(_readable, inputs[:5])
        self.batch, self.heads, self.tokens, self.width = inputs.query.shape
        self.globals_ = inputs.global_key.shape[2]
        self.rows, self.columns = (-(-length // window.side) for length in window.size)
        self.per_chunk = window.side**2
        self.keys = {"all": 9, "self": 1, "one": 2}[window.neighbors] * self.per_chunk
        self.window_bias = window_bias(inputs, window)  # (h or 1, w, w, 3w, 3w)
        self.borders = _borders(window.size, window.side, window.mask == "cyclic", inputs.query.device)
        self.block_m, self.block_k, self.stages = _blocks(
            self.per_chunk, self.keys, self.width, self.query.dtype
        )

    def bias_of_queries(self) -> Tensor | None:
        """Position biases of a chunk's queries, times log₂e, in the inputs' precision; None without any.

        (h or 1, t, columns): of the global keys, of the local ones in their order, and padding.
        """
        found = [bias for bias in (self.window_bias, self.inputs.global_bias) if bias is not None]
        if not found:
            return None
        bias = self.query.new_zeros(max(map(len, found)), self.per_chunk, self.columns_of_bias(self.globals_))
        if self.inputs.global_bias is not None:
            bias[..., : self.globals_] = (self.inputs.global_bias * LOG2E)[:, None]
        if self.window_bias is not None:
            local = self._of_seen(self.window_bias.flatten(3).flatten(1, 2), 1)
            bias[..., self.globals_ : self.globals_ + self.keys] = local * LOG2E
        return bias

    def bias_of_keys(self) -> Tensor | None:
        """The same from the side of a chunk's keys, (h or 1, t, columns): of the queries in their order.

        A query s chunks away sees a key −s chunks away.
        """
        if self.window_bias is None:
            return None
        side = self.window.side
        by_chunk = self.window_bias.unflatten(4, (3, side)).unflatten(3, (3, side))  # (h, w, w, 3, w, 3, w)
        turned = by_chunk.flip(3, 5).permute(0, 4, 6, 3, 1, 5, 2)  # key, and chunk and token of the query
        by_key = turned.reshape(len(turned), self.per_chunk, self.window.places)
        bias = self.query.new_zeros(len(turned), self.per_chunk, self.columns_of_bias(0))
        bias[..., : self.keys] = self._of_seen(by_key, -1) * LOG2E
        return bias

    def hidden_keys(self) -> Tensor:
        """(kinds, columns): 0 for what a chunk sees, −∞ for what it does not, as `bias_of_queries` has it."""
        hidden = self._hidden(self.globals_, self.borders.hidden_keys, 1)
        hidden[:, : self.globals_] = 0
        return hidden

    def hidden_queries(self) -> Tensor:
        """(kinds, columns): 0 for the queries that see a chunk, −∞ for what is none, as `bias_of_keys`."""
        return self._hidden(0, self.borders.hidden_queries, -1)

    def columns_of_bias(self, globals_: int) -> int:
        """Of what is added to a row of scores: global keys, whole blocks of local ones, and padding."""
        local = triton.cdiv(self.keys, self.block_k) * self.block_k
        return triton.cdiv(globals_ + local, COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE

    def _hidden(self, globals_: int, by_place: Tensor, direction: int) -> Tensor:
        hidden = self.query.new_full((len(by_place), self.columns_of_bias(globals_)), float("-inf"))
        hidden[:, globals_ : globals_ + self.keys] = self._of_seen(by_place, direction)
        return hidden

    def _of_seen(self, by_place: Tensor, direction: int) -> Tensor:
        """(…, 9w²) → (…, keys): what is seen, of the nine chunks."""
        places = self.seen_places(direction)
        return by_place if places is None else by_place.index_select(-1, places)

    def seen_places(self, direction: int = 1) -> Tensor | None:
        """(keys,): where the tokens that are seen stand in the nine chunks; None for all.

        With direction −1, those of which one is seen. Computed on the device, which knows the neighbour.
        """
        if self.window.neighbors == "all":
            return None
        side = self.window.side
        inside = torch.arange(self.per_chunk, device=self.query.device)
        row, column = side + inside // side, side + inside % side
        if self.inputs.neighbor is not None:
            number = self.inputs.neighbor.reshape(()).long()
            chunk = number + (number >= 4)  # of the nine
            row = torch.cat([row, row + direction * (chunk // 3 - 1) * side])
            column = torch.cat([column, column + direction * (chunk % 3 - 1) * side])
        return row * (3 * side) + column

    @property
    def scale(self) -> float:
        """By which products of queries and keys are multiplied."""
        return self.width**-0.5 * LOG2E

    def common(self) -> dict[str, Any]:
        """Arguments of every kernel."""
        return {
            "D": self.width,
            "BLOCK_D": max(16, triton.next_power_of_2(self.width)),
            "PRECISION": _precision(self.query.dtype),
            "num_warps": 4,
            "num_stages": self.stages,
        }

    def of_window(self) -> dict[str, Any]:
        """Arguments of the kernels that go through chunks."""
        return {
            "WINDOW": self.window.side,
            "KEYS": self.keys,
            "NEIGHBORS": self.window.neighbors,
            "CYCLIC": self.window.mask == "cyclic",
            "BLOCK_M": self.block_m,
            "BLOCK_K": self.block_k,
            **self.common(),
        }

    def of_queries(self) -> dict[str, Any]:
        """Arguments of the kernels whose queries meet all keys."""
        keys = (self.key, self.value, self.global_key, self.global_value)
        return {"GLOBALS": self.globals_, "ALIGNED": all(map(_is_aligned, keys)), **self.of_window()}

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.query.device) if self.query.is_cuda else contextlib.nullcontext()

    def programs(self, block: int) -> int:
        """Of a kernel that takes blocks of a chunk's tokens."""
        return self.batch * self.heads * self.rows * self.columns * triton.cdiv(self.per_chunk, block)


def forward(
    inputs: Inputs, window: Window, seed: Tensor | None, may_fall_back: bool
) -> tuple[Tensor, Tensor]:
    """Return the output and the sums of `launch_forward`, or the output of `chunked` and sums of 0.

    Raises:
        KernelError: see `run_kernels`.
    """

    def substitute() -> tuple[Tensor, Tensor]:
        output, _ = chunked.forward(inputs, window, seed)
        return output, inputs.query.new_zeros(inputs.query.shape[:3], dtype=torch.float32)

    return run_kernels(
        lambda: launch_forward(inputs, window),
        substitute if may_fall_back else None,
        _kind(inputs, window),
        inputs.query.device,
    )


def backward(
    inputs: Inputs,
    window: Window,
    seed: Tensor | None,
    output: Tensor,
    sums: Tensor,
    gradient: Tensor,
    of_biases: bool,
    may_fall_back: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of the first seven inputs, from `launch_backward` or `chunked`.

    What `chunked` computes needs the inputs alone, so the two passes fall back independently; once the
    forward pass has, the kernels of its kind are not tried again and its sums are not read.

    Raises:
        KernelError: see `run_kernels`.
    """

    def substitute() -> tuple[Tensor, ...]:
        return chunked.backward(inputs, window, seed, output, sums, gradient, of_biases)

    return run_kernels(
        lambda: launch_backward(inputs, window, output, sums, gradient, of_biases),
        substitute if may_fall_back else None,
        _kind(inputs, window),
        inputs.query.device,
    )


def _kind(inputs: Inputs, window: Window) -> Hashable:
    """Return the properties that kernels are compiled for, which sizes of maps and batches are not."""
    query = inputs.query
    options = (
        window.side,
        window.mask,
        window.neighbors,
        inputs.bias_table is None,
        inputs.global_bias is None,
    )
    return (query.device, query.dtype, query.shape[3], inputs.global_key.shape[2], *options)


def launch_forward(inputs: Inputs, window: Window) -> tuple[Tensor, Tensor]:
    """Return the output (B, h, N, D), and the logarithm of the sum of exponentials (B, h, N), float32."""
    call = _Call(inputs, window)
    output = like_tokens(inputs.query)
    sums = inputs.query.new_empty(inputs.query.shape[:3], dtype=torch.float32)
    tensors = (call.query, call.key, call.value, call.global_key, call.global_value)
    bias, *of_bias, row = _by_kind(call.bias_of_queries(), call.hidden_keys())
    with call.on_device():
        kernels.forward_kernel[(call.programs(call.block_m),)](
            *tensors, bias, inputs.neighbor, output, sums, *_strides(*tensors, output),
            *of_bias, *call.borders.kinds, call.heads, *window.size, call.rows, call.columns, call.scale,
            ROW=row, **call.of_queries(),
        )  # fmt: skip
    return output, sums


def launch_backward(
    inputs: Inputs, window: Window, output: Tensor, sums: Tensor, gradient: Tensor, of_biases: bool
) -> tuple[Tensor, ...]:
    """Return the gradients of the first seven inputs; empty for biases that are absent or need none."""
    call = _Call(inputs, window)
    gradients = empty_gradients(inputs, of_biases)
    gradient, output = _readable(gradient), _readable(output)
    statistics = sums.new_empty(*sums.shape, 2)  # of each query, for all kernels but the first
    tensors = (call.query, call.key, call.value, call.global_key, call.global_value)
    place = (*window.size, call.rows, call.columns, call.scale)
    true_scale = call.width**-0.5
    bias_of_queries, hidden = call.bias_of_queries(), call.hidden_keys()
    bias, *of_bias, row = _by_kind(bias_of_queries, hidden)
    with call.on_device():
        kernels.query_kernel[(call.programs(call.block_m),)](
            *tensors, bias, inputs.neighbor, output, sums, gradient, statistics, gradients[0],
            *_strides(*tensors, output, gradient, gradients[0]),
            *of_bias, *call.borders.kinds, call.heads, *place, true_scale, ROW=row, **call.of_queries(),
        )  # fmt: skip
        bias, *of_bias, row = _by_kind(call.bias_of_keys(), call.hidden_queries())
        blocks = {"BLOCK_M": call.block_k, "BLOCK_K": call.block_m}
        kernels.key_kernel[(call.programs(call.block_m),)](
            *tensors[:3], bias, inputs.neighbor, statistics, gradient, gradients[1], gradients[2],
            *_strides(*tensors[:3], gradient, gradients[1]),
            *of_bias, *call.borders.kinds, call.heads, *place, true_scale, ROW=row,
            **(call.of_window() | blocks),
        )  # fmt: skip
        if call.globals_:
            _differentiate_globals(call, bias_of_queries, statistics, gradient, gradients)
        if gradients[5].numel():
            assert bias_of_queries is not None
            gradients[5].copy_(_differentiate_table(call, bias_of_queries, hidden, statistics, gradient))
    return gradients


def _differentiate_globals(
    call: _Call,
    bias: Tensor | None,
    statistics: Tensor,
    gradient: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Fills the gradients of global keys, values and biases."""
    block = min(call.block_k, max(16, triton.next_power_of_2(call.globals_)))
    blocks = triton.cdiv(call.globals_, block)
    parts = _parts(call.batch * call.heads * blocks, triton.cdiv(call.tokens, 256))
    tokens_of_part = triton.cdiv(triton.cdiv(call.tokens, parts), call.block_m) * call.block_m  # whole blocks
    shape = (call.batch, call.heads, parts, call.globals_)
    of_bias = statistics.new_empty(shape)
    of_key, of_value = (statistics.new_empty(*shape, call.width) for _ in range(2))
    tensors = (call.query, call.global_key, call.global_value)
    kernels.global_kernel[(call.batch * call.heads, parts, blocks)](
        *tensors, call.query if bias is None else bias, statistics, gradient, of_key, of_value, of_bias,
        *_strides(*tensors, gradient),
        _stride_of_heads(bias), call.heads, call.tokens, tokens_of_part, call.scale, call.width**-0.5,
        GLOBALS=call.globals_, HAS_BIAS=bias is not None,
        BLOCK_M=call.block_m, BLOCK_G=block, **call.common(),
    )  # fmt: skip
    gradients[3].copy_(of_key.sum(dim=2))
    gradients[4].copy_(of_value.sum(dim=2))
    if gradients[6].numel():
        gradients[6].copy_(of_bias.sum(dim=(0, 2)))


def _differentiate_table(
    call: _Call, bias: Tensor, hidden: Tensor, statistics: Tensor, gradient: Tensor
) -> Tensor:
    """(h, 4w−1, 4w−1), float32."""
    blocks = triton.cdiv(call.per_chunk, call.block_m) * triton.cdiv(call.keys, call.block_k)
    parts = _parts(blocks * call.heads, call.batch * call.rows * call.columns)
    of_bias = statistics.new_empty(parts, call.heads, call.per_chunk, call.keys)
    tensors = (call.query, call.key, call.value)
    kernels.bias_kernel[(parts, blocks, call.heads)](
        *tensors, bias, hidden, call.inputs.neighbor, statistics, gradient, of_bias,
        *_strides(*tensors, gradient),
        _stride_of_heads(bias), *call.borders.kinds, call.heads, call.batch, *call.window.size,
        call.rows, call.columns, call.scale,
        GLOBALS=call.globals_, ROW=bias.stride(1),
        **(call.of_window() | {"num_warps": 8}),  # the sum of a block's scores takes many registers
    )  # fmt: skip
    side, places = call.window.side, call.seen_places()
    by_place = of_bias.sum(dim=0)
    if places is not None:
        by_place = by_place.new_zeros(*by_place.shape[:2], call.window.places).index_copy_(
            2, places, by_place
        )
    return fold_window_bias(by_place.unflatten(2, (3 * side, 3 * side)).unflatten(1, (side, side)), side)


def _parts(programs: int, most: int) -> int:
    """Into how many parts a sum is split, so that there are `PROGRAMS` programs."""
    return max(1, min(most, PROGRAMS // max(1, programs)))


def _blocks(per_chunk: int, keys: int, width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Queries and keys of a block, and how many blocks are on their way from memory at a time.

    By what a program's blocks take of the shared memory: less than 100 kB, which every GPU has.
    """
    row = triton.next_power_of_2(width) * dtype.itemsize  # bytes
    queries, local, stages = (64, 64, 3) if row <= 128 else (64, 32, 2) if row <= 256 else (32, 16, 1)
    if dtype == torch.float32:  # whose products keep parts of their factors
        local, stages = min(local, 32), min(stages, 3 if row <= 128 else 1)
    return (
        min(queries, max(16, triton.next_power_of_2(per_chunk))),
        min(local, max(16, triton.next_power_of_2(keys))),
        stages,
    )


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as TF32 where PyTorch may, else as exactly as float32, by three of TF32."""
    if torch.version.hip or dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _readable(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: vectors in one piece, tokens and heads within 32 bits of each other."""
    far = max((length - 1) * stride for length, stride in zip(tensor.shape[1:3], tensor.stride()[1:3]))
    return tensor if tensor.stride(-1) == 1 and far < 2**30 else tensor.contiguous()


def _by_kind(bias: Tensor | None, hidden: Tensor) -> tuple[Tensor, int, int, int]:
    """What is added to scores, for each kind of chunk; and how far apart kinds, heads and rows of it are.

    Args:
        bias: (h or 1, t, columns), or None.
        hidden: (kinds, columns).

    Returns:
        (kinds, h or 1, t, columns), without a bias (kinds, columns); and the three strides.
    """
    if bias is None:
        return hidden, hidden.stride(0), 0, 0
    bias = bias + hidden[:, None, None]
    return bias, bias.stride(0), bias.stride(1) if bias.shape[1] > 1 else 0, bias.stride(2)


class _Borders(NamedTuple):
    """What chunks do not see because the map ends; the same for chunks of one kind."""

    kinds: tuple[int, int, int]
    """What `border_kinds` packs for rows of chunks, and for columns; and how many kinds columns have."""
    hidden_keys: Tensor
    """(kinds, 9w²), kinds of rows times columns: 0 for places that the chunk in the middle sees, else −∞."""
    hidden_queries: Tensor
    """The same with 0 for places of queries that see the chunk in the middle."""


def _borders(size: tuple[int, int], side: int, cyclic: bool, device: torch.device) -> _Borders:
    (rows, row_kinds), (columns, column_kinds) = (border_kinds(length, side, cyclic) for length in size)
    by_what = zip(zip(*row_kinds), zip(*column_kinds))  # keys of rows and of columns; queries of both
    keys, queries = (_hidden(*of_axes, device) for of_axes in by_what)
    return _Borders((rows, columns, len(column_kinds)), keys, queries)


@cache
def _hidden(
    rows: tuple[tuple[bool, ...], ...], columns: tuple[tuple[bool, ...], ...], device: torch.device
) -> Tensor:
    """(kinds, 9w²): 0 for places in one of the rows and of the columns (3w each, by kind), −∞ for others.

    Kept for good: there are few, and a graph of CUDA may have its address.
    """
    seen = torch.tensor(rows)[:, None, :, None] & torch.tensor(columns)[None, :, None, :]
    hidden = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    return hidden.flatten(2).flatten(0, 1).to(device)


@lru_cache(maxsize=4096)
def border_kinds(
    length: int, side: int, cyclic: bool
) -> tuple[int, tuple[tuple[tuple[bool, ...], tuple[bool, ...]], ...]]:
    """How many kinds of chunks there are along one axis, by what they see of the chunks before and after.

    That depends on whether there is a chunk before, and on whether there are none, one or more after: six
    cases, of which four occur on one map at most, and some look the same.

    Returns:
        The number of the kind of each case, three bits each, in the order that `kernels._kind` counts; and
        for each kind, which of the 3w positions around are keys, and which are queries.
    """
    chunks = -(-length // side)
    kinds: list[tuple[tuple[bool, ...], tuple[bool, ...]]] = []
    packed = 0
    for case in range(6):
        of_case = [c for c in range(chunks) if (c > 0) * 3 + min(chunks - 1 - c, 2) == case]
        if not of_case:
            continue
        keys, queries = [], []
        for position in range((of_case[0] - 1) * side, (of_case[0] + 2) * side):
            wrapped = position % (chunks * side) if cyclic else position
            queries.append(0 <= wrapped < length)
            keys.append(queries[-1] or (cyclic and position < 0))
        kind = (tuple(keys), tuple(queries))
        if kind not in kinds:
            kinds.append(kind)
        packed |= kinds.index(kind) << 3 * case
    return packed, tuple(kinds)


def _stride_of_heads(bias: Tensor | None) -> int:
    return bias.stride(0) if bias is not None and len(bias) > 1 else 0


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every vector of it begins at a multiple of 16 bytes, as the widest instructions need it."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    return not any(number % 16 for number in (tensor.data_ptr(), *strides))


def _strides(*tensors: Tensor) -> list[int]:
    """Of images, heads and tokens, of one after the other."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


_operator = register("fused", forward, backward, keeps_sums=True, can_fall_back=True)


def fused_attention(inputs: Inputs, window: Window) -> Tensor:
    """Return the output (B, h, N, D). Raises KernelError where a kernel does not compile or launch."""
    return _operator(inputs, window, False)


def fused_or_chunked_attention(inputs: Inputs, window: Window) -> Tensor:
    """Return the output (B, h, N, D), computed by `chunked` where a kernel does not compile or launch."""
    return _operator(inputs, window, True)
