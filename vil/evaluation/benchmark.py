"""Memory per image and images per second of a model, which stays as it is.

On a GPU memory is the measured peak. A CPU has no meter that is exact and the same on every machine, so there
bytes are counted: for training, what autograd keeps for the backward pass; for inference, the peak of what is
alive at one time in a forward pass. Counting does not see workspaces inside a kernel.
"""

from __future__ import annotations

import copy
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vil.config import Precision
from vil.modes import mode
from vil.training.precision import autocast

Result = TypeVar("Result")


@dataclass(frozen=True)
class Memory:
    """Memory for one image, in bytes, without parameters, their gradients and the optimiser's state.

    Attributes:
        train: of a forward and backward pass in train mode.
        eval: of a forward pass in eval mode, without gradients.
        kind: how both were found.

    On a GPU that cannot hold one image, the figure is None.
    """

    train: float | None
    eval: float | None
    kind: Literal["measured peak", "counted bytes"]


def measure_memory(
    model: nn.Module,
    image_size: int,
    in_chans: int,
    *,
    device: torch.device,
    train_precision: Precision,
    eval_precision: Precision,
    batch_size: int = 128,
) -> Memory:
    """Memory per image of `model`, which is on `device`.

    On a GPU: the peak of a step with `batch_size` images (halved until they fit) less what was there before,
    divided by their number. On a CPU: the counted bytes that one more image adds, whatever the batch.

    Args:
        image_size, in_chans: images are (B, in_chans, image_size, image_size), float32.
        train_precision, eval_precision: precision of the forward pass in training and in inference.
        batch_size: images of a measured step.
    """
    model = copy.deepcopy(model)  # training leaves gradients and moves running statistics
    on_gpu = device.type == "cuda"

    def logits(batch: int, precision: Precision) -> torch.Tensor:
        images = torch.zeros(batch, in_chans, image_size, image_size, device=device)
        with autocast(precision, device):
            return model(images)

    def loss(batch: int) -> torch.Tensor:
        with mode(model, training=True):
            output = logits(batch, train_precision)  # (B, classes)
        return F.cross_entropy(output.float(), torch.zeros(batch, dtype=torch.int64, device=device))

    @torch.no_grad()
    def infer(batch: int) -> torch.Tensor:
        with mode(model, training=False):
            return logits(batch, eval_precision)

    with torch.random.fork_rng([device] if on_gpu else []):  # drop path and dropout draw
        torch.manual_seed(0)
        if on_gpu:
            train_bytes = _measured(lambda batch: loss(batch).backward(), batch_size, device)
            eval_bytes = _measured(infer, batch_size, device)
            return Memory(train_bytes, eval_bytes, "measured peak")
        constant = [*model.parameters(), *model.buffers()]
        train_bytes = _counted(lambda batch: saved_bytes(lambda: loss(batch), constant))
        eval_bytes = _counted(lambda batch: peak_bytes(lambda: infer(batch), constant))
        return Memory(train_bytes, eval_bytes, "counted bytes")


def halved_until_it_fits(function: Callable[[int], Result], batch_size: int) -> Result | None:
    """What `function` returns for the first of `batch_size`, its half, its quarter, ... that memory holds.

    None where it does not hold a single image.
    """
    while batch_size > 0:
        try:
            return function(batch_size)
        except torch.OutOfMemoryError:
            batch_size //= 2
        torch.cuda.empty_cache()  # after the except clause, which keeps the tensors of the failed call alive
    return None


def _measured(step: Callable[[int], Any], batch_size: int, device: torch.device) -> float | None:
    """Bytes per image that `step` adds at its peak on a GPU; None where one image does not fit."""

    def peak(batch: int) -> float:
        step(batch)  # allocates what stays: gradients, workspaces of libraries
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(batch)
        return (torch.cuda.max_memory_allocated(device) - before) / batch

    return halved_until_it_fits(peak, batch_size)


def _counted(count: Callable[[int], int]) -> float:
    """Bytes that a third image adds to two; batch norm refuses a single value per channel."""
    return float(count(3) - count(2))


class _Kept:
    """What autograd holds in the place of a tensor that it saves; gone when the graph no longer needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # without its graph: a node that saves its own output makes no cycle


def saved_bytes(function: Callable[[], Any], constant: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of what `function` returns.

    Every storage counts once and in full, however many tensors or views of it are saved. Tensors that the
    graph let go before `function` returned do not count, nor does the memory of `constant` tensors, as a
    model's parameters and buffers.

    Raises:
        TypeError: what `function` returns contains no tensor that requires a gradient.
    """
    packed: list[weakref.ref[_Kept]] = []

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = function()  # the graph lives as long as this name
    if not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
        raise TypeError("the function returns nothing that requires a gradient")
    storages = [kept.tensor.untyped_storage() for kept in (reference() for reference in packed) if kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in constant:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak_bytes(function: Callable[[], Any], constant: Iterable[torch.Tensor] = ()) -> int:
    """Largest number of bytes of tensors made by `function` that are alive at one time while it runs.

    Every storage counts once, from the operation that returns it until its last tensor is gone. `constant`
    tensors, as a model's parameters and buffers, do not count, nor does what is made of them alone: weights
    that autocast converts, for instance.
    """
    with _LiveBytes(constant) as meter:
        function()
    return meter.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return."""

    def __init__(self, constant: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._followed: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._constant: set[int] = set()
        for tensor in constant:
            self._follow(tensor.untyped_storage(), is_constant=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [id(storage) for storage in _storages((args, kwargs))]
        is_constant = bool(inputs) and self._constant.issuperset(inputs)
        for storage in _storages(result):
            self._follow(storage, is_constant)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, storage: torch.UntypedStorage, is_constant: bool) -> None:
        key, size = id(storage), 0 if is_constant else storage.nbytes()
        if key in self._followed:
            return

        def forget(_: object) -> None:
            del self._followed[key]
            self._constant.discard(key)
            self.live -= size

        self._followed[key] = weakref.ref(storage, forget)
        self.live += size
        if is_constant:
            self._constant.add(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """The storages of all tensors in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def images_per_second(
    model: nn.Module,
    image_size: int,
    in_chans: int,
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    seconds: float = 3.0,
) -> float | None:
    """Images per second of inference: the median over batches of one size, after warm-up.

    At least three batches are timed, then further ones for up to `seconds`. Their size is halved until the
    GPU's memory holds them; None where it does not hold one image.
    """

    def speed(batch: int) -> float:
        images = torch.zeros(batch, in_chans, image_size, image_size, device=device)

        def timed_batch() -> float:
            start = time.perf_counter()
            with autocast(precision, device):
                model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        for _ in range(3 if device.type == "cuda" else 1):
            timed_batch()
        durations: list[float] = []
        while len(durations) < 3 or (len(durations) < 50 and sum(durations) < seconds):
            durations.append(timed_batch())
        return batch / statistics.median(durations)

    with mode(model, training=False):
        return halved_until_it_fits(speed, batch_size)
