"""Performer: attention by positive random features (Choromanski et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vil.attention.base import Attention
from vil.attention.maps import AttentionWeights
from vil.attention.tracing import without_autocast
from vil.config import ModelConfig, StageConfig

EPS = 1e-4


def _random_orthogonal(width: int) -> Tensor:
    """Draw an orthogonal (width, width) matrix from the Haar distribution, uniform over all of them.

    Q of a Gaussian matrix alone is not Haar-distributed, because of the signs that LAPACK chooses, and would
    bias the kernel estimate. Multiplying by the signs of R's diagonal corrects that.

    Source: F. Mezzadri, How to generate random matrices from the classical compact groups, Notices of the
    AMS 54, 2007, section 5.
    """
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float32))
    return q * r.diagonal().sign()


class PerformerAttention(Attention):
    """softmax(q·k) approximated by φ(q)·φ(k) with m random features, linear in the number of tokens.

    The projection is orthogonal within blocks of D rows, Haar-distributed, its rows scaled by norms of
    Gaussian rows. It is a buffer, saved with the model, and redrawn in training: see `set_training_progress`.
    Attention dropout drops a key for all queries of a head at once, since weights of single pairs are never
    computed.
    """

    def __init__(self, stage: StageConfig, config: ModelConfig, size: tuple[int, int]) -> None:
        super().__init__(stage, config, size)
        self.query_key_value = nn.Linear(self.dim, 3 * self.dim)
        self.projection = nn.Linear(self.dim, self.dim)
        self.random_projection: Tensor
        self.register_buffer("random_projection", torch.empty(stage.random_features, self.head_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw a new random projection, from the CPU's default generator: the same on every device."""
        features, width = self.random_projection.shape
        blocks = [_random_orthogonal(width)[: features - start] for start in range(0, features, width)]
        norms = torch.randn(features, width, dtype=torch.float32).norm(dim=1, keepdim=True)
        self.random_projection.copy_(torch.cat(blocks) * norms, non_blocking=True)

    def set_training_progress(self, step: int, epoch: int) -> None:
        """See `Attention.set_training_progress`: redraw every 2 + 5·epoch steps, as in the paper.

        The first projection is used for a whole period, too. Periods are counted from the first step of the
        run, so that a continued run needs no counter.
        """
        if (step + 1) % (2 + 5 * epoch) == 0:
            self.redraw()

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """See `Attention.forward`."""
        self.count_globals(x, size)  # raises if there are too few tokens
        query, key, value = self.split_heads_many(self.query_key_value(x), 3)  # (B, h, G+N, D)
        with without_autocast(x.device.type):
            query_features = self._features(query, is_query=True)  # (B, h, G+N, m)
            key_features = self._features(key, is_query=False)
            kept = F.dropout(torch.ones_like(key_features[..., :1]), self.dropout_p())  # (B, h, G+N, 1)
            summary = key_features.transpose(-2, -1) @ (kept * value.to(kept.dtype))  # (B, h, m, D)
            normalizer = query_features @ key_features.sum(dim=-2)[..., None]  # (B, h, G+N, 1)
            output = query_features @ summary / normalizer
        return self.output_dropout(self.projection(self.merge_heads(output.to(value.dtype))))

    def attention_weights(self, x: Tensor, size: tuple[int, int], queries: Tensor) -> AttentionWeights:
        """See `Attention.attention_weights`: normalized φ(q)·φ(k), the weights that `forward` implies."""
        query, key, _ = self.split_heads_many(self.query_key_value(x), 3)  # (B, h, G+N, D)
        with without_autocast(x.device.type):
            query_features = self._features(query[:, :, queries], is_query=True)  # (B, h, n, m)
            products = query_features @ self._features(key, is_query=False).transpose(-2, -1)
            weights = products / products.sum(dim=-1, keepdim=True)  # (B, h, n, G+N)
        return AttentionWeights.from_flat(weights, None, self.count_globals(x, size), size)

    def multiply_adds(self, size: tuple[int, int]) -> int:
        """See `Attention.multiply_adds`: features, their summary, weighted sums and normalizers."""
        tokens = self.global_tokens + size[0] * size[1]
        features = self.random_projection.shape[0]
        return 4 * tokens * self.dim**2 + 4 * tokens * features * self.dim + tokens * features * self.heads

    def _features(self, x: Tensor, *, is_query: bool) -> Tensor:
        """Compute φ(x) = exp(w·x − |x|²/2 − max) + eps, x scaled by D^−¼; (…, T, D) → (…, T, m).

        The paper's factor m^−½ cancels in the quotient.
        Exponentials of sums of squares overflow in half precision, so the result is float32, or float64.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * self.head_dim**-0.25
        dots = x @ self.random_projection.to(x.dtype).T  # (B, h, T, m)
        # A constant per query cancels in the quotient, and so does one constant for all keys.
        # There is no maximum of a batch of no images.
        maximum = dots.amax(dim=-1, keepdim=True) if is_query or not dots.numel() else dots.max()
        half_square = x.square().sum(dim=-1, keepdim=True) / 2
        return (dots - half_square - maximum).exp() + EPS
