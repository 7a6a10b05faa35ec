"""2-D local attention with global keys: one function, several backends.

The map of H × W local tokens is cut into chunks of w × w tokens. A query sees the global tokens, its own
chunk and the chunks around it, in one softmax (Zhang et al., "Multi-Scale Vision Longformer", ICCV 2021,
section 3.2). `dense.py` is the definition; every other backend equals it. `choose` says which one runs.
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
from vil.attention.local.geometry import Inputs, Mask, Window, keys_per_query
from vil.attention.tracing import has_autocast, is_exporting
from vil.config import ConfigError

try:
    from vil.attention.local.fused import fused_attention, fused_or_chunked_attention, unsupported
except ImportError:  # Triton is made for Linux alone
    fused_attention = fused_or_chunked_attention = (
        chunked_attention  # never called: `unsupported` is asked first
    )

    def unsupported(
        device: torch.device, dtype: torch.dtype, head_width: int, globals_: int, dropout: float
    ) -> str | None:
        """Why the kernels cannot be used."""
        return "needs the package triton, which is not installed"


Neighbors = Literal["all", "self"] | int | Tensor
Backend = Callable[[Inputs, Window], Tensor]
BACKENDS: dict[str, Backend] = {
    "dense": dense_attention,
    "chunked": chunked_attention,
    "fused": fused_attention,
}
ENVIRONMENT = "VIL_ATTENTION_BACKEND"
"""Variable that names a backend for every local attention whose own is `auto`."""

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
    """Attention of every local token to the global tokens and to the local tokens in its window.

    Under autocast, queries, keys and values are cast to its precision. Scores of the half precisions are kept
    in float32.

    Args:
        query, key, value: (B, heads, H·W, D), row by row over the map. The query is scaled by D^−½ here.
        global_key, global_value: (B, heads, G, D); G may be 0.
        size: (H, W) of the map; any size is allowed, also one that the window does not divide.
        window: side w of a chunk, ≥ 1.
        mask: `chunk`: the whole of the nine chunks, 9w² keys. `exact`: of these, the keys at most w rows
            and w columns away, (2w+1)². `cyclic`: chunks wrap around the map's edges, so that with fewer
            than three on a side one chunk is seen more than once; the padding that completes the last chunk
            is hidden, except from the first chunk looking back over the edge, to which it shows as keys and
            values of 0.
        neighbors: `all` eight; `self`, the own chunk only; or the number 0..7 of one neighbour (an int, or
            a tensor with one element) that is seen beside the own chunk, counted row by row from the upper
            left.
        bias_table: (heads, 4w−1, 4w−1), added to the score at [query row − key row + 2w−1, the same for
            columns]; a chunk seen over the edge counts from where it appears, not from where it is.
        global_bias: (heads, G), added to the scores of the global keys.
        dropout: probability of dropping an attention weight.
        backend: a name in `BACKENDS`, or `auto`: what the environment's VIL_ATTENTION_BACKEND names, and
            without it the fastest that can do it (see `choose`).

    Returns:
        (B, heads, H·W, D).

    Raises:
        ValueError: an argument is none of the above, shapes or devices do not fit, or the backend that is
            asked for by name cannot do it; the text says what is allowed.
    """
    _check_tensors(query, key, value, global_key, global_value, size)
    heads = query.shape[1]
    if mask not in get_args(Mask):
        raise ValueError(f"mask must be one of {', '.join(get_args(Mask))}, got {mask!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout}")
    if isinstance(neighbors, str) and neighbors not in ("all", "self"):
        raise ValueError(f"neighbors must be all, self or a number from 0 to 7, got {neighbors!r}")
    if isinstance(neighbors, int) and not 0 <= neighbors <= 7:
        raise ValueError(f"neighbors must be all, self or a number from 0 to 7, got {neighbors}")
    if mask == "exact" and not (isinstance(neighbors, str) and neighbors == "all"):
        raise ValueError("the exact window is defined for all neighbors only")
    offsets = (heads, 4 * window - 1, 4 * window - 1)
    if bias_table is not None and bias_table.shape != offsets:
        raise ValueError(f"bias_table must be {offsets}, got {tuple(bias_table.shape)}")
    if global_bias is not None and global_bias.shape != (heads, global_key.shape[2]):
        shape = (heads, global_key.shape[2])
        raise ValueError(f"global_bias must be {shape}, got {tuple(global_bias.shape)}")

    if _autocasts(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        global_key, global_value = global_key.to(dtype), global_value.to(dtype)
    one = None if isinstance(neighbors, str) else torch.as_tensor(neighbors, device=query.device)
    inputs = Inputs(query, key, value, global_key, global_value, bias_table, global_bias, one)
    problem = Window(size, window, mask, neighbors if isinstance(neighbors, str) else "one", dropout)
    return choose(inputs, problem, backend)(inputs, problem)


def choose(inputs: Inputs, window: Window, backend: str = "auto") -> Backend:
    """The backend for a call: the one that is asked for by name, here or by the environment; or by this rule.

    1. While a graph is written down for use elsewhere (torch.export, ONNX, torch.jit.trace): plain operators.
    2. On a GPU, for what the kernels support (float32, bfloat16 and float16, head width up to 128, up to 256
       global tokens, no dropout of attention weights): `fused`; where a kernel does not compile or launch, a
       warning and `chunked`.
    3. Else `chunked`. `dense` is never the fastest (docs/attention.md has the measurements).

    Raises:
        ValueError: there is none of that name, or it cannot do this.
    """
    query, globals_ = inputs.query, inputs.global_key.shape[2]
    limits = (query.device, query.dtype, query.shape[3], globals_, window.dropout)
    name = forced_backend(backend)
    if name is not None:
        check_backend(name, *limits)
        return BACKENDS[name]
    if is_exporting():
        return gathered_attention
    if query.is_cuda and unsupported(*limits) is None:
        return fused_or_chunked_attention
    return chunked_attention


def forced_backend(backend: str) -> str | None:
    """The backend that is asked for by name, or by the environment for `auto`; None where the choice is free.

    Raises:
        ConfigError: there is none of that name.
    """
    source = ""
    if backend == "auto":
        source, backend = f"{ENVIRONMENT}: ", os.environ.get(ENVIRONMENT) or "auto"
    if backend == "auto":
        return None
    if backend not in BACKENDS:
        reason = f"{source}backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}"
        raise ConfigError("attention_backend", reason)
    return backend


def check_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_width: int, globals_: int, dropout: float
) -> None:
    """Raises ConfigError where the backend of that name cannot do this."""
    reason = unsupported(device, dtype, head_width, globals_, dropout) if name == "fused" else None
    if reason:
        raise ConfigError("attention_backend", f"the fused backend {reason}")


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, global_key: Tensor, global_value: Tensor, size: tuple[int, int]
) -> None:
    if query.ndim != 4:
        raise ValueError(f"the query must be (batch, heads, tokens, head width), got {tuple(query.shape)}")
    batch, heads, tokens, width = query.shape
    if size[0] * size[1] != tokens:
        raise ValueError(f"a {size[0]}×{size[1]} map has {size[0] * size[1]} tokens, the query has {tokens}")
    memory = (batch, heads, global_key.shape[2] if global_key.ndim == 4 else "global tokens", width)
    for name, tensor, shape in (
        ("key", key, tuple(query.shape)),
        ("value", value, tuple(query.shape)),
        ("global_key", global_key, memory),
        ("global_value", global_value, memory),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be ({', '.join(map(str, shape))}), got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as the query, is on {tensor.device}")
        if tensor.dtype != query.dtype and not _autocasts(query):
            raise ValueError(f"{name} must be {query.dtype} as the query, is {tensor.dtype}")


def _autocasts(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return has_autocast(kind) and torch.is_autocast_enabled(kind)
