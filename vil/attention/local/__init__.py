"""2-D local attention with global keys: one function, several backends.

The map of H × W local tokens is divided into chunks of w × w tokens. A query sees the global tokens, its own
chunk and the chunks around it, in one softmax (Zhang et al., "Multi-Scale Vision Longformer", ICCV 2021,
section 3.2). `dense.py` is the reference; the other backends return the same. `choose` selects one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from vil.attention.local.chunked import chunked_attention
from vil.attention.local.dense import dense_attention
from vil.attention.local.gathered import gathered_attention
from vil.attention.local.geometry import Inputs, LocalAttentionSpec, Mask, keys_per_query
from vil.attention.tracing import is_autocast_enabled, is_exporting, is_transformed
from vil.errors import UserError

try:
    from vil.attention.local.fused import fused_attention, unsupported
except ImportError:  # Triton is available on Linux only
    fused_attention = chunked_attention  # unused: `unsupported` rejects every call

    def unsupported(
        device: torch.device, dtype: torch.dtype, head_dim: int, num_globals: int, dropout: float
    ) -> str | None:
        """Return the reason why the kernels cannot be used."""
        return "needs the package triton, which is not installed"


Neighbors = Literal["all", "self"] | int | Tensor
Backend = Callable[[Inputs, LocalAttentionSpec], Tensor]
BACKENDS: dict[str, Backend] = {
    "dense": dense_attention,
    "chunked": chunked_attention,
    "fused": fused_attention,
}
ENVIRONMENT = "VIL_ATTENTION_BACKEND"
"""Environment variable with the backend of every local attention that is set to `auto`."""

__all__ = [
    "BACKENDS",
    "ENVIRONMENT",
    "Mask",
    "Neighbors",
    "check_backend",
    "choose",
    "forced_backend",
    "keys_per_query",
    "local_attention",
]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor,
    global_value: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    mask: Mask = "chunk",
    neighbors: Neighbors = "all",
    bias_table: Tensor | None = None,
    global_bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute the attention of every local token to the global tokens and to the local tokens in its window.

    Under autocast, queries, keys and values are cast to its precision. Scores of half precision are float32.

    Args:
        query, key, value: (B, heads, H·W, D), row by row over the map. The query is scaled by D^−½ here.
        global_key, global_value: (B, heads, G, D); G may be 0.
        size: (H, W) of the map; the window need not divide it.
        window: side w of a chunk, at least 1.
        mask: `chunk`: all of the nine chunks, 9w² keys. `exact`: of these, the keys at most w rows and w
            columns away, (2w+1)². `cyclic`: chunks wrap around the edges of the map, so that with fewer than
            three on a side one chunk is visible more than once. Padding of the last chunk is hidden, except
            from the first chunk, which sees it backwards over the edge as keys and values of 0, as in the
            paper's code.
        neighbors: `all` eight; `self`, the query's own chunk only; or the number 0..7 of one neighbor (an
            int or a tensor with one element), visible besides the own chunk, row by row from the upper left.
        bias_table: (heads, 4w−1, 4w−1), added to the score at [query row − key row + 2w−1, and the same for
            columns]; for a chunk that wraps, the offset is that of its apparent position.
        global_bias: (heads, G), added to the scores of the global keys.
        dropout: probability of dropping an attention weight.
        backend: a name in `BACKENDS`, or `auto`: the backend in the environment variable
            VIL_ATTENTION_BACKEND, else the fastest that supports the call (see `choose`).

    Returns:
        (B, heads, H·W, D).

    Raises:
        ValueError: an invalid argument, shapes or devices that do not match, or a call that the requested
            backend does not support.
    """
    inputs = Inputs(query, key, value, global_key, global_value, bias_table, global_bias)
    _check_tensors(inputs, size)
    heads = query.shape[1]
    if mask not in get_args(Mask):
        raise ValueError(f"mask must be one of {', '.join(get_args(Mask))}, got {mask!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout}")
    if not isinstance(neighbors, Tensor) and neighbors not in ("all", "self", *range(8)):
        raise ValueError(f"neighbors must be all, self or a number from 0 to 7, got {neighbors!r}")
    if mask == "exact" and not (isinstance(neighbors, str) and neighbors == "all"):
        raise ValueError("the exact mask is defined for all neighbors only")
    offsets = (heads, 4 * window - 1, 4 * window - 1)
    if bias_table is not None and bias_table.shape != offsets:
        raise ValueError(f"bias_table must be {offsets}, got {tuple(bias_table.shape)}")
    shape = (heads, global_key.shape[2])
    if global_bias is not None and global_bias.shape != shape:
        raise ValueError(f"global_bias must be {shape}, got {tuple(global_bias.shape)}")

    if is_autocast_enabled(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        inputs = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in inputs._fields[:5]})
    if not isinstance(neighbors, str):
        inputs = inputs._replace(neighbor=torch.as_tensor(neighbors, device=query.device))
    spec = LocalAttentionSpec(size, window, mask, neighbors if isinstance(neighbors, str) else "one", dropout)
    return choose(inputs, spec, backend)(inputs, spec)


def choose(inputs: Inputs, window: LocalAttentionSpec, backend: str = "auto") -> Backend:
    """Return the backend for a call: the requested one, by argument or environment, or by this rule.

    1. In torch.export, ONNX export, torch.jit.trace, `torch.func.grad` and its relatives, and forward-mode
       differentiation: plain operators.
    2. On a GPU, if the kernels support the call (float32, bfloat16, float16; head width up to 128; up to 256
       global tokens, no dropout of attention weights): `fused`; if a kernel does not compile or launch, a
       warning and `chunked`.
    3. Else `chunked`. `dense` is never the fastest (measurements in docs/attention.md).

    Raises:
        ValueError: an unknown backend, or one that does not support the call.
    """
    query, num_globals = inputs.query, inputs.global_key.shape[2]
    call = (query.device, query.dtype, query.shape[3], num_globals, window.dropout)
    name = forced_backend(backend)
    if name is not None:
        check_backend(name, *call)
        if name != "dense" and is_transformed():
            reason = f"{name} has no derivatives in forward mode and in torch.func; use auto or dense"
            raise UserError("attention_backend", reason)
        return BACKENDS[name]
    if is_exporting() or is_transformed():
        return gathered_attention
    if query.is_cuda and unsupported(*call) is None:
        return fused_or_chunked_attention
    return chunked_attention


def fused_or_chunked_attention(inputs: Inputs, spec: LocalAttentionSpec) -> Tensor:
    """Return the output (B, h, N, D), from `chunked` if a kernel does not compile or launch."""
    return fused_attention(inputs, spec._replace(may_fall_back=True))


def forced_backend(backend: str) -> str | None:
    """Return the requested backend, by argument or, for `auto`, by the environment; None if there is none.

    Raises:
        UserError: an unknown backend.
    """
    source = ""
    if backend == "auto":
        source, backend = f"{ENVIRONMENT}: ", os.environ.get(ENVIRONMENT) or "auto"
    if backend == "auto":
        return None
    if backend not in BACKENDS:
        reason = f"{source}backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}"
        raise UserError("attention_backend", reason)
    return backend


def check_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, num_globals: int, dropout: float
) -> None:
    """Raise UserError if the backend `name` does not support such a call."""
    reason = unsupported(device, dtype, head_dim, num_globals, dropout) if name == "fused" else None
    if reason:
        raise UserError("attention_backend", f"the fused backend {reason}")


def _check_tensors(inputs: Inputs, size: tuple[int, int]) -> None:
    query, global_key = inputs.query, inputs.global_key
    if query.ndim != 4:
        raise ValueError(f"the query must be (batch, heads, tokens, head width), got {tuple(query.shape)}")
    batch, heads, tokens, width = query.shape
    if size[0] * size[1] != tokens:
        raise ValueError(f"a {size[0]}×{size[1]} map has {size[0] * size[1]} tokens, the query has {tokens}")
    global_shape = (batch, heads, global_key.shape[2] if global_key.ndim == 4 else "global tokens", width)
    shapes = [tuple(query.shape)] * 2 + [global_shape] * 2
    for name, tensor, shape in zip(inputs._fields[1:5], inputs[1:5], shapes):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be ({', '.join(map(str, shape))}), got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as the query, is on {tensor.device}")
        if tensor.dtype != query.dtype and not is_autocast_enabled(query):
            raise ValueError(f"{name} must be {query.dtype} as the query, is {tensor.dtype}")
