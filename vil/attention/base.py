"""What the six attentions share: their options, their heads and the count of their work.

Legend for this package: B batch, h heads, G global tokens, N local tokens (H·W of the map), C channels,
D = C / h head width. Every attention maps x (B, G+N, C), global tokens first, to the same shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.tracing import is_exporting
from vil.attention.weights import AttentionWeights
from vil.config import ConfigError


@dataclass(frozen=True)
class AttentionOptions:
    """Options of the attentions; each reads those that concern it.

    Attributes:
        relative_position: learned biases per head and offset (full and vision_longformer).
        attention_dropout: probability of dropping an attention weight.
        dropout: probability of dropping an element of the output.
        window: side of a chunk, in tokens (vision_longformer).
        mask: which keys of the nine chunks are seen (vision_longformer).
        neighbors: which of the nine chunks are seen in training; evaluation sees all (vision_longformer),
            except with `self`.
        share_global_projection: global tokens use the local tokens' projections (vision_longformer,
            global_only).
        backend: implementation of the local attention (vision_longformer).
        projected_tokens: keys after the projection along the tokens (linformer).
        share_key_value_projection: keys and values share that projection (linformer).
        random_features: random features per head (performer).
        reduction: stride of the convolution that makes keys and values (spatial_reduction).
    """

    relative_position: bool = True
    attention_dropout: float = 0.0
    dropout: float = 0.0
    window: int = 7
    mask: Literal["chunk", "exact", "cyclic"] = "chunk"
    neighbors: Literal["all", "self", "random"] = "all"
    share_global_projection: bool = True
    backend: str = "auto"
    projected_tokens: int = 256
    share_key_value_projection: bool = True
    random_features: int = 256
    reduction: int = 8


class Attention(nn.Module, ABC):
    """Multi-head attention over global tokens and a map.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        size: (H, W) of the map that the module is built for.
        global_tokens: number G of global tokens, which stand in front.
        options: everything else.

    Raises:
        ConfigError: heads do not divide the width, or an option is impossible.
    """

    has_relative_position = False
    """Whether the mechanism has offsets between query and key to hang a bias on."""

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], global_tokens: int, options: AttentionOptions
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ConfigError("heads", f"{heads} heads do not divide the width {dim}")
        if global_tokens < 0:
            raise ConfigError("global_tokens", f"must be 0 or more, got {global_tokens}")
        if options.relative_position and not self.has_relative_position:
            raise ConfigError("position", f"{type(self).__name__} has no relative position; use absolute")
        self.dim = dim
        self.heads = heads
        self.head_dim = dim // heads
        self.size = size
        self.global_tokens = global_tokens
        self.attention_dropout = options.attention_dropout
        self.output_dropout = nn.Dropout(options.dropout)

    @abstractmethod
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attends over x (B, G+N, C), N = H·W with (H, W) = `size`; returns the same shape.

        G may be larger than what the module was built for: global tokens from outside come after its own.
        """

    @abstractmethod
    def weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """What some of the tokens x (B, G+N, C) attend to, as in evaluation: no dropout, no random shift.

        Args:
            x: as in `forward`.
            size: (H, W) of the map.
            queries: (n,) int64, the places of the querying tokens among the G+N.
        """

    @abstractmethod
    def multiply_adds(self, size: tuple[int, int]) -> int:
        """Multiply-adds for one image whose map is `size`: projections, scores and weighted sums."""

    def check_resize(self, size: tuple[int, int]) -> None:
        """Raises ConfigError where the module cannot be built for a map of another size."""

    def check_device(self, device: torch.device) -> None:
        """Raises ConfigError where an implementation was asked for by name that cannot run there."""

    def resize(self, size: tuple[int, int]) -> None:
        """Builds the module for a map of another size. Raises ConfigError as `check_resize`."""
        self.check_resize(size)
        self.size = size

    def set_neighbors(self, neighbors: Literal["all", "self", "random"] | int) -> None:
        """What local queries see in training; attentions without neighbors have nothing to set."""

    def set_training_progress(self, step: int, epoch: int) -> None:
        """Called before each training step; for attentions that change while training."""

    @staticmethod
    def count_globals(x: Tensor, size: tuple[int, int]) -> int:
        """How many of the tokens x (B, G+N, C) are global ones."""
        return x.shape[1] - size[0] * size[1]

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, h, T, D)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def split_heads_many(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """(B, T, count·C) → `count` tensors (B, h, T, D)."""
        return x.unflatten(-1, (count, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, h, T, D) → (B, T, C)."""
        return x.transpose(1, 2).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Scaled dot-product attention, with dropout of attention weights while training.

        Args:
            query, key, value: (B, h, q, D), and two of (B, h, k, D).
            bias: (h, q, k), added to the scores.

        Returns:
            (B, h, q, D).
        """
        if bias is not None:
            bias = bias.to(query.dtype)
            if not is_exporting():
                bias = bias[None]  # with three dimensions PyTorch uses plain operators, which exporters know
        return F.scaled_dot_product_attention(query, key, value, bias, self.dropout_p())

    def dropout_p(self) -> float:
        """The probability of dropping an attention weight right now."""
        return self.attention_dropout if self.training else 0.0


class GlobalBias(nn.Module):
    """Learned biases of scores that involve global tokens, where position is relative.

    Args:
        heads: number of heads h.
        global_tokens: number G of global tokens.
    """

    def __init__(self, heads: int, global_tokens: int) -> None:
        super().__init__()
        self.to_local = nn.Parameter(torch.empty(heads, global_tokens))
        """(h, G): a global query, any local key."""
        self.from_local = nn.Parameter(torch.empty(heads, global_tokens))
        """(h, G): any local query, a global key."""
        self.among = nn.Parameter(torch.empty(heads, global_tokens, global_tokens))
        """(h, G, G): a global query, a global key."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random biases, as those of the local offsets."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def of_local_queries(self, globals_: int) -> Tensor:
        """(h, globals_): the biases of local queries' scores with global keys; 0 for tokens beyond G."""
        return F.pad(self.from_local, (0, globals_ - self.from_local.shape[1]))

    def of_global_queries(self, globals_: int, locals_: int) -> Tensor:
        """(h, globals_, globals_ + locals_): the biases of global queries' scores; 0 for tokens beyond G."""
        further = globals_ - self.to_local.shape[1]
        among = F.pad(self.among, (0, further, 0, further))
        to_local = F.pad(self.to_local, (0, further))[:, :, None].expand(-1, -1, locals_)
        return torch.cat([among, to_local], dim=-1)
