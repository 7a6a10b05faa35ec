"""Base class of the attentions, and the learned biases of global tokens.

Legend for this package: B batch, h heads, G global tokens, N local tokens (H·W of the map), T = G + N tokens,
C channels, D = C / h head width. Every attention maps x (B, G+N, C), global tokens first, to the same shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.maps import AttentionWeights
from vil.attention.tracing import is_autocast_enabled, is_exporting
from vil.config import ModelConfig, StageConfig
from vil.errors import UserError


class ProjectedTokens(NamedTuple):
    """A projection of all tokens, and its two parts: views of the same memory."""

    all_tokens: Tensor
    """(B, h, G+N, D)."""
    global_tokens: Tensor
    """(B, h, G, D)."""
    local_tokens: Tensor
    """(B, h, N, D)."""


class Attention(nn.Module, ABC):
    """Multi-head attention over global tokens and a map.

    Args:
        stage: the options of the stage; `heads` must divide `dim`.
        config: the options of the model.
        size: (H, W) of the map that the module is built for.

    Raises:
        UserError: options that do not go together; `location` is the option's name in `StageConfig` or
            `ModelConfig`.
    """

    supports_relative_position: ClassVar[bool] = False
    """True if the attention has scores per pair of tokens, to which a bias per offset can be added."""

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__()
        if stage.dim % stage.heads:
            raise UserError("heads", f"{stage.heads} heads do not divide the width {stage.dim}")
        self.dim = stage.dim
        self.heads = stage.heads
        self.head_dim = stage.dim // stage.heads
        self.size = size
        self.global_tokens = stage.global_tokens
        self.attention_dropout = config.attention_dropout
        self.output_dropout = nn.Dropout(config.dropout)

    @classmethod
    def uses_relative_position(cls, stage: StageConfig) -> bool:
        """Return True if a stage with this attention has relative position, False if absolute."""
        return stage.position == "relative" and cls.supports_relative_position

    @abstractmethod
    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the attention output for x (B, G+N, C), N = H·W with (H, W) = `size`; same shape.

        G may exceed the number that the module was built for: external global tokens follow the learned ones.
        """

    @abstractmethod
    def attention_weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """Return the weights of some queries in evaluation: without dropout and random shift.

        Args:
            x: (B, G+N, C), as in `forward`.
            size: (H, W) of the map.
            queries: (n,) int64, indices among the G+N tokens.
        """

    @abstractmethod
    def multiply_adds(self, size: tuple[int, int]) -> int:
        """Count the multiply-adds for one image with map `size`: projections, scores and weighted sums."""

    def set_window(self, window: int) -> None:
        """Set the side of a chunk of the local attention, and resize its bias table bilinearly."""

    def check_resize(self, size: tuple[int, int]) -> None:
        """Raise UserError if the module cannot be resized to a map of this size."""

    def check_device(self, device: torch.device) -> None:
        """Raise UserError if the configured backend does not run on this device."""

    def resize(self, size: tuple[int, int]) -> None:
        """Resize the parameters for maps of another size. Raise UserError as `check_resize`."""
        self.check_resize(size)
        self.size = size

    def set_neighbors(self, neighbors: Literal["all", "self", "random"] | int) -> None:
        """Set the chunks that local queries see in training; ignored by attentions without chunks."""

    def set_training_progress(self, step: int, epoch: int) -> None:
        """Prepare for a training step; the trainer calls it before each. Counted from 0."""

    @staticmethod
    def projection_inputs(x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Return x (any shape) `count` times, for projections that use them in this order.

        Under autocast each `nn.Linear` would convert x to half precision, and autograd would save all copies:
        here it is converted once. Results and gradients are the same, to the bit. A compiler merges equal
        conversions itself.
        """
        is_traced = torch.compiler.is_compiling() or is_exporting()
        if is_traced or x.dtype != torch.float32 or not is_autocast_enabled(x):
            return (x,) * count
        dtype = torch.get_autocast_dtype(x.device.type)
        if dtype == torch.float32:
            return (x,) * count
        cast: tuple[Tensor, ...] = _CastOnce.apply(x, dtype, count)
        return cast

    @staticmethod
    def count_globals(x: Tensor, size: tuple[int, int]) -> int:
        """Return the number of global tokens in x (B, G+N, C). Raise ValueError for fewer than N tokens."""
        num_globals = x.shape[1] - size[0] * size[1]
        if num_globals < 0:
            raise ValueError(f"a {size[0]}×{size[1]} map has {size[0] * size[1]} tokens, got {x.shape[1]}")
        return num_globals

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, T, C) → (B, h, T, D)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def split_heads_many(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split (B, T, count·C) → `count` tensors (B, h, T, D)."""
        return _to_heads(x, self.heads, count).unbind(0)

    def split_projection(self, x: Tensor, count: int, num_globals: int) -> tuple[ProjectedTokens, ...]:
        """Split (B, G+N, count·C) into heads, and into global and local tokens.

        Autograd would pad, add, stack and copy the gradients of these views one after the other: here they
        are written to one tensor of the shape of x. Results and gradients are the same, to the bit. A
        compiler fuses these operations itself.
        """
        if torch.compiler.is_compiling() or is_exporting():
            views = _split_projection(x, self.heads, count, num_globals)
        else:
            views = _SplitProjection.apply(x, self.heads, count, num_globals)
        return tuple(ProjectedTokens(*views[first : first + 3]) for first in range(0, 3 * count, 3))

    def merge_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, h, T, D) → (B, T, C)."""
        return x.transpose(1, 2).flatten(2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute scaled dot-product attention, with dropout of attention weights in training.

        Args:
            query, key, value: (B, h, q, D), and two of (B, h, k, D).
            bias: (h, q, k), added to the scores.

        Returns:
            (B, h, q, D).
        """
        if bias is not None:
            bias = bias.to(query.dtype)
            if not is_exporting():  # with three dimensions PyTorch uses plain operators, which exporters need
                bias = bias[None]
        return F.scaled_dot_product_attention(query, key, value, bias, self.dropout_p())

    def dropout_p(self) -> float:
        """Return the dropout probability of attention weights in the current mode."""
        return self.attention_dropout if self.training else 0.0


class _CastOnce(torch.autograd.Function):
    """Return x, float32, in half precision `count` times; add the gradients in float32.

    The results share their memory, which autograd does not know: do not modify them in place. The gradients
    of a single result that is used `count` times would be added in half precision. There is no forward-mode
    derivative: PyTorch computes nested ones of such functions wrongly.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        cast = x.to(dtype)
        return tuple(cast.detach() for _ in range(count))

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, torch.dtype, int], output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        last, *others = reversed(gradients)  # autograd adds them from the last use to the first
        total = last.float()
        for gradient in others:
            total += gradient
        return total, None, None


def _to_heads(x: Tensor, heads: int, count: int) -> Tensor:
    """Reshape (B, T, count·C) → (count, B, h, T, D), a view."""
    # Not unflatten, for which torch.autograd.grad(..., is_grads_batched=True) has no batching rule.
    return x.view(*x.shape[:2], count, heads, x.shape[2] // (count * heads)).permute(2, 0, 3, 1, 4)


def _split_projection(x: Tensor, heads: int, count: int, num_globals: int) -> tuple[Tensor, ...]:
    """Split (B, G+N, count·C) → the three views of `ProjectedTokens`, `count` times."""
    views: list[Tensor] = []
    for tokens in _to_heads(x, heads, count).unbind(0):
        views += tokens, tokens[:, :, :num_globals], tokens[:, :, num_globals:]
    return tuple(views)


class _SplitProjection(torch.autograd.Function):
    """`_split_projection` whose backward pass writes the gradients of all views to one tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, heads: int, count: int, num_globals: int) -> tuple[Tensor, ...]:
        return _split_projection(x, heads, count, num_globals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, int], output: object) -> None:
        x, ctx.heads, ctx.count, ctx.num_globals = inputs
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None:
            return None, None, None, None
        total = given.new_empty(ctx.shape)
        targets = _to_heads(total, ctx.heads, ctx.count)
        for index in range(ctx.count):
            whole, *parts = gradients[3 * index : 3 * index + 3]
            if whole is not None:
                targets[index].copy_(whole)
            ranges = slice(ctx.num_globals), slice(ctx.num_globals, None)
            for part, tokens in zip(parts, ranges):
                target = targets[index, :, :, tokens]
                if whole is None:
                    target.zero_() if part is None else target.copy_(part)
                elif part is not None:
                    target.add_(part)
        return total, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        return _split_projection(tangent, ctx.heads, ctx.count, ctx.num_globals)


class GlobalBias(nn.Module):
    """Learned biases of the scores that involve global tokens, for relative position.

    External global tokens, beyond the G learned ones, have bias 0.

    Args:
        heads: number of heads h.
        global_tokens: number G of learned global tokens.
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
        """Draw small random biases, distributed as those of the local offsets."""
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def local_query_bias(self, num_globals: int) -> Tensor:
        """Return the biases (h, num_globals) of local queries and global keys."""
        return F.pad(self.from_local, (0, num_globals - self.from_local.shape[1]))

    def global_query_bias(self, num_globals: int, num_locals: int) -> Tensor:
        """Return the biases (h, num_globals, num_globals + num_locals) of global queries and all keys."""
        external = num_globals - self.to_local.shape[1]
        # Flattened for its gradient, a slice of that of the concatenation: DDP compares strides with those
        # of the parameter, also along axes of size 1, and warns if there is one head and one token.
        among = F.pad(self.among.flatten().view_as(self.among), (0, external, 0, external))
        to_local = F.pad(self.to_local, (0, external))[:, :, None].expand(-1, -1, num_locals)
        return torch.cat([among, to_local], dim=-1)
