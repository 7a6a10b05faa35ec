"""Attention weights: what chosen queries look at, as an attention itself computes it, placed on the map.

Legend: B batch, h heads, n queries, G global tokens, H × W the map, N = H·W, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of n queries. Those of a query and a head, over everything that it looks at, sum up to 1.

    Attributes:
        to_globals: (B, h, n, G), weights of the global tokens.
        to_map: (B, h, n, H, W), weights of the map's positions. Of the spatial reduction, whose keys are
            for cells of r × r positions, (B, h, n, H // r, W // r). (B, h, n, 0, 0) where keys have no place.
        to_rest: (B, h, n, R), weights of keys that have no place on the map: the k mixtures of linformer, or,
            as one number, the padding that the cyclic mask shows; else R = 0.
        seen: (n, …) bool, as the last sides of `to_map`: the keys that a query sees, however small their
            weight.
        cell: side r of a cell, in positions; 1 but for the spatial reduction.
    """

    to_globals: Tensor
    to_map: Tensor
    to_rest: Tensor
    seen: Tensor
    cell: int = 1

    @property
    def on_map(self) -> bool:
        """Whether keys have places on the map. Those of linformer, mixtures of all tokens, have none."""
        return self.seen.shape[1] > 0

    @classmethod
    def place(
        cls, weights: Tensor, seen: Tensor | None, globals_: int, size: tuple[int, int], cell: int = 1
    ) -> AttentionWeights:
        """Takes apart weights (B, h, n, G + H·W + R): global tokens, the map's rows, the rest.

        Args:
            weights: of all keys in this order.
            seen: (n, H·W) bool; None where every query sees the whole map.
            globals_: number G of global tokens.
            size: (H, W) of the map that keys lie on.
            cell: side of a cell.
        """
        local = size[0] * size[1]
        to_globals, to_map, to_rest = weights.split(
            [globals_, local, weights.shape[-1] - globals_ - local], dim=-1
        )
        if seen is None:
            seen = torch.ones(weights.shape[2], local, dtype=torch.bool, device=weights.device)
        return cls(to_globals, to_map.unflatten(-1, size), to_rest, seen.unflatten(-1, size), cell)


def softmax_weights(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(query · key · D^−½ + bias): (B, h, n, D), (B, h, T, D), (h, n, T) or None → (B, h, n, T)."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(dim=-1)
