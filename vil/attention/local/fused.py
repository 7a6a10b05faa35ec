"""2-D local attention with Triton kernels: scores stay in registers, the backward pass computes them again.

This module prepares the arguments of the kernels in `kernels.py` and launches them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache

import torch
import triton
from torch import Tensor

from vil.attention.local import chunked, kernels
from vil.attention.local.borders import AxisMasks, additive_mask, border_masks
from vil.attention.local.fallback import Result, run_kernels
from vil.attention.local.geometry import LocalAttentionSpec, OperatorInputs
from vil.attention.local.operator import empty_gradients, like_tokens, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_WIDTH = 128
MAX_GLOBAL_TOKENS = 256
LOG2E = kernels.LOG2E.value
TARGET_PROGRAMS = 1024
"""Programs that occupy a large GPU; sums over images are split into parts to reach this number."""
COLUMNS_MULTIPLE = 128
"""The biases of a query are padded to a multiple of this, so that blocks are loaded without a mask."""

INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)
"""True with TRITON_INTERPRET=1: the kernels run on the CPU, for tests."""


def unsupported(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_globals: int, dropout: float
) -> str | None:
    """Return the reason why the kernels do not support such a call, or None."""
    if device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU, this is {device}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or higher"
    if dtype not in DTYPES:
        return f"computes in {', '.join(map(str, DTYPES))}, the query is {dtype}"
    if head_dim > MAX_HEAD_WIDTH:
        return f"has a head width of {MAX_HEAD_WIDTH} at most, got {head_dim}"
    if num_globals > MAX_GLOBAL_TOKENS:
        return f"has {MAX_GLOBAL_TOKENS} global tokens at most, got {num_globals}"
    if dropout:
        return f"has no dropout of attention weights, got {dropout}"
    return None


class _KernelCall:
    """Sizes, blocks and biases shared by the kernels of one call."""

    def __init__(self, inputs: OperatorInputs, spec: LocalAttentionSpec) -> None:
        self.inputs, self.spec = inputs, spec
        self.query = _as_loadable(inputs.query)
        self.key, self.value = _with_equal_strides(inputs.key, inputs.value)
        self.global_key, self.global_value = _with_equal_strides(inputs.global_key, inputs.global_value)
        self.tensors = (self.query, self.key, self.value, self.global_key, self.global_value)
        self.batch, self.heads, self.tokens, self.width = inputs.query.shape
        self.num_globals = inputs.global_key.shape[2]
        self.rows, self.columns = (_ceil_divide(length, spec.window) for length in spec.size)
        self.per_chunk = spec.window**2
        self.keys = {"all": 9, "self": 1, "one": 2}[spec.neighbors] * self.per_chunk
        self.window_bias = inputs.window_bias  # (h or 1, w, w, 3w, 3w)
        self.borders = border_masks(spec.size, spec.window, spec.mask == "cyclic")
        blocks = _blocks(self.per_chunk, self.keys, self.width, self.query.dtype)
        self.block_m, self.block_k, self.stages = blocks
        self.true_scale = self.width**-0.5
        self.scale = self.true_scale * LOG2E  # of the products of queries and keys
        self.bias_in_accumulator = _bias_in_accumulator(self.query.device, self.query.dtype)
        self.bias_factor = bias_factor(self.query.device, self.query.dtype, self.width)
        self.bias_dtype = bias_dtype(self.query.dtype)
        size = (*spec.size, self.rows, self.columns)
        self.geometry = (*self.borders.kinds, self.heads, *size, self.scale)

    def query_bias(self) -> Tensor | None:
        """Return the scaled biases of a chunk's queries, of type `bias_dtype`; None if there are none.

        (h or 1, t, columns): global keys, local keys in order, padding.
        """
        biases = [bias for bias in (self.window_bias, self.inputs.global_bias) if bias is not None]
        if not biases:
            return None
        columns = self.bias_columns(self.num_globals)
        shape = (max(map(len, biases)), self.per_chunk, columns)
        bias = self.query.new_zeros(shape, dtype=self.bias_dtype)
        if self.inputs.global_bias is not None:
            global_keys = bias[..., : self.num_globals]
            global_bias = self.inputs.global_bias[:, None].expand_as(global_keys)
            torch.mul(global_bias, self.bias_factor, out=global_keys)
        if self.window_bias is not None:
            local = self._select_visible(self.window_bias.flatten(3).flatten(1, 2), 1)
            local_keys = bias[..., self.num_globals : self.num_globals + self.keys]
            torch.mul(local.expand_as(local_keys), self.bias_factor, out=local_keys)
        return bias

    def key_bias(self) -> Tensor | None:
        """Return the biases of a chunk's keys, scaled as in `query_bias`.

        (h or 1, t, columns): queries in order, padding.

        A query at chunk offset s sees the key at chunk offset −s.
        """
        if self.window_bias is None:
            return None
        side = self.spec.window
        by_chunk = self.window_bias.unflatten(4, (3, side)).unflatten(3, (3, side))  # (h, w, w, 3, w, 3, w)
        turned = by_chunk.flip(3, 5).permute(0, 4, 6, 3, 1, 5, 2)  # key, and chunk and token of the query
        by_key = turned.reshape(len(turned), self.per_chunk, self.spec.num_positions)
        shape = (len(turned), self.per_chunk, self.bias_columns(0))
        bias = self.query.new_zeros(shape, dtype=self.bias_dtype)
        torch.mul(self._select_visible(by_key, -1), self.bias_factor, out=bias[..., : self.keys])
        return bias

    def hidden_keys(self) -> Tensor:
        """Return (kinds, columns), 0 for visible keys and −∞ for others, in the order of `query_bias`."""
        return self._hidden(self.borders.keys, self.num_globals, 1, self.bias_dtype)

    def hidden_local_keys(self) -> Tensor:
        """Return `hidden_keys` without the global ones, float32, for aligned loads."""
        return self._hidden(self.borders.keys, 0, 1, torch.float32)

    def hidden_queries(self) -> Tensor:
        """Return (kinds, columns), 0 for queries that see a chunk and −∞ for others, as in `key_bias`."""
        return self._hidden(self.borders.queries, 0, -1, self.bias_dtype)

    def bias_columns(self, num_globals: int) -> int:
        """Return the columns of a row of biases: global keys, whole blocks of local keys, padding."""
        local = _ceil_divide(self.keys, self.block_k) * self.block_k
        return _ceil_divide(num_globals + local, COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE

    def _hidden(
        self, masks: tuple[AxisMasks, AxisMasks], num_globals: int, direction: int, dtype: torch.dtype
    ) -> Tensor:
        columns, target = self.bias_columns(num_globals), (dtype, self.query.device)
        if self.spec.neighbors != "one":
            return additive_mask(masks, num_globals, columns, self.spec.neighbors == "self", *target)
        all_positions = additive_mask(masks, 0, self.spec.num_positions, False, *target)
        hidden = all_positions.new_full((len(all_positions), columns), float("-inf"))
        hidden[:, :num_globals].zero_()
        hidden[:, num_globals : num_globals + self.keys] = self._select_visible(all_positions, direction)
        return hidden

    def _select_visible(self, by_position: Tensor, direction: int) -> Tensor:
        """Select the visible positions of the nine chunks: (…, 9w²) → (…, keys)."""
        positions = self.visible_positions(direction)
        return by_position if positions is None else by_position.index_select(-1, positions)

    def visible_positions(self, direction: int = 1) -> Tensor | None:
        """Return the indices (keys,) of the visible tokens in the nine chunks; None for all.

        With direction −1, those of the tokens that see the chunk. Computed on the device, which holds the
        number of the neighbor, without a synchronization.
        """
        if self.spec.neighbors == "all":
            return None
        side = self.spec.window
        inside = torch.arange(self.per_chunk, device=self.query.device)
        row, column = side + inside // side, side + inside % side
        if self.inputs.neighbor is not None:
            number = self.inputs.neighbor.reshape(()).long()
            chunk = number + (number >= 4)  # of the nine
            row = torch.cat([row, row + direction * (chunk // 3 - 1) * side])
            column = torch.cat([column, column + direction * (chunk % 3 - 1) * side])
        return row * (3 * side) + column

    def common_arguments(self) -> dict[str, object]:
        """Return the arguments of every kernel."""
        return {
            "D": self.width,
            "BLOCK_D": max(16, triton.next_power_of_2(self.width)),
            "BIAS_IN_ACCUMULATOR": self.bias_in_accumulator,
            "PRECISION": _precision(self.query.dtype),
            "num_warps": 4,
            "num_stages": self.stages,
        }

    def chunk_arguments(self) -> dict[str, object]:
        """Return the arguments of the kernels that process chunks."""
        return {
            "WINDOW": self.spec.window,
            "KEYS": self.keys,
            "NEIGHBORS": self.spec.neighbors,
            "CYCLIC": self.spec.mask == "cyclic",
            "BLOCK_M": self.block_m,
            "BLOCK_K": self.block_k,
            **self.common_arguments(),
        }

    def query_arguments(self) -> dict[str, object]:
        """Return the arguments of the kernels that loop over the keys of a query."""
        is_aligned = all(map(_is_aligned, self.tensors[1:]))  # keys and values
        return {"GLOBALS": self.num_globals, "ALIGNED": is_aligned, **self.chunk_arguments()}

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the device of the query current, where Triton launches kernels."""
        return torch.cuda.device(self.query.device) if self.query.is_cuda else contextlib.nullcontext()

    def programs(self, block: int) -> int:
        """Return the number of programs of a kernel that processes blocks of a chunk's tokens."""
        return self.batch * self.heads * self.rows * self.columns * _ceil_divide(self.per_chunk, block)


def forward(inputs: OperatorInputs, spec: LocalAttentionSpec, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output and the sums of `launch_forward`, or the output of `chunked` and sums of 0.

    Raises:
        KernelError: see `run_kernels`.
    """

    def substitute() -> tuple[Tensor, Tensor]:
        output, _ = chunked.forward(inputs, spec, seed)
        return output, inputs.query.new_zeros(inputs.query.shape[:3], dtype=torch.float32)

    return _run(inputs, spec, lambda: launch_forward(inputs, spec), substitute)


def backward(
    inputs: OperatorInputs,
    spec: LocalAttentionSpec,
    seed: Tensor | None,
    output: Tensor,
    sums: Tensor,
    gradient: Tensor,
    needs_bias_grads: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of the first seven inputs, from `launch_backward` or `chunked`.

    The backward pass of `chunked` needs the inputs only, so the two passes fall back independently; after a
    fallback in the forward pass, the kernels are not tried again and the sums are not read.

    Raises:
        KernelError: see `run_kernels`.
    """
    given = (output, sums, gradient, needs_bias_grads)
    return _run(
        inputs,
        spec,
        lambda: launch_backward(inputs, spec, *given),
        lambda: chunked.backward(inputs, spec, seed, *given),
    )


def _run(
    inputs: OperatorInputs,
    spec: LocalAttentionSpec,
    launch: Callable[[], Result],
    substitute: Callable[[], Result],
) -> Result:
    query, has_biases = inputs.query, (inputs.window_bias is not None, inputs.global_bias is not None)
    # The properties that the kernels are compiled for; sizes of maps and batches are not.
    kind = (query.device, query.dtype, query.shape[3], inputs.global_key.shape[2], *spec[1:4], *has_biases)
    return run_kernels(launch, substitute if spec.may_fall_back else None, kind, query.device)


def launch_forward(inputs: OperatorInputs, spec: LocalAttentionSpec) -> tuple[Tensor, Tensor]:
    """Return the output (B, h, N, D), and the logarithm of the sum of exponentials (B, h, N), float32."""
    call = _KernelCall(inputs, spec)
    output = like_tokens(inputs.query)
    sums = inputs.query.new_empty(inputs.query.shape[:3], dtype=torch.float32)
    bias, *bias_strides, row = _combine_bias(call.query_bias(), call.hidden_keys())
    strides = _strides(call.query, call.key, call.global_key, output)
    with call.on_device():
        kernels.forward_kernel[(call.programs(call.block_m),)](
            *(*call.tensors, bias, inputs.neighbor, output, sums),
            *(*strides, *bias_strides, *call.geometry),
            ROW=row,
            **call.query_arguments(),
        )
    return output, sums


def launch_backward(
    inputs: OperatorInputs,
    spec: LocalAttentionSpec,
    output: Tensor,
    sums: Tensor,
    gradient: Tensor,
    needs_bias_grads: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of the first seven inputs; empty for biases that are absent or need none."""
    call = _KernelCall(inputs, spec)
    gradients = list(empty_gradients(inputs, needs_bias_grads))
    gradient, output = _as_loadable(gradient), _as_loadable(output)
    statistics = sums.new_empty(*sums.shape, 2)  # per query, computed by the first kernel for the others
    query_bias = call.query_bias()
    bias, *bias_strides, row = _combine_bias(query_bias, call.hidden_keys())
    strides = _strides(call.query, call.key, call.global_key, output, gradient, gradients[0])
    with call.on_device():
        kernels.query_kernel[(call.programs(call.block_m),)](
            *(*call.tensors, bias, inputs.neighbor, output, sums, gradient, statistics, gradients[0]),
            *(*strides, *bias_strides, *call.geometry, call.true_scale),
            ROW=row,
            **call.query_arguments(),
        )
        bias, *bias_strides, row = _combine_bias(call.key_bias(), call.hidden_queries())
        strides = _strides(call.query, call.key, gradient, gradients[1])
        blocks = {"BLOCK_M": call.block_k, "BLOCK_K": call.block_m}
        kernels.key_kernel[(call.programs(call.block_m),)](
            *(*call.tensors[:3], bias, inputs.neighbor, statistics, gradient, gradients[1], gradients[2]),
            *(*strides, *bias_strides, *call.geometry, call.true_scale),
            ROW=row,
            **(call.chunk_arguments() | blocks),
        )
        if call.num_globals:
            *grad_tokens, grad_bias = _global_gradients(call, query_bias, statistics, gradient)
            gradients[3:5] = [grad.sum(dim=2).to(call.query.dtype) for grad in grad_tokens]
            if gradients[6].numel():
                gradients[6] = grad_bias.sum(dim=(0, 2))
        if gradients[5].numel():
            assert query_bias is not None
            gradients[5] = _window_bias_gradient(call, query_bias, statistics, gradient)
    return tuple(gradients)


def _global_gradients(
    call: _KernelCall, bias: Tensor | None, statistics: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of global keys, values (B, h, parts, G, D) and biases (B, h, parts, G), float32."""
    block = min(call.block_k, max(16, triton.next_power_of_2(call.num_globals)))
    blocks = _ceil_divide(call.num_globals, block)
    num_parts = _num_parts(call.batch * call.heads * blocks, _ceil_divide(call.tokens, 256))
    tokens_per_part = _ceil_divide(_ceil_divide(call.tokens, num_parts), call.block_m) * call.block_m
    shape = (call.batch, call.heads, num_parts, call.num_globals)
    grad_bias = statistics.new_empty(shape)
    grad_key, grad_value = (statistics.new_empty(*shape, call.width) for _ in range(2))
    tensors = (call.query, call.global_key, call.global_value)
    bias_or_unused = call.query if bias is None else bias
    kernels.global_kernel[(call.batch * call.heads, num_parts, blocks)](
        *(*tensors, bias_or_unused, statistics, gradient, grad_key, grad_value, grad_bias),
        *(*_strides(call.query, call.global_key, gradient), _head_stride(bias)),
        *(call.heads, call.tokens, tokens_per_part, call.scale, call.true_scale),
        **{"GLOBALS": call.num_globals, "HAS_BIAS": bias is not None},
        **{"BLOCK_M": call.block_m, "BLOCK_G": block, **call.common_arguments()},
    )
    return grad_key, grad_value, grad_bias


def _window_bias_gradient(call: _KernelCall, bias: Tensor, statistics: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the window biases (h, w, w, 3w, 3w), float32."""
    blocks = _ceil_divide(call.per_chunk, call.block_m) * _ceil_divide(call.keys, call.block_k)
    num_parts = _num_parts(blocks * call.heads, call.batch * call.rows * call.columns)
    grad_bias = statistics.new_empty(num_parts, call.heads, call.per_chunk, call.keys)
    tensors, hidden, side = call.tensors[:3], call.hidden_local_keys(), call.spec.window
    options = {"GLOBALS": call.num_globals, "ROW": bias.stride(1), **call.chunk_arguments()}
    is_half = call.query.dtype != torch.float32
    if major_capability(call.query.device) and is_half and call.width <= 32 and side <= 7:
        # A multiprocessor holds three programs instead of two, with few or no spills.
        options["maxnreg"] = 168
    kernels.bias_kernel[(num_parts, blocks, call.heads)](
        *(*tensors, bias, hidden, call.inputs.neighbor, statistics, gradient, grad_bias),
        *(*_strides(call.query, call.key, gradient), hidden.stride(0), call.batch),
        *(_head_stride(bias), *call.geometry),
        **options,
    )
    positions = call.visible_positions()
    by_position = grad_bias.sum(dim=0)
    if positions is not None:
        all_positions = by_position.new_zeros(*by_position.shape[:2], call.spec.num_positions)
        by_position = all_positions.index_copy_(2, positions, by_position)
    return by_position.view(call.heads, side, side, 3 * side, 3 * side)


def _ceil_divide(dividend: int, divisor: int) -> int:
    """Divide and round up, without the overhead of `triton.cdiv`, which is made for kernels, too."""
    return -(-dividend // divisor)


def _num_parts(programs: int, limit: int) -> int:
    """Return the number of parts of a sum for about `TARGET_PROGRAMS` programs, at most `limit`."""
    return max(1, min(limit, TARGET_PROGRAMS // max(1, programs)))


@cache
def _blocks(per_chunk: int, keys: int, width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the queries and keys per block, and the number of pipeline stages.

    Chosen so that a program uses less than 100 kB of shared memory, which every GPU has.
    """
    row = triton.next_power_of_2(width) * dtype.itemsize  # bytes
    queries, local, stages = (64, 64, 3) if row <= 128 else (64, 32, 2) if row <= 256 else (32, 16, 1)
    if dtype == torch.float32:  # emulated float32 products need more registers
        local, stages = min(local, 32), min(stages, 3 if row <= 128 else 1)
    return (
        min(queries, max(16, triton.next_power_of_2(per_chunk))),
        min(local, max(16, triton.next_power_of_2(keys))),
        stages,
    )


def bias_factor(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return the factor of biases: 1 / scale where accumulators are initialized with them, else log₂e.

    The biases are multiplied by it, and then rounded to `bias_dtype`.
    """
    return width**0.5 if _bias_in_accumulator(device, dtype) else LOG2E


def bias_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the biases in memory: float16 also for bfloat16.

    It is eight times as exact, and converted to float32 by one instruction instead of one and a half.
    Products of bias and factor beyond ±65,504 are infinite.
    """
    return torch.float32 if dtype == torch.float32 else torch.float16


def _bias_in_accumulator(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the accumulators of the query–key products are initialized with the biases.

    Compiled for compute capability 9 in half precision, this saves instructions and shared memory; for others
    it takes more registers, which are then spilled.
    """
    return major_capability(device) == 9 and dtype != torch.float32


def major_capability(device: torch.device) -> int:
    """Return the major compute capability of NVIDIA's GPU, 0 for other devices."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device)[0] if is_nvidia else 0


def _precision(dtype: torch.dtype) -> str:
    """Return Triton's precision of float32 products: TF32 if PyTorch allows it, else three TF32 products."""
    if torch.version.hip or dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _as_loadable(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless its vectors are contiguous and its offsets fit into 32 bits."""
    span = max((length - 1) * stride for length, stride in zip(tensor.shape[1:3], tensor.stride()[1:3]))
    return tensor if tensor.stride(-1) == 1 and span < 2**30 else tensor.contiguous()


def _with_equal_strides(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors of one shape as `_as_loadable`, copied unless their strides are equal."""
    first, second = _as_loadable(first), _as_loadable(second)
    if first.stride() == second.stride():
        return first, second
    return first.contiguous(), second.contiguous()


def _combine_bias(bias: Tensor | None, hidden: Tensor) -> tuple[Tensor, int, int, int]:
    """Return the sum of biases and masks for each kind of chunk, with the strides of kinds, heads and rows.

    Args:
        bias: (h or 1, t, columns), or None.
        hidden: (kinds, columns).

    Returns:
        (kinds, h or 1, t, columns), or (kinds, columns) without a bias; and the three strides.
    """
    if bias is None:
        return hidden, hidden.stride(0), 0, 0
    bias = bias + hidden[:, None, None]
    return bias, bias.stride(0), bias.stride(1) if bias.shape[1] > 1 else 0, bias.stride(2)


def _head_stride(bias: Tensor | None) -> int:
    return bias.stride(0) if bias is not None and len(bias) > 1 else 0


def _is_aligned(tensor: Tensor) -> bool:
    """Return True if every vector begins at a multiple of 16 bytes, as the widest load instructions need."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    return not any(number % 16 for number in (tensor.data_ptr(), *strides))


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of images, heads and tokens of all tensors."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


fused_attention = register("fused", forward, backward, keeps_sums=True)
