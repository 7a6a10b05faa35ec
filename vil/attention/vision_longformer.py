"""Vision Longformer: 2-D local window and global memory (Zhang et al., ICCV 2021, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vil.attention.base import AttentionOptions
from vil.attention.global_only import GlobalMemoryAttention
from vil.attention.local import Neighbors, check_backend, forced_backend, keys_per_query, local_attention
from vil.attention.local.dense import dense_weights
from vil.attention.local.geometry import Inputs, Window
from vil.config import ConfigError


class VisionLongformerAttention(GlobalMemoryAttention):
    """Local tokens attend to the global tokens and to a 2-D window; cost is linear in the number of tokens.

    While training with `neighbors="random"`, each forward pass draws one of the eight neighbouring chunks,
    and a query sees that one beside its own: the paper's random shift. `neighbors` may be changed at any
    time, also to a number 0..7 that shows every query the same neighbour. Evaluation sees all eight, except
    with `self`.
    """

    has_relative_position = True

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], global_tokens: int, options: AttentionOptions
    ) -> None:
        super().__init__(dim, heads, size, global_tokens, options)
        if options.window < 1:
            raise ConfigError("window", f"must be at least 1, got {options.window}")
        if options.mask == "exact" and options.neighbors != "all":
            raise ConfigError("neighbors", "the exact mask is defined for all neighbors only")
        forced_backend(options.backend)  # raises here and not in the first step
        self.window = options.window
        self.mask = options.mask
        self.neighbors: Literal["all", "self", "random"] | int = options.neighbors
        self.backend = options.backend
        self.bias_table: nn.Parameter | None = None
        if options.relative_position:
            side = 4 * self.window - 1
            self.bias_table = nn.Parameter(torch.empty(heads, side, side))
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def attend_local(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        global_key: Tensor,
        global_value: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        """See `GlobalMemoryAttention.attend_local`."""
        neighbors: Neighbors = "all"
        if self.neighbors == "random":
            if self.training:  # drawn on the device, so that the host need not wait for it
                neighbors = torch.randint(8, (1,), device=query.device)
        elif self.training or self.neighbors == "self":
            neighbors = self.neighbors
        return local_attention(
            query,
            key,
            value,
            global_key,
            global_value,
            size=size,
            window=self.window,
            mask=self.mask,
            neighbors=neighbors,
            bias_table=self.bias_table,
            global_bias=self._bias_of_globals(global_key.shape[2]),
            dropout=self.dropout_p(),
            backend=self.backend,
        )

    def weigh_local(
        self, query: Tensor, key: Tensor, global_key: Tensor, size: tuple[int, int], queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `GlobalMemoryAttention.weigh_local`."""
        bias = self._bias_of_globals(global_key.shape[2])
        inputs = Inputs(query, key, key, global_key, global_key, self.bias_table, bias)  # values are not read
        neighbors: Literal["all", "self"] = "self" if self.neighbors == "self" else "all"
        return dense_weights(inputs, Window(size, self.window, self.mask, neighbors), queries)

    def _bias_of_globals(self, globals_: int) -> Tensor | None:
        return None if self.global_bias is None else self.global_bias.of_local_queries(globals_)

    def set_neighbors(self, neighbors: Literal["all", "self", "random"] | int) -> None:
        """See `Attention.set_neighbors`. Raises ValueError for the exact mask unless `all`."""
        if self.mask == "exact" and neighbors != "all":
            raise ValueError("the exact window is defined for all neighbors only")
        self.neighbors = neighbors

    def check_device(self, device: torch.device) -> None:
        """See `Attention.check_device`."""
        backend = forced_backend(self.backend)
        if backend is not None:
            check_backend(
                backend, device, torch.float32, self.head_dim, self.global_tokens, self.attention_dropout
            )

    def local_keys(self) -> int:
        """9w² for the chunk and cyclic masks, (2w+1)² for exact; w² where only the own chunk is seen."""
        return keys_per_query(self.window, self.mask, "self" if self.neighbors == "self" else "all")
