"""Full attention: every token attends to every token (Vaswani et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.base import Attention, AttentionOptions, GlobalBias
from vil.attention.weights import AttentionWeights, softmax_weights


class FullAttention(Attention):
    """Full self-attention over global and local tokens, with a relative position bias where asked for.

    The bias is one number per head and offset (query − key, rows first) between local tokens, in a table of
    (2H−1) × (2W−1), and one per head and global token for the scores that involve global tokens. On a map of
    another size than the one it was built for, the table is resized bilinearly.
    """

    has_relative_position = True

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], global_tokens: int, options: AttentionOptions
    ) -> None:
        super().__init__(dim, heads, size, global_tokens, options)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)
        self.bias_table: nn.Parameter | None = None
        self.global_bias: GlobalBias | None = None
        if options.relative_position:
            self.bias_table = nn.Parameter(torch.empty(heads, 2 * size[0] - 1, 2 * size[1] - 1))
            nn.init.trunc_normal_(self.bias_table, std=0.02)
            if global_tokens:
                self.global_bias = GlobalBias(heads, global_tokens)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`."""
        query, key, value = self.split_heads_many(self.query_key_value(x), 3)  # (B, h, G+N, D)
        output = self.attend(query, key, value, self._bias(size, self.count_globals(x, size)))
        return self.output_dropout(self.projection(self.merge_heads(output)))

    def weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.weights`."""
        query, key, _ = self.split_heads_many(self.query_key_value(x), 3)  # (B, h, G+N, D)
        globals_ = self.count_globals(x, size)
        bias = self._bias(size, globals_)
        weights = softmax_weights(query[:, :, queries], key, None if bias is None else bias[:, queries])
        return AttentionWeights.place(weights, None, globals_, size)

    @torch.no_grad()
    def resize(self, size: tuple[int, int]) -> None:
        """See `Attention.resize`; the table becomes another parameter."""
        super().resize(size)
        if self.bias_table is not None:
            self.bias_table = nn.Parameter(resize_offsets(self.bias_table, size))

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`."""
        tokens = self.global_tokens + size[0] * size[1]
        return 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim

    def _bias(self, size: tuple[int, int], globals_: int) -> Tensor | None:
        """(h, G+N, G+N), or None without relative position."""
        if self.bias_table is None:
            return None
        table = resize_offsets(self.bias_table, size)
        # Query i and key j along one axis are i − j apart: in the table turned around, the entries of query i
        # are one stretch, which `unfold` reads without a tensor of indices.
        stretches = table.flip(1, 2).unfold(1, size[0], 1).unfold(2, size[1], 1)  # (h, H, W, H, W)
        local = stretches.flip(1, 2).flatten(3).flatten(1, 2)  # (h, N, N)
        if self.global_bias is None:
            return F.pad(local, (globals_, 0, globals_, 0))
        locals_ = local.shape[-1]
        from_local = self.global_bias.of_local_queries(globals_)[:, None, :].expand(-1, locals_, -1)
        of_globals = self.global_bias.of_global_queries(globals_, locals_)  # (h, G, G+N)
        return torch.cat([of_globals, torch.cat([from_local, local], dim=-1)], dim=1)


def resize_offsets(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table of offsets (h, 2H'−1, 2W'−1), resized bilinearly to (h, 2H−1, 2W−1) for (H, W) = `size`."""
    target = (2 * size[0] - 1, 2 * size[1] - 1)
    if table.shape[1:] == target:
        return table
    return F.interpolate(table[None], target, mode="bilinear", align_corners=False)[0]
