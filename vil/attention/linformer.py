"""Linformer: keys and values projected along the token axis (Wang et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vil.attention.base import Attention, AttentionOptions
from vil.attention.weights import AttentionWeights, softmax_weights
from vil.config import ConfigError


class LinformerAttention(Attention):
    """Every token attends to k learned mixtures of all tokens, the global ones included.

    The mixtures start uniformly distributed in ±k^−½, as in the paper's code. They belong to one number of
    tokens, so the map must have the size that the module was built for.
    """

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], global_tokens: int, options: AttentionOptions
    ) -> None:
        super().__init__(dim, heads, size, global_tokens, options)
        if options.projected_tokens < 1:
            raise ConfigError("projected_tokens", f"must be at least 1, got {options.projected_tokens}")
        tokens = global_tokens + size[0] * size[1]
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)
        self.key_mixture = nn.Parameter(torch.empty(tokens, options.projected_tokens))
        self.value_mixture: nn.Parameter | None = None
        bound = options.projected_tokens**-0.5
        nn.init.uniform_(self.key_mixture, -bound, bound)
        if not options.share_key_value_projection:
            self.value_mixture = nn.Parameter(torch.empty(tokens, options.projected_tokens))
            nn.init.uniform_(self.value_mixture, -bound, bound)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`. Raises ValueError for another map than the one it was built for."""
        self._check_tokens(x, size)
        query = self.split_heads(self.query(x))  # (B, h, G+N, D)
        key, value = self.key_value(x).chunk(2, dim=-1)  # (B, G+N, C)
        value_mixture = self.key_mixture if self.value_mixture is None else self.value_mixture
        key = self.split_heads(self.key_mixture.t() @ key)  # (B, h, k, D)
        value = self.split_heads(value_mixture.t() @ value)
        output = self.attend(query, key, value)
        return self.output_dropout(self.projection(self.merge_heads(output)))

    def weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.weights`. Keys are k mixtures of all tokens; none has a place on the map.

        Raises ValueError as `forward`.
        """
        self._check_tokens(x, size)
        query = self.split_heads(self.query(x[:, queries]))  # (B, h, n, D)
        key = self.key_mixture.t() @ self.key_value(x).chunk(2, dim=-1)[0]  # (B, k, C)
        weights = softmax_weights(query, self.split_heads(key))
        return AttentionWeights.place(weights, None, 0, (0, 0))

    def _check_tokens(self, x: Tensor, size: tuple[int, int]) -> None:
        if tuple(size) != tuple(self.size):
            built, got = ("×".join(map(str, sides)) for sides in (self.size, size))
            raise ValueError(f"linformer attention was built for a map of {built} tokens, got {got}")
        if x.shape[1] != self.key_mixture.shape[0]:
            further = x.shape[1] - self.key_mixture.shape[0]
            raise ValueError(f"linformer attention is bound to its tokens, got {further} more from outside")

    def check_resize(self, size: tuple[int, int]) -> None:
        """See `Attention.check_resize`: mixtures of tokens have no meaning on another map."""
        if tuple(size) != tuple(self.size):
            raise ConfigError("image_size", "linformer attention is bound to its number of tokens")

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`."""
        tokens = self.global_tokens + size[0] * size[1]
        mixed = self.key_mixture.shape[1]
        return 4 * tokens * self.dim**2 + 4 * tokens * mixed * self.dim
