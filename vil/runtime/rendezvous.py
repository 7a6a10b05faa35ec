"""Rendezvous of the processes of one start, without those of an earlier start.

torchrun keeps one store for all restarts of a job (https://github.com/pytorch/pytorch/issues/135712), so that
a process that restarts sooner than another may read the old address of the other and wait for a dead process.
Here all ranks first agree on a prefix for this start, and use the store below it.

A rank that fails before all ranks are connected writes its message to the store: the others end with
it instead of waiting. A user's error stays there, so that a restart by torchrun does not repeat it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vil.errors import UserError
from vil.runtime import launch
from vil.runtime.console import print_line
from vil.runtime.launch import Ranks

WAITING_NOTICE_S = 15.0
"""Seconds of waiting for other ranks after which to print their ranks."""
_POLL_INTERVAL_S = 0.02
_REPORT_TIMEOUT_S = 15.0
"""Seconds that a rank which fails at the start waits for the store, and for the others to read it."""
_FAILURE, _READERS = "vil/failure", "vil/readers"


class FailedRankError(RuntimeError):
    """Another rank failed before all ranks were connected; the message is its line, `exit_status` its own."""

    def __init__(self, line: str, exit_status: int) -> None:
        super().__init__(line)
        self.exit_status = exit_status


class StartMonitor:
    """Print the ranks that the start waits for, and end the process after `timeout` seconds.

    A thread does both: the main thread may wait in C++ code.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self._prints, self._timeout = ranks.local_rank == 0, timeout
        self.waiting_for = ""
        """Clause that follows `waiting for` in messages; empty if nothing is missing."""

    @contextmanager
    def running(self) -> Iterator[StartMonitor]:
        """Monitor the start inside the context."""
        stopped = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stopped,), name="start monitor", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopped.set()
            thread.join()

    def _watch(self, stopped: threading.Event) -> None:
        start, printed = time.monotonic(), ""
        while not stopped.wait(min(0.5, self._timeout / 10)):
            seconds, missing = time.monotonic() - start, self.waiting_for
            if seconds > self._timeout:
                self._print(f"error: start_timeout: still waiting for {missing} after {seconds:.0f} s")
                os._exit(1)
            if seconds > WAITING_NOTICE_S and missing and missing != printed:
                self._print(f"waiting for {missing}")
                printed = missing

    def _print(self, line: str) -> None:
        if self._prints:
            print_line(line, sys.stderr)


def create_store(ranks: Ranks, monitor: StartMonitor) -> dist.Store:
    """Return an empty store that the ranks of this start share, in the store of torchrun's environment.

    Raises:
        FailedRankError: another rank has failed.
        UserError: the ranks are on several machines, and one of them has an address that others cannot reach.
        SystemExit: a user's error has ended an earlier attempt, which has printed it.
    """
    if ranks.rank != 0:
        monitor.waiting_for = f"rank 0 of {ranks.world_size} (its store is {_store_address()})"
    store = _connect(ranks, timedelta(days=1))  # the monitor ends it
    failure = _read(store, _FAILURE)
    if failure is not None and launch.restart_count() > 0:
        raise SystemExit(failure["status"])
    host = {"host": socket.gethostname(), "address": gloo_address(), "node": _node()}
    agree = propose_prefix if ranks.rank == 0 else accept_prefix
    prefix, hosts = agree(store, ranks.rank, ranks.world_size, host, monitor)
    launch.mark_rendezvous_complete()
    check_addresses(hosts)
    monitor.waiting_for = f"connections between all {ranks.world_size} ranks; this one is {host['address']}"
    return dist.PrefixStore(prefix, store)


def _connect(ranks: Ranks, timeout: timedelta) -> dist.TCPStore:
    """Open the store of the job: torchrun's, or one of rank 0."""
    is_server = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(
        host, port, ranks.world_size, is_server, timeout, wait_for_workers=False, multi_tenant=is_server
    )


def propose_prefix(
    store: dist.Store, rank: int, world_size: int, host: Mapping[str, Any], monitor: StartMonitor
) -> tuple[str, list[Mapping[str, Any]]]:
    """Publish a new prefix with the tokens of the ranks seen so far, until every rank has confirmed it.

    Return the prefix and the hosts of all ranks.
    """
    prefix, others, published = f"start-{secrets.token_hex(8)}", range(1, world_size), None
    described: list[int] = []
    while missing := [other for other in others if _read(store, f"confirmed/{other}") != prefix]:
        arrived = {other: _read(store, f"token/{other}") for other in others}
        tokens = {str(other): found and found["token"] for other, found in arrived.items()}
        if tokens != published:
            store.set("start", json.dumps({"prefix": prefix, "tokens": tokens}))
            published = tokens
        if missing != described:
            known = {0: host, **{other: found["host"] for other, found in arrived.items() if found}}
            monitor.waiting_for, described = describe_missing(missing, world_size, known), missing
        _pause(store)
    hosts = [host, *(_read(store, f"token/{other}")["host"] for other in others)]
    store.set(f"hosts/{prefix}", json.dumps(hosts))
    return prefix, hosts


def accept_prefix(
    store: dist.Store, rank: int, world_size: int, host: Mapping[str, Any], monitor: StartMonitor
) -> tuple[str, list[Mapping[str, Any]]]:
    """Confirm the first prefix published with the token of this process: earlier starts lack the token.

    Return the prefix and the hosts of all ranks.
    """
    token = secrets.token_hex(8)
    store.set(f"token/{rank}", json.dumps({"token": token, "host": host}))
    prefix = None
    while prefix is None:
        start = _read(store, "start")
        if start is not None and start["tokens"].get(str(rank)) == token:
            prefix = str(start["prefix"])
            store.set(f"confirmed/{rank}", json.dumps(prefix))
        else:
            _pause(store)
    monitor.waiting_for = f"the other ranks of {world_size} (rank 0 waits too)"
    while (hosts := _read(store, f"hosts/{prefix}")) is None:
        _pause(store)
    return prefix, hosts


def describe_missing(missing: Sequence[int], world_size: int, known: Mapping[int, Mapping[str, Any]]) -> str:
    """Return a clause with the missing ranks, and their hosts where another rank of the machine is known.

    Args:
        missing: ranks, in rising order.
        world_size: number of ranks.
        known: rank → its `host` and `node`, an index of the machine, for ranks that have arrived.
    """
    per_node = launch.read_ranks().local_world_size
    names = {host["node"]: host["host"] for host in known.values()}
    hosts = [known[rank]["host"] if rank in known else names.get(rank // per_node, "") for rank in missing]
    where = (
        "host " + ", ".join(dict.fromkeys(hosts)) if all(hosts) else f"not connected to {_store_address()}"
    )
    text = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"rank{'s' if len(missing) > 1 else ''} {text} of {world_size} ({where})"


def check_addresses(hosts: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if a rank has the address of the loopback interface and ranks are on several hosts."""
    if len({host["host"] for host in hosts}) == 1:
        return
    for rank, host in enumerate(hosts):
        if host["address"] and ipaddress.ip_address(host["address"]).is_loopback:
            reason = (
                f"{host['host']}, the host of rank {rank}, resolves to {host['address']}, which other "
                "machines cannot reach; on every machine, set GLOO_SOCKET_IFNAME (on GPUs also "
                "NCCL_SOCKET_IFNAME) to its network interface, or correct /etc/hosts"
            )
            raise UserError("network", reason)


def gloo_address() -> str:
    """Return the address that gloo uses on this host; empty if GLOO_SOCKET_IFNAME selects it.

    It is the first address of the host name that this host has, else that of the loopback interface.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(
            socket.gethostname(), None, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return str(address[0]).partition("%")[0]
    return "127.0.0.1"


def _node() -> int:
    """Return the index of this machine, by torchrun or Slurm; else by the number of ranks of each."""
    ranks = launch.read_ranks()
    names = ("GROUP_RANK", "SLURM_NODEID")
    texts = [os.environ[name] for name in names if os.environ.get(name, "").isdecimal()]
    return int(texts[0]) if texts else ranks.rank // ranks.local_world_size


def _store_address() -> str:
    """Return MASTER_ADDR:MASTER_PORT, with the address that the name resolves to."""
    name, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "unknown host"
    return f"{name}:{port}" + ("" if address == name else f", {address}")


# --- Failures before all ranks are connected ----------------------------------------------------------------


def report_failure(line: str, status: int) -> None:
    """Write the failure of this rank to the store, if it is the first; return when the others can read it."""
    ranks = launch.read_ranks()
    host = socket.gethostname()
    content = {"rank": ranks.rank, "host": host, "line": line, "status": status}
    with suppress(RuntimeError, OSError):  # the others wait for this rank, or have ended
        store = _connect(ranks, timedelta(seconds=_REPORT_TIMEOUT_S))
        store.compare_set(_FAILURE, "", json.dumps(content))
        store.add(_READERS, 1)
        is_server = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        deadline = time.monotonic() + _REPORT_TIMEOUT_S
        while is_server and store.add(_READERS, 0) < ranks.world_size and time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)


def is_repeated_failure(line: str) -> bool:
    """Return True if an earlier attempt of this job has ended with this line."""
    with suppress(RuntimeError, OSError):
        failure = _read(_connect(launch.read_ranks(), timedelta(seconds=_REPORT_TIMEOUT_S)), _FAILURE)
        return failure is not None and failure["line"] == line
    return False


def _pause(store: dist.Store) -> None:
    """Sleep until the next poll of the store. Raises FailedRankError if another rank has failed."""
    failure = _read(store, _FAILURE)
    if failure is not None:
        line = f"rank {failure['rank']} ({failure['host']}) failed: {failure['line'].removeprefix('error: ')}"
        raise FailedRankError(line, failure["status"])
    time.sleep(_POLL_INTERVAL_S)


def _read(store: dist.Store, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None
