"""The process group that torchrun starts, and the collectives that the project uses.

Every function also works without a process group, as with one rank: callers need not distinguish.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from vil.errors import UserError, one_line
from vil.runtime import launch, orphans
from vil.runtime.rendezvous import FailedRankError, StartMonitor, create_store

Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """Rank and device of this process.

    Attributes:
        rank: index among all processes.
        local_rank: index among the processes of this machine, and index of the GPU.
        world_size: number of processes.
        device: of the model and the images.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for rank 0, which prints and writes files."""
        return self.rank == 0


class LostRankError(RuntimeError):
    """Another rank ended, or did not start; the message is one line for the user."""

    exit_status = 1


@contextmanager
def start(device: str = "auto", timeout: float = 1800.0, start_timeout: float = 600.0) -> Iterator[Process]:
    """Join the process group of torchrun; without torchrun, the world size is 1 and there is no group.

    Args:
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, or, for a single process, `cuda:1`.
        timeout: seconds that a collective waits for the other ranks.
        start_timeout: seconds that the start waits for the other ranks; then the process ends with status 1.

    Raises:
        UserError: the device does not exist, or there are more processes than GPUs; a variable of the
            environment is invalid; a host has an address that the other machines cannot reach.
        FailedRankError: another rank failed before it joined.
        LostRankError: the connection to another rank failed.
    """
    ranks = launch.read_ranks()
    with (
        orphans.terminate_with_agent(ranks.rank),
        _join_process_group(ranks, device, timeout, start_timeout) as process,
    ):
        yield process


@contextmanager
def _join_process_group(
    ranks: launch.Ranks, device: str, timeout: float, start_timeout: float
) -> Iterator[Process]:
    rank, world_size = ranks.rank, ranks.world_size
    chosen_device = _choose_device(device, ranks.local_rank, ranks.local_world_size)
    on_gpu = chosen_device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen_device)
    if world_size > 1:
        # With gloo in addition to NCCL, collectives of CPU tensors never wait for a GPU. device_id binds the
        # communicator to this GPU: without it, a barrier selects one.
        try:
            with StartMonitor(ranks, start_timeout).running() as monitor:
                store = create_store(ranks, monitor)
                store.set_timeout(timedelta(seconds=timeout))
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=store,
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout),
                    device_id=chosen_device if on_gpu else None,
                )
        except (UserError, FailedRankError):
            raise
        except (RuntimeError, TimeoutError, ValueError) as error:
            raise LostRankError(f"the ranks cannot connect: {_one_line(error)}") from error
    has_ended = False
    try:
        yield Process(rank, ranks.local_rank, world_size, chosen_device)
        has_ended = True
    except Exception as error:
        reason = lost_rank_reason(error)
        if reason is None:
            raise
        raise LostRankError(reason) from error
    finally:
        # After an error NCCL would wait here for ranks that wait for this one: `command_line.main` prints the
        # error and ends the process with its group.
        if world_size > 1 and (has_ended or not on_gpu):
            dist.destroy_process_group()


def _choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = None
    with suppress(RuntimeError):
        chosen = torch.device(device)
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UserError("device", f"expected auto, cpu or cuda, got {device!r}")
    if chosen.type == "cpu":
        return chosen
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise UserError("device", "cuda was requested, but PyTorch finds no GPU on this machine")
    if gpus == 1 and "SLURM_GPUS_PER_TASK" in os.environ:  # each process of srun sees its own GPU alone
        local_rank, local_world_size = 0, 1
    if local_world_size > gpus:
        reason = f"{local_world_size} processes on this machine, but it has {gpus} GPU(s); each needs one"
        raise UserError("device", reason)
    index = local_rank if chosen.index is None or local_world_size > 1 else chosen.index
    if index >= gpus:
        raise UserError("device", f"there is no cuda:{index}; this machine has {gpus} GPU(s)")
    return torch.device("cuda", index)


def is_distributed() -> bool:
    """Return True if a process group exists."""
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (any shape, equal on all ranks) over all ranks in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def average_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Average each of `tensors` (any shapes, equal on all ranks) over all ranks, in place."""
    if not tensors or not is_distributed():
        return
    total = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = (total / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view_as(tensor))


def broadcast_object(value: Result) -> Result:
    """Return rank 0's `value` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(value: Result) -> list[Result]:
    """Return the `value` of each rank, in the order of the ranks, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def call_on_main(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 alone, and return its result on every rank.

    Raises:
        UserError: on every rank, if `function` raises it.
        LostRankError: on the other ranks, if `function` raises another error, which rank 0 raises.
    """
    outcome: Any = None
    failure: Exception | None = None
    if not is_distributed() or dist.get_rank() == 0:
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, (error.location, error.reason, error.origin))
        except Exception as error:  # of any type: the other ranks wait for the result
            failure = error
            outcome = (None, repr(error))
    result, problem = broadcast_object(outcome)
    if failure is not None:
        raise failure
    if isinstance(problem, str):
        raise LostRankError(f"rank 0 failed: {problem}")
    if problem is not None:
        raise UserError(*problem)
    return result


def call_on_all(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank, and return its result on this one.

    Raises:
        UserError: on every rank, if `function` raises it on any: the one of the first such rank.
    """
    try:
        result, problem = function(), None
    except UserError as error:
        result, problem = None, (error.location, error.reason, error.origin)
    outcomes = all_gather_object((socket.gethostname(), problem))
    for rank, (host, found) in enumerate(outcomes):
        if found is not None:
            location, reason, origin = found
            is_everywhere = all(other == found for _, other in outcomes)
            raise UserError(location, reason if is_everywhere else f"rank {rank} ({host}): {reason}", origin)
    return cast(Result, result)


def lost_rank_reason(error: BaseException) -> str | None:
    """Return one line if `error` was raised by a collective because another rank ended; else None."""
    is_gloo_error = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    if not is_distributed() or not (is_gloo_error or isinstance(error, dist.DistError)):
        return None
    return f"lost connection to another rank: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    """Return the message of an error, without the line of PyTorch's source."""
    return re.sub(r"\[\S*\.(?:cc|cpp|h):\d+\] ?", "", one_line(error, 1000))[:120]


def data_parallel(
    model: nn.Module, process: Process, image_shape: tuple[int, int, int]
) -> DistributedDataParallel:
    """Return `model` with gradients averaged over all ranks.

    Buffers are not broadcast in every step: the trainer averages those of batch norm, and no others differ
    between ranks.

    Args:
        model: on the device of the process, in train mode, equal on all ranks.
        process: this process.
        image_shape: (C, H, W) of the images, for a pass that detects parameters without a gradient: DDP's
            search in every step is slow.
    """
    images = torch.zeros(2, *image_shape, device=process.device)
    probe = copy.deepcopy(model)
    _sum_of_outputs(probe(images)).backward()
    has_unused = any(p.grad is None for p in probe.parameters() if p.requires_grad)
    del probe
    device_ids = [process.device] if process.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    # PyTorch 2.15 renames the option and warns about the old name.
    sync_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    network = DistributedDataParallel(
        model,
        device_ids,
        gradient_as_bucket_view=True,
        find_unused_parameters=has_unused,
        **sync_buffers,  # type: ignore[arg-type]
    )
    _rebuild_buckets(network, images)
    return network


def _sum_of_outputs(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the sum of the logits of a model, or of each of its heads."""
    return torch.stack([output.sum() for output in tree_leaves(outputs)]).sum()


def _rebuild_buckets(network: DistributedDataParallel, images: torch.Tensor) -> None:
    """Run one backward pass, after which DDP rebuilds its buckets in the order of the gradients.

    The buckets decide the order of summation: without this pass the first step of a continued run would
    differ in rounding from the same step of an uninterrupted run.
    """
    buffers = [buffer.clone() for buffer in network.module.buffers()]
    _sum_of_outputs(network(images)).backward()
    network.zero_grad(set_to_none=True)
    for buffer, before in zip(network.module.buffers(), buffers):
        buffer.copy_(before)
