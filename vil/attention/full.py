"""Full attention: every token attends to every token (Vaswani et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.base import Attention, GlobalBias
from vil.attention.maps import AttentionWeights, softmax_weights
from vil.attention.relative_position import position_biases, resize_offsets
from vil.config import ModelConfig, StageConfig


class FullAttention(Attention):
    """Full self-attention over global and local tokens, with an optional relative position bias.

    The bias is one number per head and offset (query − key, rows first) between local tokens, in a table of
    (2H−1) × (2W−1), and one per head and global token for the scores that involve global tokens. On a map of
    another size than the one it was built for, the table is resized bilinearly.
    """

    supports_relative_position = True

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(stage, config, size)
        self.query_key_value = nn.Linear(self.dim, 3 * self.dim)
        self.projection = nn.Linear(self.dim, self.dim)
        self.bias_table: nn.Parameter | None = None
        self.global_bias: GlobalBias | None = None
        if self.uses_relative_position(stage):
            self.bias_table = nn.Parameter(torch.empty(self.heads, 2 * size[0] - 1, 2 * size[1] - 1))
            nn.init.trunc_normal_(self.bias_table, std=0.02)
            if self.global_tokens:
                self.global_bias = GlobalBias(self.heads, self.global_tokens)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`."""
        query, key, value = self.split_heads_many(self.query_key_value(x), 3)  # (B, h, G+N, D)
        output = self.attend(query, key, value, self._bias(size, self.count_globals(x, size)))
        return self.output_dropout(self.projection(self.merge_heads(output)))

    def attention_weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.attention_weights`."""
        query, key, _ = self.split_heads_many(self.query_key_value(x), 3)  # (B, h, G+N, D)
        num_globals = self.count_globals(x, size)
        bias = self._bias(size, num_globals)
        weights = softmax_weights(query[:, :, queries], key, None if bias is None else bias[:, queries])
        return AttentionWeights.from_flat(weights, None, num_globals, size)

    @torch.no_grad()
    def resize(self, size: tuple[int, int]) -> None:
        """See `Attention.resize`; replaces the parameter of the bias table, unless it fits."""
        super().resize(size)
        if self.bias_table is not None:
            table = resize_offsets(self.bias_table, size)
            if table.shape != self.bias_table.shape:
                self.bias_table = nn.Parameter(table, self.bias_table.requires_grad)

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`."""
        tokens = self.global_tokens + size[0] * size[1]
        return 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim

    def _bias(self, size: tuple[int, int], num_globals: int) -> Tensor | None:
        """Return the biases (h, G+N, G+N) of all scores, or None without relative position."""
        if self.bias_table is None:
            return None
        table = resize_offsets(self.bias_table, size)
        local = position_biases(table, size).flatten(3).flatten(1, 2)  # (h, N, N)
        if self.global_bias is None:
            return F.pad(local, (num_globals, 0, num_globals, 0))
        num_locals = local.shape[-1]
        local_query = self.global_bias.local_query_bias(num_globals)[:, None, :].expand(-1, num_locals, -1)
        global_query = self.global_bias.global_query_bias(num_globals, num_locals)  # (h, G, G+N)
        return torch.cat([global_query, torch.cat([local_query, local], dim=-1)], dim=1)
