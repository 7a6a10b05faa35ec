"""Attention with a global memory, and its simplest form: local tokens attend to the global tokens alone."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.base import Attention, GlobalBias
from vil.attention.local.geometry import Inputs
from vil.attention.maps import AttentionWeights, softmax_weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError


class GlobalMemoryAttention(Attention):
    """Base class of the attentions with a global memory: projections, and the attention of global tokens.

    Global tokens attend to all tokens with ordinary attention. They use the projections of the local tokens
    or, with `share_global_projection: false`, separate query, key, value and output projections, for which
    all tokens are projected a second time.
    """

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(stage, config, size)
        dim = self.dim
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)
        self.shares_projection = config.share_global_projection or not self.global_tokens
        if not self.shares_projection:
            self.global_query = nn.Linear(dim, dim)
            self.global_key_value = nn.Linear(dim, 2 * dim)
            self.global_projection = nn.Linear(dim, dim)
        self.global_bias: GlobalBias | None = None
        if self.uses_relative_position(stage) and self.global_tokens:
            self.global_bias = GlobalBias(self.heads, self.global_tokens)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`."""
        num_globals = self.count_globals(x, size)
        split = [num_globals, x.shape[1] - num_globals]
        inputs = self.projection_inputs(x, 2 if self.shares_projection else 4)
        key, value = self.split_projection(self.key_value(inputs[0]), 2, num_globals)
        if self.shares_projection:
            (queries,) = self.split_projection(self.query(inputs[1]), 1, num_globals)
            global_query, query = queries.global_tokens, queries.local_tokens
        else:
            query = self.split_heads(self.query(_tokens(inputs[1], slice(num_globals, None), x)))
        local_keys = (key.local_tokens, value.local_tokens)
        global_keys = (key.global_tokens, value.global_tokens)
        local = self.attend_local(Inputs(query, *local_keys, *global_keys), size)
        if not num_globals:
            return self.output_dropout(self.projection(self.merge_heads(local)))
        if not self.shares_projection:
            global_query = self.split_heads(self.global_query(_tokens(inputs[2], slice(num_globals), x)))
            key, value = self.split_projection(self.global_key_value(inputs[3]), 2, num_globals)
        bias = None if self.global_bias is None else self.global_bias.global_query_bias(*split)
        memory = self.attend(global_query, key.all_tokens, value.all_tokens, bias)  # (B, h, G, D)
        if self.shares_projection:
            return self.output_dropout(self.projection(self.merge_heads(torch.cat([memory, local], dim=2))))
        memory = self.global_projection(self.merge_heads(memory))
        local = self.projection(self.merge_heads(local))
        return self.output_dropout(torch.cat([memory, local], dim=1))

    def attention_weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.attention_weights`."""
        num_globals = self.count_globals(x, size)
        is_global = queries < num_globals
        key, _ = self.split_heads_many(self.key_value(x), 2)  # (B, h, G+N, D)
        query = self.split_heads(self.query(x))
        global_key, local_key = key[:, :, :num_globals], key[:, :, num_globals:]
        inputs = Inputs(query[:, :, num_globals:], local_key, local_key, global_key, global_key)
        local, local_seen = self.local_attention_weights(inputs, size, queries[~is_global] - num_globals)
        weights = local.new_zeros(*local.shape[:2], len(queries), local.shape[3])  # (B, h, n, G+N+R)
        seen = local_seen.new_ones(len(queries), local_seen.shape[1])
        weights[:, :, ~is_global], seen[~is_global] = local, local_seen
        if is_global.any():
            if not self.shares_projection:
                query = self.split_heads(self.global_query(x[:, :num_globals]))
                key, _ = self.split_heads_many(self.global_key_value(x), 2)
            bias = None
            if self.global_bias is not None:
                bias = self.global_bias.global_query_bias(num_globals, x.shape[1] - num_globals)
                bias = bias[:, queries[is_global]]
            memory = softmax_weights(query[:, :, queries[is_global]], key, bias)  # (B, h, …, G+N)
            memory = F.pad(memory, (0, weights.shape[-1] - memory.shape[-1]))
            weights[:, :, is_global] = memory.to(weights.dtype)
        return AttentionWeights.from_flat(weights, seen, num_globals, size)

    @abstractmethod
    def attend_local(self, inputs: Inputs, size: tuple[int, int]) -> Tensor:
        """Return the output (B, h, N, D) of local queries; `inputs` has no biases, (H, W) = `size`."""

    @abstractmethod
    def local_attention_weights(
        self, inputs: Inputs, size: tuple[int, int], queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weights of `attend_local` for some queries in evaluation.

        Args:
            inputs: as for `attend_local`; values are not read.
            size: (H, W) of the map.
            queries: (n,) int64, indices among the N local tokens.

        Returns:
            (B, h, n, G+N+R), the last R weights of keys without a position on the map; and (n, N) bool, True
            for visible positions.
        """

    @abstractmethod
    def local_keys(self) -> int:
        """Return the number of local keys per local query, as the paper counts them."""

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`. Scores and sums of local queries: 2·N·(local keys + G)·C."""
        num_locals = size[0] * size[1]
        tokens = self.global_tokens + num_locals
        projections = 4 * tokens * self.dim**2
        if not self.shares_projection:  # query and output of G tokens, keys and values of all tokens again
            projections += 2 * tokens * self.dim**2
        local = 2 * num_locals * (self.local_keys() + self.global_tokens) * self.dim
        memory = 2 * self.global_tokens * tokens * self.dim
        return projections + local + memory


def _tokens(converted: Tensor, tokens: slice, x: Tensor) -> Tensor:
    """Return some tokens of `converted` (B, T, C), contiguous unless it is x, as autocast would convert them.

    A linear layer adds its bias before rounding only if the input is contiguous.
    """
    return x[:, tokens] if converted is x else converted[:, tokens].contiguous()


class GlobalOnlyAttention(GlobalMemoryAttention):
    """Local tokens attend to the global tokens alone (ICCV 2021 paper, section 3.3, "global attention")."""

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        if not stage.global_tokens:
            raise UserError("global_tokens", "global_only attention needs at least one global token")
        super().__init__(stage, config, size)

    def attend_local(self, inputs: Inputs, size: tuple[int, int]) -> Tensor:
        """See `GlobalMemoryAttention.attend_local`; local keys and values are ignored."""
        return self.attend(inputs.query, inputs.global_key, inputs.global_value)

    def local_attention_weights(
        self, inputs: Inputs, size: tuple[int, int], queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `GlobalMemoryAttention.local_attention_weights`."""
        weights = softmax_weights(inputs.query[:, :, queries], inputs.global_key)  # (B, h, n, G)
        num_locals = inputs.key.shape[2]
        seen = torch.zeros(len(queries), num_locals, dtype=torch.bool, device=weights.device)
        return F.pad(weights, (0, num_locals)), seen

    def local_keys(self) -> int:
        """Return 0."""
        return 0
