"""Vision Longformer: 2-D local window and global memory (Zhang et al., ICCV 2021, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vil.attention.global_only import GlobalMemoryAttention
from vil.attention.local import (
    Mask,
    Neighbors,
    check_backend,
    forced_backend,
    keys_per_query,
    local_attention,
)
from vil.attention.local.dense import dense_weights
from vil.attention.local.geometry import Inputs, LocalAttentionSpec
from vil.attention.relative_position import resize_offsets
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError


class VisionLongformerAttention(GlobalMemoryAttention):
    """Local tokens attend to the global tokens and to a 2-D window, at a cost linear in the number of tokens.

    In training with `neighbors="random"`, each forward pass draws one of the eight neighboring chunks, and a
    query sees its own chunk and that one: the paper's random shift. `set_neighbors` changes the neighbors at
    any time, also to a fixed one, 0..7. Evaluation uses all eight, except with `self`.
    """

    supports_relative_position = True

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(stage, config, size)
        self.window = stage.window
        self.mask: Mask = config.mask or "chunk"
        self.neighbors: Literal["all", "self", "random"] | int = config.neighbors or "all"
        self.backend = config.attention_backend
        if self.mask == "exact" and self.neighbors != "all":
            raise UserError("neighbors", "the exact mask is defined for all neighbors only")
        forced_backend(self.backend)  # raises for a wrong environment variable now, not in the first step
        self.bias_table: nn.Parameter | None = None
        if self.uses_relative_position(stage):
            side = 4 * self.window - 1
            self.bias_table = nn.Parameter(torch.empty(self.heads, side, side))
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def attend_local(self, inputs: Inputs, size: tuple[int, int]) -> Tensor:
        """See `GlobalMemoryAttention.attend_local`."""
        neighbors: Neighbors = "all"
        if self.neighbors == "random":
            if self.training:  # drawn on the device, to avoid a synchronization
                neighbors = torch.randint(8, (1,), device=inputs.query.device)
        elif self.training or self.neighbors == "self":
            neighbors = self.neighbors
        return local_attention(
            *inputs[:5],
            size=size,
            window=self.window,
            mask=self.mask,
            neighbors=neighbors,
            bias_table=self.bias_table,
            global_bias=self._global_bias(inputs),
            dropout=self.dropout_p(),
            backend=self.backend,
        )

    def local_attention_weights(
        self, inputs: Inputs, size: tuple[int, int], queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `GlobalMemoryAttention.local_attention_weights`."""
        inputs = inputs._replace(bias_table=self.bias_table, global_bias=self._global_bias(inputs))
        neighbors: Literal["all", "self"] = "self" if self.neighbors == "self" else "all"
        return dense_weights(inputs, LocalAttentionSpec(size, self.window, self.mask, neighbors), queries)

    def _global_bias(self, inputs: Inputs) -> Tensor | None:
        num_globals = inputs.global_key.shape[2]
        return None if self.global_bias is None else self.global_bias.local_query_bias(num_globals)

    def set_neighbors(self, neighbors: Literal["all", "self", "random"] | int) -> None:
        """See `Attention.set_neighbors`. Raise ValueError for the exact mask unless `all`."""
        if self.mask == "exact" and neighbors != "all":
            raise ValueError("the exact mask is defined for all neighbors only")
        self.neighbors = neighbors

    @torch.no_grad()
    def set_window(self, window: int) -> None:
        """See `Attention.set_window`; replaces the parameter of the bias table, unless it fits."""
        self.window = window
        if self.bias_table is not None:
            table = resize_offsets(self.bias_table, (2 * window, 2 * window))
            if table.shape != self.bias_table.shape:
                self.bias_table = nn.Parameter(table, self.bias_table.requires_grad)

    def check_device(self, device: torch.device) -> None:
        """See `Attention.check_device`."""
        backend = forced_backend(self.backend)
        call = (device, torch.float32, self.head_dim, self.global_tokens, self.attention_dropout)
        if backend is not None:
            check_backend(backend, *call)

    def local_keys(self) -> int:
        """Return 9w² for the chunk and cyclic masks, (2w+1)² for exact, w² with `neighbors="self"`."""
        return keys_per_query(self.window, self.mask, "self" if self.neighbors == "self" else "all")
