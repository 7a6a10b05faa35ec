"""Spatial reduction: keys and values from a smaller map (Wang et al., "Pyramid Vision Transformer", 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.base import Attention
from vil.attention.maps import AttentionWeights, softmax_weights
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError


class SpatialReductionAttention(Attention):
    """Every token attends to the global tokens and to the map after an r × r convolution of stride r.

    The convolution has no bias; an instance norm without weights follows. Rows and columns beyond the last
    multiple of r are dropped.
    """

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(stage, config, size)
        if stage.reduction > min(size):
            side = min(size)
            raise UserError("reduction", f"must be at most {side}, the map's side, got {stage.reduction}")
        dim = self.dim
        self.reduction = stage.reduction
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, self.reduction, stride=self.reduction, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`."""
        query_input, map_input = self.projection_inputs(x, 2)
        query = self.split_heads(self.query(query_input))  # (B, h, G+N, D)
        key, value = self._keys_values(x, map_input, size)
        output = self.attend(query, key, value)
        return self.output_dropout(self.projection(self.merge_heads(output)))

    def attention_weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.attention_weights`; local keys are cells of r × r positions."""
        query = self.split_heads(self.query(x[:, queries]))  # (B, h, n, D)
        key, _ = self._keys_values(x, x, size)
        cells = (size[0] // self.reduction, size[1] // self.reduction)
        weights = softmax_weights(query, key)
        return AttentionWeights.from_flat(weights, None, self.count_globals(x, size), cells, self.reduction)

    def _keys_values(self, x: Tensor, map_input: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return keys and values (B, h, G+N', D) of the global tokens and the reduced map.

        `map_input` is x, possibly in half precision, which the convolution would convert it to.
        """
        num_globals = self.count_globals(x, size)
        grid = map_input[:, num_globals:].transpose(1, 2).unflatten(2, size)  # (B, C, H, W)
        reduced = self.reduce(grid).flatten(2)  # (B, C, N')
        # Instance norm without weights; F.instance_norm refuses a map of a single position.
        reduced = F.layer_norm(reduced, reduced.shape[-1:]).transpose(1, 2)  # (B, N', C)
        keys = torch.cat([x[:, :num_globals], reduced.to(x.dtype)], dim=1)
        return self.split_heads_many(self.key_value(keys), 2)

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`."""
        tokens = self.global_tokens + size[0] * size[1]
        reduced = (size[0] // self.reduction) * (size[1] // self.reduction)
        keys = self.global_tokens + reduced
        convolution = reduced * self.reduction**2 * self.dim**2
        return 2 * (tokens + keys) * self.dim**2 + convolution + 2 * tokens * keys * self.dim
