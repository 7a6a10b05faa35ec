"""Global memory: local tokens attend to the global tokens (here: alone), global tokens to everything."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.base import Attention, AttentionOptions, GlobalBias
from vil.attention.weights import AttentionWeights, softmax_weights
from vil.config import ConfigError


class GlobalMemoryAttention(Attention):
    """Frame of both attentions with a global memory: projections, and the global tokens' own attention.

    Global tokens attend to all tokens with ordinary attention. They use the projections of the local tokens
    or, with `share_global_projection=False`, a query, key, value and output projection of their own, for
    which then all tokens are projected a second time.
    """

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], global_tokens: int, options: AttentionOptions
    ) -> None:
        super().__init__(dim, heads, size, global_tokens, options)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)
        self.shares_projection = options.share_global_projection or not global_tokens
        if not self.shares_projection:
            self.global_query = nn.Linear(dim, dim)
            self.global_key_value = nn.Linear(dim, 2 * dim)
            self.global_projection = nn.Linear(dim, dim)
        self.global_bias: GlobalBias | None = None
        if options.relative_position and global_tokens:
            self.global_bias = GlobalBias(heads, global_tokens)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`."""
        globals_ = self.count_globals(x, size)
        split = [globals_, x.shape[1] - globals_]
        key, value = self.split_heads_many(self.key_value(x), 2)  # (B, h, G+N, D)
        if self.shares_projection:
            global_query, query = self.split_heads(self.query(x)).split(split, dim=2)
        else:
            query = self.split_heads(self.query(x[:, globals_:]))
        global_key, local_key = key.split(split, dim=2)
        global_value, local_value = value.split(split, dim=2)
        local = self.attend_local(query, local_key, local_value, global_key, global_value, size)
        if not globals_:
            return self.output_dropout(self.projection(self.merge_heads(local)))
        if not self.shares_projection:
            global_query = self.split_heads(self.global_query(x[:, :globals_]))
            key, value = self.split_heads_many(self.global_key_value(x), 2)
        bias = None if self.global_bias is None else self.global_bias.of_global_queries(*split)
        memory = self.attend(global_query, key, value, bias)  # (B, h, G, D)
        if self.shares_projection:
            return self.output_dropout(self.projection(self.merge_heads(torch.cat([memory, local], dim=2))))
        memory = self.global_projection(self.merge_heads(memory))
        local = self.projection(self.merge_heads(local))
        return self.output_dropout(torch.cat([memory, local], dim=1))

    def weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.weights`."""
        globals_ = self.count_globals(x, size)
        of_globals = queries < globals_
        key, _ = self.split_heads_many(self.key_value(x), 2)  # (B, h, G+N, D)
        query = self.split_heads(self.query(x))
        local, local_seen = self.weigh_local(
            query[:, :, globals_:], key[:, :, globals_:], key[:, :, :globals_], size,
            queries[~of_globals] - globals_,
        )  # fmt: skip
        weights = local.new_zeros(*local.shape[:2], len(queries), local.shape[3])  # (B, h, n, G+N+R)
        seen = local_seen.new_ones(len(queries), local_seen.shape[1])
        weights[:, :, ~of_globals], seen[~of_globals] = local, local_seen
        if of_globals.any():
            if not self.shares_projection:
                query = self.split_heads(self.global_query(x[:, :globals_]))
                key, _ = self.split_heads_many(self.global_key_value(x), 2)
            bias = None
            if self.global_bias is not None:
                bias = self.global_bias.of_global_queries(globals_, x.shape[1] - globals_)
                bias = bias[:, queries[of_globals]]
            memory = softmax_weights(query[:, :, queries[of_globals]], key, bias)  # (B, h, …, G+N)
            memory = F.pad(memory, (0, weights.shape[-1] - memory.shape[-1]))
            weights[:, :, of_globals] = memory.to(weights.dtype)
        return AttentionWeights.place(weights, seen, globals_, size)

    @abstractmethod
    def attend_local(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        global_key: Tensor,
        global_value: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        """The local tokens' attention: (B, h, N, D) queries, keys, values and (B, h, G, D) global ones."""

    @abstractmethod
    def weigh_local(
        self, query: Tensor, key: Tensor, global_key: Tensor, size: tuple[int, int], queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weights by which `attend_local` sums up values in evaluation, for some queries.

        Args:
            query, key: (B, h, N, D) of the local tokens.
            global_key: (B, h, G, D).
            size: (H, W) of the map.
            queries: (n,) int64, places among the N.

        Returns:
            (B, h, n, G+N+R), with R weights that have no place on the map at the end; and (n, N) bool, which
            positions are seen.
        """

    @abstractmethod
    def local_keys(self) -> int:
        """Local keys that a local query sees, as the paper counts them."""

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`. Scores and sums of local queries: 2·N·(local keys + G)·C."""
        locals_ = size[0] * size[1]
        tokens = self.global_tokens + locals_
        projections = 4 * tokens * self.dim**2
        if not self.shares_projection:  # own query and output for G tokens, but keys and values of all twice
            projections += 2 * tokens * self.dim**2
        local = 2 * locals_ * (self.local_keys() + self.global_tokens) * self.dim
        memory = 2 * self.global_tokens * tokens * self.dim
        return projections + local + memory


class GlobalOnlyAttention(GlobalMemoryAttention):
    """Local tokens attend to the global tokens alone (ICCV 2021 paper, section 3.3, "global attention")."""

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], global_tokens: int, options: AttentionOptions
    ) -> None:
        if not global_tokens:
            raise ConfigError("global_tokens", "global_only attention needs at least one global token")
        super().__init__(dim, heads, size, global_tokens, options)

    def attend_local(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        global_key: Tensor,
        global_value: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        """See `GlobalMemoryAttention.attend_local`; local keys and values are not used."""
        return self.attend(query, global_key, global_value)

    def weigh_local(
        self, query: Tensor, key: Tensor, global_key: Tensor, size: tuple[int, int], queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `GlobalMemoryAttention.weigh_local`."""
        weights = softmax_weights(query[:, :, queries], global_key)  # (B, h, n, G)
        seen = torch.zeros(len(queries), key.shape[2], dtype=torch.bool, device=key.device)
        return F.pad(weights, (0, key.shape[2])), seen

    def local_keys(self) -> int:
        """None."""
        return 0
