"""One process or many: what `torchrun` says about this process, and the few collectives the project uses.

Every function here also works without a process group, where it does what one rank alone would do, so that
no caller asks how many ranks there are.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vil.config import ConfigError
from vil.training.rendezvous import store_of_this_start

Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """This process among those that train or evaluate together.

    Attributes:
        rank: its number among all, from 0.
        local_rank: its number among those of this machine, which is also the number of its GPU.
        world_size: how many there are.
        device: where its model and images live.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and speaks."""
        return self.rank == 0


class LostRankError(RuntimeError):
    """Another rank is gone, or never came; the text is one line for the user."""


@contextmanager
def start(device: str = "auto", timeout: float = 1800.0) -> Iterator[Process]:
    """Joins the processes that torchrun started; a process started without it is a world of one.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, or `cuda:1` for one process alone.
        timeout: seconds that a rank waits for the others before it gives up.

    Raises:
        ConfigError: the device does not exist, or torchrun started more processes than there are GPUs.
        LostRankError: the processes cannot reach one another, or no longer.
    """
    rank, local_rank, world_size, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    own_device = _choose_device(device, local_rank, local_world_size)
    on_gpu = own_device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(own_device)
    if world_size > 1:
        # gloo beside NCCL: what concerns the CPUs alone never waits for a GPU. device_id binds the
        # communicator to this GPU, so that a barrier cannot guess another one.
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                store=store_of_this_start(rank, world_size, timeout),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=own_device if on_gpu else None,
            )
        except (RuntimeError, TimeoutError, ValueError) as error:
            raise LostRankError(f"the ranks do not reach one another: {_one_line(error)}") from error
    is_over = False
    try:
        yield Process(rank, local_rank, world_size, own_device)
        is_over = True
    except Exception as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise LostRankError(lost) from error
    finally:
        # After an error NCCL would wait here for ranks that wait for this one: `command_line.main` says what
        # it was, and ends the process with the group.
        if world_size > 1 and (is_over or not on_gpu):
            dist.destroy_process_group()


def _choose_device(device: str, local_rank: int, local_world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError("device", f"expected auto, cpu or cuda, got {device!r}") from None
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ConfigError("device", f"expected auto, cpu or cuda, got {device!r}")
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise ConfigError("device", "cuda was asked for, but PyTorch finds no GPU on this machine")
    if local_world_size > gpus:
        raise ConfigError(
            "device",
            f"{local_world_size} processes on this machine, but it has {gpus} GPU(s); each takes one",
        )
    index = local_rank if chosen.index is None or local_world_size > 1 else chosen.index
    if index >= gpus:
        raise ConfigError("device", f"there is no cuda:{index}; this machine has {gpus} GPU(s)")
    return torch.device("cuda", index)


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` (any shape, equal on all ranks) over all ranks, in place."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def average_over_ranks(tensors: Sequence[torch.Tensor]) -> None:
    """Gives every rank the averages of `tensors` (any shapes, equal on all ranks), in place."""
    if not tensors or not is_distributed():
        return
    total = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = (total / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view_as(tensor))


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank; what the others pass is ignored."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank; it runs there alone.

    Raises:
        ConfigError: on every rank, when `function` raises it on rank 0.
        LostRankError: on the others, when it raises anything else, which goes on its way on rank 0.
    """
    outcome: Any = None
    failure: Exception | None = None
    if not is_distributed() or dist.get_rank() == 0:
        try:
            outcome = (function(), None)
        except ConfigError as error:
            outcome = (None, (error.key, error.reason, error.origin))
        except Exception as error:  # the others wait: they must hear of it, whatever it is
            failure = error
            outcome = (None, repr(error))
    result, problem = broadcast_object(outcome)
    if failure is not None:
        raise failure
    if isinstance(problem, str):
        raise LostRankError(f"rank 0 failed: {problem}")
    if problem is not None:
        raise ConfigError(*problem)
    return result


def lost_rank(error: BaseException) -> str | None:
    """What `error`, raised by a collective, says about another rank that is gone; None for any other."""
    is_of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    if not is_distributed() or not (is_of_gloo or isinstance(error, dist.DistError)):
        return None
    return f"another rank is gone: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    """What an error says, without the place in PyTorch's sources."""
    return re.sub(r"\[\S*\.(?:cc|cpp|h):\d+\] ?", "", " ".join(str(error).split()))[:120]


def data_parallel(
    model: nn.Module, process: Process, image_shape: tuple[int, int, int]
) -> DistributedDataParallel:
    """`model` with gradients averaged over all ranks.

    Buffers are not broadcast at every step: the trainer averages batch norm's, and no other differs between
    ranks.

    Args:
        model: on the process's device, equal on all ranks.
        process: this process.
        image_shape: (C, H, W) of its images, to find out whether every parameter gets a gradient; looking for
            those that do not at every step costs time.
    """
    has_unused = _has_unused_parameters(model, process.device, image_shape)
    options: dict[str, Any] = {"device_ids": [process.device]} if process.device.type == "cuda" else {}
    known = inspect.signature(DistributedDataParallel).parameters
    # PyTorch 2.15 renames the option, and warns of the old name.
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    network = DistributedDataParallel(
        model, gradient_as_bucket_view=True, find_unused_parameters=has_unused, **options
    )
    _settle(network, process.device, image_shape)
    return network


def _settle(
    network: DistributedDataParallel, device: torch.device, image_shape: tuple[int, int, int]
) -> None:
    """Has gradients travel once: in what order they are summed is settled by the first backward pass.

    Without it the first step of a continued run would sum in another order than that step of a whole run.
    """
    buffers = [buffer.clone() for buffer in network.module.buffers()]
    network.train()
    network(torch.zeros(2, *image_shape, device=device)).sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, before in zip(network.module.buffers(), buffers):
        buffer.copy_(before)


def _has_unused_parameters(model: nn.Module, device: torch.device, image_shape: tuple[int, int, int]) -> bool:
    probe = copy.deepcopy(model).train()
    probe(torch.zeros(2, *image_shape, device=device)).sum().backward()
    return any(p.grad is None for p in probe.parameters() if p.requires_grad)
