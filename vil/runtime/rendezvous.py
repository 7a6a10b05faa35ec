"""Rendezvous of the processes of one start, without those of an earlier start.

torchrun keeps one store for all restarts of a job (https://github.com/pytorch/pytorch/issues/135712), so that
a process that restarts sooner than another may read the old address of the other and wait for a dead process.
Here all ranks first agree on a prefix for this start, and use the store below it.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_POLL_INTERVAL_S = 0.02


def create_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return an empty store that the ranks of this start share, in the store of torchrun's environment.

    Raises TimeoutError if a rank does not arrive within `timeout` seconds.
    """
    wait = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=wait))
    store.set_timeout(wait)
    agree = propose_prefix if rank == 0 else accept_prefix
    return dist.PrefixStore(agree(store, rank, world_size, time.monotonic() + timeout), store)


def propose_prefix(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """Publish a new prefix with the tokens of the ranks seen so far, until every rank has confirmed it."""
    prefix, others, published = f"start-{secrets.token_hex(8)}", range(1, world_size), None
    while any(_read(store, f"confirmed/{other}") != prefix for other in others):
        tokens = {str(other): _read(store, f"token/{other}") for other in others}
        if tokens != published:
            store.set("start", json.dumps({"prefix": prefix, "tokens": tokens}))
            published = tokens
        _sleep(deadline)
    return prefix


def accept_prefix(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """Confirm the first prefix published with the token of this process: earlier starts lack the token."""
    token = secrets.token_hex(8)
    store.set(f"token/{rank}", json.dumps(token))
    while True:
        start = _read(store, "start")
        if start is not None and start["tokens"].get(str(rank)) == token:
            store.set(f"confirmed/{rank}", json.dumps(start["prefix"]))
            return str(start["prefix"])
        _sleep(deadline)


def _read(store: dist.Store, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None


def _sleep(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("a rank did not arrive in time")
    time.sleep(_POLL_INTERVAL_S)
