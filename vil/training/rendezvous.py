"""How the processes of one start find each other, and no process of an earlier start.

torchrun keeps one store for all restarts of a job (https://github.com/pytorch/pytorch/issues/135712), so that
a process which restarts sooner than another may read the address that the other one had before: it
waits for the dead. Here the store is used under a name of this start alone, on which all ranks agree first.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PAUSE = 0.02


def store_of_this_start(rank: int, world_size: int, timeout: float) -> dist.Store:
    """The store that torchrun's environment names, with nothing in it.

    Args:
        rank: of this process.
        world_size: how many processes there are.
        timeout: seconds to wait for the others.

    Raises:
        TimeoutError: some never came.
    """
    wait = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=wait))
    store.set_timeout(wait)
    meet = _name_start if rank == 0 else _join_start
    name = meet(store, rank, world_size, time.monotonic() + timeout)
    return dist.PrefixStore(f"start-{name}", store)


def _name_start(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """Rank 0 makes up a name, and tells it with whom it has seen, until all of them have confirmed it."""
    name, others, told = secrets.token_hex(8), range(1, world_size), None
    while any(_read(store, f"confirmed/{other}") != name for other in others):
        seen = {str(other): _read(store, f"here/{other}") for other in others}
        if seen != told:
            store.set("start", json.dumps({"name": name, "seen": seen}))
            told = seen
        _pause(deadline)
    return name


def _join_start(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """The others believe a name only where rank 0 has seen them, not who they were in an earlier start."""
    own = secrets.token_hex(8)
    store.set(f"here/{rank}", json.dumps(own))
    while True:
        start = _read(store, "start")
        if start is not None and start["seen"].get(str(rank)) == own:
            store.set(f"confirmed/{rank}", json.dumps(start["name"]))
            return str(start["name"])
        _pause(deadline)


def _read(store: dist.Store, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("some never came")
    time.sleep(_PAUSE)
