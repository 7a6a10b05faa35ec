"""One local attention to be measured: its shape and options, its tensors, and what it costs at least.

Legend: B batch, h heads, N = H·W local tokens, G global tokens, D head width, w window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vil.attention.local.geometry import Inputs, Mask, Window


class Cost(NamedTuple):
    """What a pass has to do at least: bytes read or written once, and multiply-adds of its matrices."""

    bytes: int
    multiply_adds: int


class Rates(NamedTuple):
    """What the machine can do: bytes and multiply-adds per second."""

    bytes: float
    multiply_adds: float

    def bound(self, cost: Cost) -> float:
        """Seconds that `cost` takes at least: its roofline."""
        return max(cost.bytes / self.bytes, cost.multiply_adds / self.multiply_adds)


@dataclass(frozen=True)
class Problem:
    """A local attention.

    Attributes:
        label: what it is called in tables.
        size: (H, W) of the map.
        neighbors: `all`, `self`, or the number 0..7 of the one neighbour that is seen.
        relative: whether there is a bias table, and a bias per global token.
        in_grid: one of the series of maps that differ in nothing but their side, which figures show.
    """

    label: str
    batch: int
    heads: int
    head_width: int
    size: tuple[int, int]
    window: int
    global_tokens: int
    mask: Mask
    neighbors: str | int
    relative: bool
    dtype: torch.dtype
    device: torch.device
    in_grid: bool = False

    @property
    def tokens(self) -> int:
        """Local tokens of an image."""
        return self.size[0] * self.size[1]

    @property
    def geometry(self) -> Window:
        """Its window as backends take it."""
        neighbors = "one" if isinstance(self.neighbors, int) else self.neighbors
        return Window(self.size, self.window, self.mask, neighbors)  # type: ignore[arg-type]

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(row, column) steps to the chunks that a query sees."""
        return self.geometry.seen(self.neighbors if isinstance(self.neighbors, int) else None)

    def inputs(self, seed: int = 0) -> Inputs:
        """Fresh normal tensors, as models hand them over.

        Tokens are (B, h, tokens, D) with the heads inside the tokens in memory, and of the problem's dtype;
        biases are float32, as parameters are. All require gradients, except the neighbour's number.
        """
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

        def tokens(count: int) -> Tensor:
            x = normal(self.batch, count, self.heads, self.head_width, dtype=self.dtype)
            return x.transpose(1, 2).requires_grad_()

        query, key, value = (tokens(self.tokens) for _ in range(3))
        global_key, global_value = (tokens(self.global_tokens) for _ in range(2))
        table = bias = neighbor = None
        if self.relative:
            offsets = 4 * self.window - 1
            table = normal(self.heads, offsets, offsets).requires_grad_()
            bias = normal(self.heads, self.global_tokens).requires_grad_()
        if isinstance(self.neighbors, int):  # on the device, as drawn by a model in training
            neighbor = torch.tensor([self.neighbors], device=self.device)
        return Inputs(query, key, value, global_key, global_value, table, bias, neighbor)

    def output_gradient(self, like: Tensor, seed: int = 1) -> Tensor:
        """A normal gradient of an output (B, h, tokens, D), with the heads inside the tokens in memory."""
        generator = torch.Generator(self.device).manual_seed(seed)
        batch, heads, tokens, width = like.shape
        x = torch.randn(batch, tokens, heads, width, generator=generator, device=self.device)
        return x.to(like.dtype).transpose(1, 2)

    def pairs(self) -> int:
        """Pairs of a local query and a local key that it sees, of one image and head; padding not counted."""
        rows, columns = (
            {step: _pairs_along(length, self, step) for step in (-1, 0, 1)} for length in self.size
        )
        return sum(rows[row] * columns[column] for row, column in self.steps)

    def costs(self, tokens: int | None = None, pairs: int | None = None) -> tuple[Cost, Cost]:
        """The least that a forward pass, and a backward pass that computes the scores again, has to do.

        Args:
            tokens, pairs: queries, and pairs of query and key, of one image and head, for a method that does
                not compute this attention.
        """
        pairs = self.pairs() + self.tokens * self.global_tokens if pairs is None else pairs
        tokens = self.tokens if tokens is None else tokens
        images = self.batch * self.heads
        element = self.dtype.itemsize
        each = images * tokens * self.head_width * element  # bytes of queries, keys, values or outputs
        memory = 2 * images * self.global_tokens * self.head_width * element
        biases = 0
        if self.relative:
            biases = 4 * self.heads * ((4 * self.window - 1) ** 2 + self.global_tokens)
        sums = 4 * images * tokens  # of the exponentials of a query's scores, float32
        product = images * pairs * self.head_width
        forward = Cost(4 * each + memory + biases + sums, 2 * product)
        backward = Cost(8 * each + 2 * memory + 2 * biases + sums, 5 * product)
        return forward, backward


def _pairs_along(length: int, problem: Problem, step: int) -> int:
    """Pairs along one axis of a query and a key in the chunk `step` chunks further."""
    side = problem.window
    chunks = -(-length // side)
    real = [min(side, length - chunk * side) for chunk in range(chunks)]
    total = 0
    for chunk in range(chunks):
        other = chunk + step
        if problem.mask == "cyclic":
            other %= chunks
        elif not 0 <= other < chunks:
            continue
        if problem.mask == "exact":
            queries = range(chunk * side, chunk * side + real[chunk])
            keys = range(other * side, other * side + real[other])
            total += sum(abs(query - key) <= side for query in queries for key in keys)
        else:
            total += real[chunk] * real[other]
    return total


def leaves_of(inputs: Inputs) -> list[Tensor]:
    """The tensors that gradients are taken of."""
    return [x for x in inputs if x is not None and x.requires_grad]


def shown_precision(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def heading(problem: Problem) -> str:
    """A problem in words."""
    neighbors = problem.neighbors
    if isinstance(neighbors, int):
        neighbors = f"own chunk and neighbour {neighbors}"
    return (
        f"{problem.label}: {problem.size[0]}×{problem.size[1]}, "
        f"{problem.heads} head{'s' if problem.heads > 1 else ''} × {problem.head_width}, "
        f"window {problem.window}, {problem.global_tokens} global, batch {problem.batch}, "
        f"mask {problem.mask}, neighbors {neighbors}, "
        f"{'relative' if problem.relative else 'absolute'} position"
    )


def equal_shapes_once(problems: Sequence[Problem]) -> list[Problem]:
    """The problems without those that differ from an earlier one in their label alone; labels are joined."""
    found: dict[Problem, list[str]] = {}
    for problem in problems:
        found.setdefault(_relabelled(problem, ""), []).append(problem.label)
    return [_relabelled(problem, ", ".join(labels)) for problem, labels in found.items()]


def _relabelled(problem: Problem, label: str) -> Problem:
    return replace(problem, label=label)
