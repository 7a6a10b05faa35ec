"""2-D local attention with global keys: one function, several backends.

The map of H × W local tokens is cut into chunks of w × w tokens. A query sees the global tokens, its own
chunk and the chunks around it, in one softmax (Zhang et al., "Multi-Scale Vision Longformer", ICCV 2021,
section 3.2). `dense.py` is the definition; every other backend equals it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from vil.attention.local.chunked import chunked_attention
from vil.attention.local.dense import dense_attention

Mask = Literal["chunk", "exact", "cyclic"]
Neighbors = Literal["all", "self"] | int | Tensor
BACKENDS: dict[str, Callable[..., Tensor]] = {"dense": dense_attention, "chunked": chunked_attention}


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
        backend: `auto`, or a name in `BACKENDS`.

    Returns:
        (B, heads, H·W, D).

    Raises:
        ValueError: an argument is none of the above, or shapes do not fit; the text says what is allowed.
    """
    heads, tokens = query.shape[1], query.shape[2]
    if mask not in get_args(Mask):
        raise ValueError(f"mask must be one of {', '.join(get_args(Mask))}, got {mask!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if size[0] * size[1] != tokens:
        raise ValueError(f"a {size[0]}×{size[1]} map has {size[0] * size[1]} tokens, the query has {tokens}")
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
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    attend = BACKENDS["chunked" if backend == "auto" else backend]
    return attend(
        query, key, value, global_key, global_value,
        size=size, window=window, mask=mask, neighbors=neighbors,
        bias_table=bias_table, global_bias=global_bias, dropout=dropout,
    )  # fmt: skip


def keys_per_query(
    window: int, mask: Mask = "chunk", neighbors: Neighbors | Literal["random"] = "all"
) -> int:
    """Local keys that a query far from the edges sees, as the paper counts them: 9w² for the chunk mask."""
    if mask == "exact":
        return (2 * window + 1) ** 2
    if isinstance(neighbors, str):
        return {"all": 9, "self": 1, "random": 2}[neighbors] * window**2
    return 2 * window**2
