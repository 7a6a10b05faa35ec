"""Absolute position: learned embeddings of rows and columns.

Relative position is part of the attentions: a bias per head and offset (`vil.attention`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.errors import UserError


class AbsolutePosition(nn.Module):
    """Learned embeddings of rows and columns, C/2 channels each and concatenated, and of global tokens.

    Args:
        dim: channels C; must be even.
        size: (H, W) of the map; for another map the embeddings are resized linearly.
        global_tokens: number G of learned global tokens.

    Raises:
        UserError: the width is odd.
    """

    def __init__(self, dim: int, size: tuple[int, int], global_tokens: int) -> None:
        super().__init__()
        if dim % 2:
            raise UserError("dim", f"absolute position needs an even width, got {dim}")
        self.rows = nn.Parameter(torch.empty(size[0], dim // 2))
        self.columns = nn.Parameter(torch.empty(size[1], dim // 2))
        self.globals = nn.Parameter(torch.empty(global_tokens, dim)) if global_tokens else None
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    @torch.no_grad()
    def resize(self, size: tuple[int, int]) -> None:
        """Replace the embeddings by ones for a map of another size; keep those that fit."""
        for name, length in zip(("rows", "columns"), size):
            embedding: nn.Parameter = getattr(self, name)
            if embedding.shape[0] != length:
                resized = resize_embedding(embedding, length)
                setattr(self, name, nn.Parameter(resized, embedding.requires_grad))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Add the embeddings to x (B, G+N, C), N = H·W with (H, W) = `size`."""
        rows = resize_embedding(self.rows, size[0])[:, None, :].expand(-1, size[1], -1)
        columns = resize_embedding(self.columns, size[1])[None, :, :].expand(size[0], -1, -1)
        embedding = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (N, C)
        # External global tokens, between the learned ones and the map, have no embedding.
        learned = 0 if self.globals is None else self.globals.shape[0]
        embedding = F.pad(embedding, (0, 0, x.shape[1] - learned - embedding.shape[0], 0))
        return x + (embedding if self.globals is None else torch.cat([self.globals, embedding]))


def resize_embedding(embedding: Tensor, length: int) -> Tensor:
    """Resize an embedding (L', C) linearly to (length, C), without aligned corners."""
    if embedding.shape[0] == length:
        return embedding
    return F.interpolate(embedding.t()[None], length, mode="linear", align_corners=False)[0].t()
