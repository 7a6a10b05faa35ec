"""A stage of the multi-scale vision transformer: patch embedding, global tokens, position, blocks.

Legend: B batch, G global tokens, N local tokens of an H × W map, C channels (Zhang et al., ICCV 2021,
    section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vil.attention import ATTENTIONS, Attention, AttentionOptions
from vil.config import ConfigError, StageConfig
from vil.models.position import AbsolutePosition

Size = tuple[int, int]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """A `patch` × `patch` convolution of that stride, then a LayerNorm; what fills no patch is left out.

    (B, C', H', W') → (B, N, C) and the size (H, W) of the new map.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, norm: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch, stride=patch)
        self.norm = LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """Raises ValueError for a map smaller than one patch."""
        if min(x.shape[2:]) < self.patch:
            raise ValueError(f"a map of {x.shape[2]}×{x.shape[3]} is smaller than a patch of {self.patch}")
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual; both drop paths have the same rate."""

    def __init__(
        self, dim: int, attention: Attention, mlp_ratio: float, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp_width = int(mlp_ratio * dim)
        self.mlp = Mlp(dim, self.mlp_width, drop=dropout)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(B, G+N, C) → (B, G+N, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@register_notrace_module  # its shapes decide what it does, so torch.fx takes it as one node
class Stage(nn.Module):
    """Patch embedding, global tokens, position, blocks.

    Args:
        config: the stage's sizes and attention.
        in_chans: channels of the map that it receives.
        size: (H, W) of the map after its patch embedding.
        options: options of the attention.
        mlp_ratio: hidden width of the MLP over C.
        pos_drop: dropout after the position embedding.
        drop_path: one rate per block.
        norm_embed: LayerNorm after the patch embedding.
        carries: take the global tokens of the stage before, through a linear map, in place of learned ones.
    """

    def __init__(
        self,
        config: StageConfig,
        in_chans: int,
        size: Size,
        options: AttentionOptions,
        mlp_ratio: float,
        pos_drop: float,
        drop_path: Sequence[float],
        norm_embed: bool,
        carries: bool,
    ) -> None:
        super().__init__()
        attention = ATTENTIONS[config.attention]
        self.config = config
        self.size = size
        self.num_global_tokens = config.global_tokens
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, config.dim, config.patch, norm_embed)
        self.carry = nn.Linear(in_chans, config.dim) if carries else None
        self.global_tokens: nn.Parameter | None = None
        if config.global_tokens and not carries:
            self.global_tokens = nn.Parameter(torch.empty(1, config.global_tokens, config.dim))
            nn.init.trunc_normal_(self.global_tokens, std=0.02)
        self.position: AbsolutePosition | None = None
        if not options.relative_position:
            self.position = AbsolutePosition(config.dim, size, config.global_tokens)
        self.pos_drop = nn.Dropout(pos_drop)
        blocks = (
            Block(
                config.dim,
                attention(config.dim, config.heads, size, config.global_tokens, options),
                mlp_ratio,
                options.dropout,
                rate,
            )
            for rate in drop_path
        )
        self.blocks = cast(list[Block], nn.ModuleList(blocks))  # so that its elements have their type

    def forward(self, x: Tensor, global_tokens: Tensor | None = None) -> tuple[Tensor, Size]:
        """A map → tokens (B, G+N, C), global ones first, and the size (H, W) of their map.

        Args:
            x: (B, C', H', W').
            global_tokens: those of the stage before (B, G, C') where this stage carries them; in the first
                stage tokens from outside (B, G', C), which come after its own.
        """
        x, size = self.patch_embed(x)
        parts = [x]
        if global_tokens is not None:
            parts.insert(0, global_tokens if self.carry is None else self.carry(global_tokens))
        if self.global_tokens is not None:
            parts.insert(0, self.global_tokens.expand(x.shape[0], -1, -1))
        x = torch.cat([part.to(x.dtype) for part in parts], dim=1)
        if self.position is not None:
            x = self.position(x, size)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, size, use_reentrant=False)
            else:
                x = block(x, size)
        return x, size

    def resize(self, size: Size) -> None:
        """Builds the stage for maps of another size. Raises ConfigError where an attention cannot follow."""
        for block in self.blocks:
            block.attn.resize(size)
        if self.position is not None:
            self.position.resize(size)
        self.size = size

    def to_map(self, x: Tensor, size: Size) -> Tensor:
        """(B, G+N, C) → (B, C, H, W), without the global tokens."""
        return x[:, -size[0] * size[1] :].transpose(1, 2).unflatten(2, size)

    def carried(self, x: Tensor, size: Size) -> Tensor:
        """(B, G+N, C) → (B, G, C), the global tokens alone."""
        return x[:, : -size[0] * size[1]]

    def multiply_adds(self, in_chans: int, size: Size) -> int:
        """Multiply-adds for one image, with `size` the map after this stage's patch embedding."""
        locals_ = size[0] * size[1]
        tokens = self.num_global_tokens + locals_
        total = locals_ * self.patch_embed.patch**2 * in_chans * self.config.dim
        if self.carry is not None:
            total += self.num_global_tokens * in_chans * self.config.dim
        for block in self.blocks:
            total += block.attn.multiply_adds(size)
            total += 2 * tokens * self.config.dim * block.mlp_width
        return total


def map_sizes(stages: Sequence[StageConfig], image_size: Size) -> list[Size]:
    """(H, W) of every stage's map, for images of (height, width) = `image_size`.

    Raises:
        ConfigError: a map gets smaller than a patch.
    """
    sizes, size = [], image_size
    for number, stage in enumerate(stages):
        if stage.patch < 1:
            raise ConfigError(f"stages[{number}].patch", f"must be at least 1, got {stage.patch}")
        if min(size) < stage.patch:
            needed = 1
            for earlier in stages[: number + 1]:
                needed *= earlier.patch
            side = "×".join(str(s) for s in image_size)
            raise ConfigError(
                "image_size",
                f"{side} pixels are too few for stage {number + 1} of {len(stages)}, which needs {needed}",
            )
        size = (size[0] // stage.patch, size[1] // stage.patch)
        sizes.append(size)
    return sizes
