"""Shape and options of a local attention: its tensors, and its minimal cost.

Legend: B batch, h heads, N = H·W local tokens, G global tokens, D head width, w window.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.benchmarks.timing import Cost
from vil.attention.local.geometry import Inputs, LocalAttentionSpec, Mask
from vil.config import ModelConfig
from vil.models.stage import map_sizes
from vil.models.zoo import resolve_stages

CHUNK_OFFSETS = (-1, 0, 1)


@dataclass(frozen=True)
class AttentionShape:
    """Shape and options of a local attention on an H × W map.

    Attributes:
        label: name in tables.
        neighbors: `all`, `self`, or the index 0..7 of the only visible neighbor.
        position: `relative`: with a table of position biases, and a bias per global token; or `absolute`.
        precision: dtype of the tokens.
    """

    label: str
    batch: int
    heads: int
    head_width: int
    height: int
    width: int
    window: int = 7
    global_tokens: int = 1
    mask: Mask = "chunk"
    neighbors: str | int = "all"
    position: str = "relative"
    precision: str = "float32"
    device: str = "cpu"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    @property
    def tokens(self) -> int:
        """Local tokens per image."""
        return self.height * self.width

    @property
    def is_relative(self) -> bool:
        """True if there are position biases."""
        return self.position == "relative"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tokens."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def spec(self) -> LocalAttentionSpec:
        """The specification that the backends take."""
        neighbors = "one" if isinstance(self.neighbors, int) else self.neighbors
        return LocalAttentionSpec(self.size, self.window, self.mask, neighbors)  # type: ignore[arg-type]

    @property
    def chunk_offsets(self) -> tuple[tuple[int, int], ...]:
        """(row, column) offsets of the visible chunks."""
        return self.spec.chunk_offsets(self.neighbors if isinstance(self.neighbors, int) else None)

    def __str__(self) -> str:
        neighbors = self.neighbors if isinstance(self.neighbors, str) else f"own chunk and {self.neighbors}"
        return (
            f"{self.label}: {self.height}×{self.width}, {self.heads} head{'s' if self.heads > 1 else ''} × "
            f"{self.head_width}, window {self.window}, {self.global_tokens} global, batch {self.batch}, "
            f"mask {self.mask}, neighbors {neighbors}, {self.position} position"
        )

    def inputs(self, seed: int = 0) -> Inputs:
        """Return normal tensors in the memory layout that models use.

        Tokens are (B, h, tokens, D), contiguous as (B, tokens, h, D), in the precision of the shape; biases
        are float32. All require gradients, except the index of the neighbor.
        """
        generator = torch.Generator(self.device).manual_seed(seed)

        def tokens(count: int) -> Tensor:
            return self._normal_tokens(self.batch, count, self.heads, generator).requires_grad_()

        def bias(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).requires_grad_()

        query, key, value = (tokens(self.tokens) for _ in range(3))
        global_key, global_value = (tokens(self.global_tokens) for _ in range(2))
        offsets, neighbor = 4 * self.window - 1, None
        table = bias(self.heads, offsets, offsets) if self.is_relative else None
        global_bias = bias(self.heads, self.global_tokens) if self.is_relative else None
        if isinstance(self.neighbors, int):  # on the device, like the random shift of a training step
            neighbor = torch.tensor([self.neighbors], device=self.device)
        return Inputs(query, key, value, global_key, global_value, table, global_bias, neighbor)

    def output_gradient(self, like: Tensor, seed: int = 1) -> Tensor:
        """Return a normal gradient for an output (B, h, tokens, D), contiguous as (B, tokens, h, D)."""
        batch, heads, tokens, _ = like.shape
        return self._normal_tokens(batch, tokens, heads, torch.Generator(self.device).manual_seed(seed))

    def _normal_tokens(self, batch: int, tokens: int, heads: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, tokens, heads, self.head_width, generator=generator, device=self.device)
        return x.to(self.dtype).transpose(1, 2)

    def pairs(self) -> int:
        """Return the number of visible pairs of local query and key of an image and head, without padding."""
        rows, columns = (
            {offset: self._pairs_along(length, offset) for offset in CHUNK_OFFSETS} for length in self.size
        )
        return sum(rows[row] * columns[column] for row, column in self.chunk_offsets)

    def _pairs_along(self, length: int, offset: int) -> int:
        """Count pairs along one axis whose key is in the chunk `offset` after that of the query."""
        index = torch.arange(length)
        chunk = index // self.window
        visible = chunk[:, None] + offset
        if self.mask == "cyclic":
            visible %= -(-length // self.window)
        is_pair = visible == chunk  # (queries, keys)
        if self.mask == "exact":
            is_pair &= (index[:, None] - index).abs() <= self.window
        return int(is_pair.sum())

    def costs(self, tokens: int | None = None, pairs: int | None = None) -> tuple[Cost, Cost]:
        """Return the minimal cost of a forward pass, and of a backward pass that recomputes the scores.

        A method with another attention has other `tokens` per image, or `pairs` per image and head.
        """
        pairs = self.pairs() + self.tokens * self.global_tokens if pairs is None else pairs
        tokens = self.tokens if tokens is None else tokens
        heads = self.batch * self.heads
        token_bytes = self.head_width * self.dtype.itemsize
        local = heads * tokens * token_bytes  # of the queries, keys, values or outputs
        global_ = 2 * heads * self.global_tokens * token_bytes
        bias = 4 * self.heads * ((4 * self.window - 1) ** 2 + self.global_tokens) if self.is_relative else 0
        log_sums = 4 * heads * tokens  # of the softmax, float32
        product = heads * pairs * self.head_width
        forward = Cost(4 * local + global_ + bias + log_sums, 2 * product)
        return forward, Cost(8 * local + 2 * global_ + 2 * bias + log_sums, 5 * product)


def grad_leaves(inputs: Inputs) -> list[Tensor]:
    """Return the tensors that require gradients."""
    return [x for x in inputs if x is not None and x.requires_grad]


def zoo_shapes(names: Iterable[str]) -> list[AttentionShape]:
    """Return the local attention of the named models at 224 pixels, for one image in float32."""
    return [shape for name in names for shape in model_shapes(ModelConfig(name, image_size=224))]


def model_shapes(config: ModelConfig) -> list[AttentionShape]:
    """Return the local attention of each stage of a model that has it, for one image in float32."""
    shapes = []
    stages = resolve_stages(config)
    for number, (stage, size) in enumerate(zip(stages, map_sizes(stages, config.size)), 1):
        if stage.attention == "vision_longformer":
            label, width = f"{config.name} stage {number}", stage.dim // stage.heads
            options = stage.window, stage.global_tokens
            shapes.append(AttentionShape(label, 1, stage.heads, width, *size, *options))
    return shapes


def merge_equal(shapes: Iterable[AttentionShape]) -> list[AttentionShape]:
    """Return the shapes, with those that differ in their labels alone merged, and their labels joined."""
    labels: dict[AttentionShape, list[str]] = {}
    for shape in shapes:
        labels.setdefault(replace(shape, label=""), []).append(shape.label)
    return [replace(shape, label=", ".join(dict.fromkeys(names))) for shape, names in labels.items()]
