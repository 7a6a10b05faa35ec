"""Attention weights of chosen queries, split into global tokens, the map, and other keys.

Legend: B batch, h heads, n queries, G global tokens, H × W the map, N = H·W, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """Attention weights of n queries. Those of one query and head, over all keys, sum to 1.

    Attributes:
        to_globals: (B, h, n, G), weights of the global tokens.
        to_map: (B, h, n, H, W), weights of the map's positions. With spatial reduction, whose keys are cells
            of r × r positions, (B, h, n, H // r, W // r). (B, h, n, 0, 0) if keys have no position.
        to_rest: (B, h, n, R), weights of keys without a position: the k mixtures of linformer, or one number
            for the padding that the cyclic mask includes; else R = 0.
        seen: (n, …) bool, the last dimensions as in `to_map`: True for visible keys, however small their
            weight.
        cell: side r of a cell, in positions; 1 except with spatial reduction.
    """

    to_globals: Tensor
    to_map: Tensor
    to_rest: Tensor
    seen: Tensor
    cell: int = 1

    @property
    def has_positions(self) -> bool:
        """True if keys have positions on the map; those of linformer have none."""
        return self.seen.shape[1] > 0

    @classmethod
    def from_flat(
        cls, weights: Tensor, seen: Tensor | None, num_globals: int, size: tuple[int, int], cell: int = 1
    ) -> AttentionWeights:
        """Split weights (B, h, n, G + H·W + R) into those of global tokens, of the map, and the rest.

        Args:
            weights: of all keys, in this order.
            seen: (n, H·W) bool; None if every query sees the whole map.
            num_globals: number G of global tokens.
            size: (H, W) of the map of keys.
            cell: side of a cell, in positions.
        """
        num_locals = size[0] * size[1]
        to_globals, to_map, to_rest = weights.split(
            [num_globals, num_locals, weights.shape[-1] - num_globals - num_locals], dim=-1
        )
        if seen is None:
            seen = torch.ones(weights.shape[2], num_locals, dtype=torch.bool, device=weights.device)
        return cls(to_globals, to_map.unflatten(-1, size), to_rest, seen.unflatten(-1, size), cell)


def softmax_weights(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(query · key · D^−½ + bias): (B, h, n, D), (B, h, T, D), (h, n, T) → (B, h, n, T)."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)
