"""Memory per image and images per second of a model, which is left unchanged.

On a GPU, memory is the measured peak. On a CPU, bytes of tensors are counted, which gives the same figure on
every machine: for training, what autograd saves for the backward pass; for inference, the peak of live
tensors in a forward pass. Workspaces inside kernels are not counted.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vil.config import EvalConfig, Precision, Size, Tree, as_size
from vil.errors import error_reason
from vil.evaluation.complexity import count_parameters, multiply_adds
from vil.runtime.modes import mode
from vil.runtime.precision import autocast, choose_precision

T = TypeVar("T")

CPU_SPEED_BATCH_SIZE = 16
"""Largest batch whose speed is measured on a CPU."""
SPEED_SECONDS = 3.0
"""Time limit of a speed measurement; no batch is started after it."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """Cost of a model, under the keys of eval.py's JSON; None for what cannot be measured.

    Memory is in 10^6 bytes per image, flops are multiply-adds of one image, and `train_precision` is the
    default of train.py on the device.
    """

    params: int
    flops: int | None
    train_memory_mb: float | None
    eval_memory_mb: float | None
    memory: Literal["measured peak", "counted bytes", "not measured"]
    train_precision: Precision
    images_per_second: float | None


def measure_cost(
    model: nn.Module, config: EvalConfig, device: torch.device, speed_model: nn.Module | None = None
) -> Cost:
    """Measure parameters, FLOPs, memory and speed of `model`, which is on `device`.

    A measurement that fails is None, with a warning in the log.

    Args:
        model: maps images (B, in_chans, H, W) to logits (B, classes).
        config: the image size and channels, the precision of inference, and the images of a measured batch.
        device: device of the model.
        speed_model: the model whose speed is measured, e.g. a compiled one; None is `model`.
    """
    given: Tree = {"image_size": config.model.size, "in_chans": config.model.in_chans}
    train_precision = choose_precision(None, device)
    flops = _measure_or_warn("FLOPs", partial(multiply_adds, model, **given))
    given["device"] = device
    precisions: Tree = {"train_precision": train_precision, "eval_precision": config.precision}
    measure = partial(measure_memory, model, **given, **precisions, batch_size=config.batch_size)
    memory = _measure_or_warn("memory", measure) or Memory(None, None, "not measured")
    batch_size = config.batch_size if device.type == "cuda" else min(config.batch_size, CPU_SPEED_BATCH_SIZE)
    given |= {"precision": config.precision, "batch_size": batch_size, "seconds": SPEED_SECONDS}
    speed = _measure_or_warn(
        "images per second",
        partial(images_per_second, model if speed_model is None else speed_model, **given),
    )
    return Cost(
        params=count_parameters(model),
        flops=flops,
        train_memory_mb=None if memory.train is None else memory.train / 1e6,
        eval_memory_mb=None if memory.eval is None else memory.eval / 1e6,
        memory=memory.kind,
        train_precision=train_precision,
        images_per_second=speed,
    )


def _measure_or_warn(quantity: str, measure: Callable[[], T]) -> T | None:
    """Return the measurement; log a warning and return None if it fails, so that no accuracy is lost."""
    try:
        return measure()
    except Exception as error:  # any model of timm is measured, and may raise anything
        _logger.warning("warning: %s cannot be measured: %s", quantity, error_reason(error))
        return None


@dataclass(frozen=True)
class Memory:
    """Bytes per image, without parameters, their gradients and the state of the optimizer.

    Attributes:
        train: a forward and backward pass in train mode; None if a GPU cannot hold one image.
        eval: a forward pass in eval mode without gradients; None as for `train`.
        kind: method by which both were determined.
    """

    train: float | None
    eval: float | None
    kind: Literal["measured peak", "counted bytes", "not measured"]


def measure_memory(
    model: nn.Module,
    image_size: int | Size,
    in_chans: int,
    *,
    device: torch.device,
    train_precision: Precision,
    eval_precision: Precision,
    batch_size: int = 128,
) -> Memory:
    """Measure the memory per image of `model`, which is on `device`.

    On a GPU: the peak of a step minus the memory allocated before, divided by the batch size. On a CPU: the
    counted bytes that one more image adds, which do not depend on the batch size.

    Args:
        model: maps images (B, in_chans, H, W), float32, to logits (B, classes).
        image_size: (height, width) of the images in pixels, or one number for both.
        in_chans: channels of the images.
        device: device of the model.
        train_precision, eval_precision: precision of the forward pass in training and in inference.
        batch_size: images of a measured step, halved until they fit.
    """
    model = copy.deepcopy(model)  # training adds gradients and updates running statistics
    on_gpu = device.type == "cuda"

    def forward(batch_size: int, *, training: bool) -> torch.Tensor:
        images = torch.zeros(batch_size, in_chans, *as_size(image_size), device=device)
        precision = train_precision if training else eval_precision
        with mode(model, training=training), torch.set_grad_enabled(training), autocast(precision, device):
            return model(images)

    def compute_loss(batch_size: int) -> torch.Tensor:
        logits = forward(batch_size, training=True)  # (B, classes)
        return F.cross_entropy(logits.float(), torch.zeros(batch_size, dtype=torch.int64, device=device))

    infer = partial(forward, training=False)

    with torch.random.fork_rng([device] if on_gpu else []):  # for drop path and dropout
        torch.manual_seed(0)
        if on_gpu:
            train = _measure_peak(lambda batch_size: compute_loss(batch_size).backward(), batch_size, device)
            return Memory(train, _measure_peak(infer, batch_size, device), "measured peak")
        constant = [*model.parameters(), *model.buffers()]
        train = _count_per_image(lambda size: saved_bytes(lambda: compute_loss(size), constant))
        evaluation = _count_per_image(lambda size: peak_bytes(lambda: infer(size), constant))
        return Memory(train, evaluation, "counted bytes")


def halve_batch_until_it_fits(function: Callable[[int], T], batch_size: int) -> T | None:
    """Call `function` with `batch_size`, then half of it, and so on while the GPU runs out of memory.

    Returns:
        The first result; None if a single image does not fit.
    """
    while batch_size > 0:
        try:
            return function(batch_size)
        except torch.OutOfMemoryError:
            batch_size //= 2
        torch.cuda.empty_cache()  # after the except clause, which keeps the tensors of the failed call alive
    return None


def _measure_peak(step: Callable[[int], object], batch_size: int, device: torch.device) -> float | None:
    """Return the bytes per image at the peak of `step` on a GPU; None if one image does not fit."""

    def peak(batch_size: int) -> float:
        step(batch_size)  # allocates what persists: gradients, workspaces of libraries
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(batch_size)
        return (torch.cuda.max_memory_allocated(device) - before) / batch_size

    return halve_batch_until_it_fits(peak, batch_size)


def _count_per_image(count: Callable[[int], int]) -> float:
    """Return the bytes that a third image adds; batch norm needs at least two values per channel."""
    return float(count(3) - count(2))


class _SavedTensor:
    """Placeholder for a tensor that autograd saves; freed as soon as the graph no longer needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # an output that its own node saves would make a reference cycle


def saved_bytes(function: Callable[[], object], constant: Iterable[torch.Tensor] = ()) -> int:
    """Return the bytes that autograd saves for the backward pass of the result of `function`.

    Every storage counts once and in full, however many tensors or views of it are saved. Tensors that the
    graph released before `function` returned do not count.

    Args:
        function: returns tensors in nested containers.
        constant: tensors whose memory does not count, such as parameters and buffers.

    Raises:
        TypeError: no tensor of the result requires a gradient.
    """
    references: list[weakref.ref[_SavedTensor]] = []

    def pack(tensor: torch.Tensor) -> _SavedTensor:
        saved = _SavedTensor(tensor)
        references.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = function()  # keeps the graph alive
    if not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
        raise TypeError("the result of the function does not require a gradient")
    alive = [saved for reference in references if (saved := reference()) is not None]
    storages = [saved.tensor.untyped_storage() for saved in alive]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in constant:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def peak_bytes(function: Callable[[], object], constant: Iterable[torch.Tensor] = ()) -> int:
    """Return the peak of bytes of tensors that `function` makes and that are alive at the same time.

    Every storage counts once, from the operation that returns it until its last tensor is freed.

    Args:
        function: runs the operations.
        constant: tensors that do not count, such as parameters and buffers, nor do tensors computed from them
            alone, such as weights converted by autocast.
    """
    with _LiveBytes(constant) as meter:
        function()
    return meter.peak


class _LiveBytes(TorchDispatchMode):
    """Tracks the storages of all tensors that operations return."""

    def __init__(self, constant: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._tracked: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._constant: set[int] = set()
        for tensor in constant:
            self._track(tensor.untyped_storage(), is_constant=True)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # the signature of TorchDispatchMode
        result = func(*args, **(kwargs or {}))
        inputs = [id(storage) for storage in _storages((args, kwargs))]
        is_constant = bool(inputs) and self._constant.issuperset(inputs)
        for storage in _storages(result):
            self._track(storage, is_constant)
        self.peak = max(self.peak, self.live)
        return result

    def _track(self, storage: torch.UntypedStorage, is_constant: bool) -> None:
        key, size = id(storage), 0 if is_constant else storage.nbytes()
        if key in self._tracked:
            return

        def on_free(_: object) -> None:
            del self._tracked[key]
            self._constant.discard(key)
            self.live -= size

        self._tracked[key] = weakref.ref(storage, on_free)
        self.live += size
        if is_constant:
            self._constant.add(key)


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """Return the storages of all tensors in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def images_per_second(
    model: nn.Module,
    image_size: int | Size,
    in_chans: int,
    *,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    seconds: float,
) -> float | None:
    """Return the images per second of inference: the median over batches, after warm-up.

    Args:
        model, image_size, in_chans, device, batch_size: as in `measure_memory`.
        precision: precision of the forward pass.
        seconds: time after which no more batches are timed, except that at least three are.

    Returns:
        None if the GPU's memory does not hold one image.
    """

    def measure(batch_size: int) -> float:
        images = torch.zeros(batch_size, in_chans, *as_size(image_size), device=device)

        def time_batch() -> float:
            start = time.perf_counter()
            with autocast(precision, device):
                model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        for _ in range(3 if device.type == "cuda" else 1):
            time_batch()
        durations: list[float] = []
        while len(durations) < 3 or (len(durations) < 50 and sum(durations) < seconds):
            durations.append(time_batch())
        return batch_size / statistics.median(durations)

    with mode(model, training=False):
        return halve_batch_until_it_fits(measure, batch_size)
