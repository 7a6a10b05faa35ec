"""Linformer: keys and values projected along the token axis (Wang et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vil.attention.base import Attention
from vil.attention.maps import AttentionWeights, softmax_weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError


class LinformerAttention(Attention):
    """Every token attends to k = `projected_tokens` learned mixtures of all tokens, global ones included.

    The mixtures are initialized uniformly in ±k^−½, as in the paper's code. Their number of tokens is fixed,
    so the map must have the size that the module was built for.
    """

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(stage, config, size)
        dim, tokens = self.dim, self.global_tokens + size[0] * size[1]
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)
        self.key_mixture = nn.Parameter(torch.empty(tokens, stage.projected_tokens))
        self.value_mixture: nn.Parameter | None = None
        bound = stage.projected_tokens**-0.5
        nn.init.uniform_(self.key_mixture, -bound, bound)
        if not config.share_key_value_projection:
            self.value_mixture = nn.Parameter(torch.empty(tokens, stage.projected_tokens))
            nn.init.uniform_(self.value_mixture, -bound, bound)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`. Raise ValueError if the number of tokens differs."""
        self._check_tokens(x, size)
        query_input, key_input = self.projection_inputs(x, 2)
        query = self.split_heads(self.query(query_input))  # (B, h, G+N, D)
        key, value = self.key_value(key_input).chunk(2, dim=-1)  # (B, G+N, C)
        value_mixture = self.key_mixture if self.value_mixture is None else self.value_mixture
        key = self.split_heads(self.key_mixture.t() @ key)  # (B, h, k, D)
        value = self.split_heads(value_mixture.t() @ value)
        output = self.attend(query, key, value)
        return self.output_dropout(self.projection(self.merge_heads(output)))

    def attention_weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.attention_weights`. The k keys are mixtures and have no position on the map."""
        query = self.split_heads(self.query(x[:, queries]))  # (B, h, n, D)
        key = self.key_mixture.t() @ self.key_value(x).chunk(2, dim=-1)[0]  # (B, k, C)
        weights = softmax_weights(query, self.split_heads(key))
        return AttentionWeights.from_flat(weights, None, 0, (0, 0))

    def _check_tokens(self, x: Tensor, size: tuple[int, int]) -> None:
        if tuple(size) != tuple(self.size):
            built, got = ("×".join(map(str, sides)) for sides in (self.size, size))
            raise ValueError(f"linformer attention was built for a map of {built} tokens, got {got}")
        external = x.shape[1] - self.key_mixture.shape[0]
        if external:
            raise ValueError(
                f"linformer attention has a fixed number of tokens, got {external} external ones"
            )

    def check_resize(self, size: tuple[int, int]) -> None:
        """See `Attention.check_resize`: mixtures of tokens cannot be resized."""
        if tuple(size) != tuple(self.size):
            raise UserError("image_size", "linformer attention has a fixed number of tokens")

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`."""
        tokens = self.global_tokens + size[0] * size[1]
        projected = self.key_mixture.shape[1]
        return 4 * tokens * self.dim**2 + 4 * tokens * projected * self.dim
