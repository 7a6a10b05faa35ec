"""A stage of the multi-scale vision transformer: patch embedding, global tokens, position, blocks.

Legend: B batch, G global tokens, N local tokens of an H × W map, C channels (Zhang et al., ICCV 2021,
section 3.1). Primes mark the previous stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vil.attention import ATTENTIONS, Attention
from vil.config import ModelConfig, Size, StageConfig
from vil.errors import UserError
from vil.models.position import AbsolutePosition

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """A `patch` × `patch` convolution of that stride and a LayerNorm; incomplete patches are dropped.

    (B, C', H', W') → (B, N, C) and the size (H, W) of the new map.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, norm: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch, stride=patch)
        self.norm = LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """Embed the patches. Raise ValueError for a map smaller than one patch."""
        if min(x.shape[2:]) < self.patch:
            raise ValueError(f"a map of {x.shape[2]}×{x.shape[3]} is smaller than a patch of {self.patch}")
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual and the same drop path rate.

    With `layer_scale`, the branches are multiplied by a learned factor per channel (Touvron et al., Going
    deeper with Image Transformers, 2021, section 2).
    """

    def __init__(self, attention: Attention, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        dim = attention.dim
        self.norm1 = LayerNorm(dim)
        self.attn = attention
        self.ls1 = _layer_scale(dim, config.layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp_width = int(config.mlp_ratio * dim)
        self.mlp = Mlp(dim, self.mlp_width, drop=config.dropout)
        self.ls2 = _layer_scale(dim, config.layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Apply attention and MLP: (B, G+N, C) → (B, G+N, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), size)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _layer_scale(dim: int, init: float | None) -> nn.Module:
    if init is None:
        return nn.Identity()
    layer = LayerScale(dim, init)
    nn.init.constant_(layer.gamma, init)  # timm 1.0.21 leaves it uninitialized
    return layer


@register_notrace_module  # control flow depends on shapes, so torch.fx must treat a stage as one node
class Stage(nn.Module):
    """Patch embedding, global tokens, position, blocks.

    Args:
        stage: the options of the stage.
        config: the options of the model.
        in_chans: channels of the input map.
        size: (H, W) of the map after the patch embedding.
        drop_path: one rate per block.
        carries_globals: project the global tokens of the previous stage, in place of learned ones.
        has_dist_token: the last of the stage's global tokens is a distillation token, which is
            learned even if the others are carried.

    Raises:
        UserError: options that do not go together.
    """

    def __init__(
        self,
        stage: StageConfig,
        config: ModelConfig,
        in_chans: int,
        size: Size,
        drop_path: Sequence[float],
        carries_globals: bool = False,
        has_dist_token: bool = False,
    ) -> None:
        super().__init__()
        attention = ATTENTIONS[stage.attention]
        self.config = stage
        self.size = size
        self.num_global_tokens = stage.global_tokens
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, stage.dim, stage.patch, config.norm_embed)
        self.carry = nn.Linear(in_chans, stage.dim) if carries_globals else None
        self.global_tokens: nn.Parameter | None = None
        self.dist_token: nn.Parameter | None = None
        if has_dist_token:
            self.dist_token = nn.Parameter(torch.empty(1, 1, stage.dim))
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        if self.num_class_tokens and not carries_globals:
            self.global_tokens = nn.Parameter(torch.empty(1, self.num_class_tokens, stage.dim))
            nn.init.trunc_normal_(self.global_tokens, std=0.02)
        self.position: AbsolutePosition | None = None
        if not attention.uses_relative_position(stage):
            self.position = AbsolutePosition(stage.dim, size, stage.global_tokens)
        dropout = config.dropout if config.position_dropout is None else config.position_dropout
        self.pos_drop = nn.Dropout(dropout)
        blocks = (Block(attention(stage, config, size), config, rate) for rate in drop_path)
        self.blocks = cast(list[Block], nn.ModuleList(blocks))  # typed as a list, for its elements

    def forward(
        self, x: Tensor, global_tokens: Tensor | None = None, outputs: list[Tensor] | None = None
    ) -> tuple[Tensor, Size]:
        """Return the tokens (B, G+N, C), global ones first, and the size (H, W) of their map.

        Args:
            x: the input map (B, C', H', W').
            global_tokens: (B, G, C') of the previous stage, if this stage carries them; in the first stage
                external tokens (B, G', C), placed after the learned ones.
            outputs: a list to which the tokens after each block are appended.
        """
        x, size = self.patch_embed(x)
        parts = [x]
        if global_tokens is not None:
            parts.insert(0, global_tokens if self.carry is None else self.carry(global_tokens))
        if self.global_tokens is not None:
            parts.insert(0, self.global_tokens.expand(x.shape[0], -1, -1))
        if self.dist_token is not None:
            # After the class tokens, learned or carried, and before external tokens.
            prefix = torch.cat([part.to(x.dtype) for part in parts], dim=1)
            count = self.num_class_tokens
            parts = [prefix[:, :count], self.dist_token.expand(x.shape[0], -1, -1), prefix[:, count:]]
        x = torch.cat([part.to(x.dtype) for part in parts], dim=1)
        if self.position is not None:
            x = self.position(x, size)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, size, use_reentrant=False)
            else:
                x = block(x, size)
            if outputs is not None:
                outputs.append(x)
        return x, size

    def resize(self, size: Size) -> None:
        """Resize the parameters for maps of another size. Raise UserError if an attention cannot."""
        for block in self.blocks:
            block.attn.resize(size)
        if self.position is not None:
            self.position.resize(size)
        self.size = size

    def set_window(self, window: int) -> None:
        """Set the window of the local attention; its bias tables are resized."""
        for block in self.blocks:
            block.attn.set_window(window)
        self.config = replace(self.config, window=window)

    def to_map(self, x: Tensor, size: Size) -> Tensor:
        """Fold the local tokens: (B, G+N, C) → (B, C, H, W)."""
        return x[:, -size[0] * size[1] :].transpose(1, 2).unflatten(2, size)

    @property
    def num_class_tokens(self) -> int:
        """Return the number of global tokens, learned or carried, without the distillation token."""
        return self.num_global_tokens - (self.dist_token is not None)

    def to_globals(self, x: Tensor, size: Size) -> Tensor:
        """Select the global tokens: (B, G+N, C) → (B, G, C)."""
        return x[:, : -size[0] * size[1]]

    def multiply_adds(self, in_chans: int, size: Size) -> int:
        """Count the multiply-adds for one image, with `size` the map after this stage's patch embedding."""
        num_locals = size[0] * size[1]
        tokens = self.num_global_tokens + num_locals
        total = num_locals * self.patch_embed.patch**2 * in_chans * self.config.dim
        if self.carry is not None:
            total += self.num_class_tokens * in_chans * self.config.dim
        for block in self.blocks:
            total += block.attn.multiply_adds(size)
            total += 2 * tokens * self.config.dim * block.mlp_width
        return total


def map_sizes(stages: Sequence[StageConfig], image_size: Size) -> list[Size]:
    """Return (H, W) of every stage's map, for images of (height, width) = `image_size`.

    Raises:
        UserError: a map is smaller than a patch.
    """
    sizes, size = [], image_size
    for index, stage in enumerate(stages):
        if min(size) < stage.patch:
            needed = math.prod(earlier.patch for earlier in stages[: index + 1])
            pixels = f"{image_size[0]}×{image_size[1]} pixels"
            reason = f"{pixels} are too few for stage {index + 1} of {len(stages)}, which needs {needed}"
            raise UserError("image_size", reason)
        size = (size[0] // stage.patch, size[1] // stage.patch)
        sizes.append(size)
    return sizes
