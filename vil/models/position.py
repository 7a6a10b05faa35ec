"""Absolute position: learned embeddings of rows and columns.

Relative position lives in the attentions, as a bias per head and offset (`vil.attention`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.config import ConfigError


class AbsolutePosition(nn.Module):
    """Learned embeddings: half of the channels tell the row, the other half the column; one per global token.

    Args:
        dim: channels C; must be even.
        size: (H, W) of the map; on another map the embeddings are resized linearly.
        global_tokens: number G of global tokens in front of the map.

    Raises:
        ConfigError: the width is odd.
    """

    def __init__(self, dim: int, size: tuple[int, int], global_tokens: int) -> None:
        super().__init__()
        if dim % 2:
            raise ConfigError("dim", f"absolute position needs an even width, got {dim}")
        self.rows = nn.Parameter(torch.empty(size[0], dim // 2))
        self.columns = nn.Parameter(torch.empty(size[1], dim // 2))
        self.globals = nn.Parameter(torch.empty(global_tokens, dim)) if global_tokens else None
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    @torch.no_grad()
    def resize(self, size: tuple[int, int]) -> None:
        """Replaces the embeddings by ones for a map of another size."""
        self.rows = nn.Parameter(resize_embedding(self.rows, size[0]))
        self.columns = nn.Parameter(resize_embedding(self.columns, size[1]))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Adds the embeddings to x (B, G+N, C), N = H·W with (H, W) = `size`."""
        rows = resize_embedding(self.rows, size[0])[:, None, :].expand(-1, size[1], -1)
        columns = resize_embedding(self.columns, size[1])[None, :, :].expand(size[0], -1, -1)
        embedding = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, C)
        # Global tokens from outside stand between the stage's own and the map; they keep what they are.
        own = 0 if self.globals is None else self.globals.shape[0]
        embedding = F.pad(embedding, (0, 0, x.shape[1] - own - embedding.shape[0], 0))
        return x + (embedding if self.globals is None else torch.cat([self.globals, embedding]))


def resize_embedding(embedding: Tensor, length: int) -> Tensor:
    """A 1-D embedding (L', C), resized linearly to (length, C), without aligned corners."""
    if embedding.shape[0] == length:
        return embedding
    return F.interpolate(embedding.t()[None], length, mode="linear", align_corners=False)[0].t()
