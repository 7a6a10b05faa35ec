import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from vil.errors import UserError
from vil.runtime import rendezvous
from vil.runtime.launch import Ranks
from vil.runtime.rendezvous import (
    FailedRankError,
    StartMonitor,
    accept_prefix,
    check_addresses,
    describe_missing,
    gloo_address,
    propose_prefix,
)

ROOT = Path(__file__).parents[2]
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    for name, value in MASTER.items():
        monkeypatch.setenv(name, value)


def host(rank: int) -> dict[str, object]:
    return {"host": f"host{rank}", "address": "10.0.0.1", "node": rank}


def start_ranks(store: dist.Store, order: list[int]) -> set[str]:
    """Return the prefixes on which three ranks agree that start in this order."""

    def agree(rank: int) -> str:
        time.sleep(0.1 * order.index(rank))
        function = propose_prefix if rank == 0 else accept_prefix
        prefix, hosts = function(store, rank, 3, host(rank), StartMonitor(Ranks(rank, 3, 0, 1), 20))
        assert hosts == [host(rank) for rank in range(3)]
        return prefix

    with ThreadPoolExecutor(3) as ranks:
        return set(ranks.map(agree, range(3)))


def test_every_start_has_another_prefix_in_the_same_store():
    store = dist.HashStore()
    prefixes = [start_ranks(store, order) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1])]
    assert all(len(prefix) == 1 for prefix in prefixes)
    assert len(set.union(*prefixes)) == 4


def test_a_rank_that_fails_ends_those_that_wait_for_it():
    failure = {"rank": 2, "host": "host2", "line": "error: command line: lr: wrong", "status": 2}
    for function, rank in ((propose_prefix, 0), (accept_prefix, 1)):
        store = dist.HashStore()
        store.set("vil/failure", json.dumps(failure))
        with pytest.raises(FailedRankError) as caught:
            function(store, rank, 3, host(rank), StartMonitor(Ranks(rank, 3, 0, 1), 20))
        assert str(caught.value) == "rank 2 (host2) failed: command line: lr: wrong"
        assert caught.value.exit_status == 2


def test_missing_ranks_are_named_with_their_hosts_as_far_as_they_are_known(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"WORLD_SIZE": "16", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    known = {0: {"host": "a", "node": 0}, 4: {"host": "b", "node": 1}}
    for missing, text in (
        ([1], "rank 1 of 16 (host a)"),
        ([3, 5], "ranks 3, 5 of 16 (host a, b)"),
        ([15], "rank 15 of 16 (not connected to 127.0.0.1:29511)"),
        (
            list(range(1, 16)),
            "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 7 more of 16 (not connected to 127.0.0.1:29511)",
        ),
    ):
        assert describe_missing(missing, 16, known) == text
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert describe_missing([15], 16, known) == "rank 15 of 16 (not connected to localhost:29511, 127.0.0.1)"


def test_loopback_addresses_are_refused_between_hosts(monkeypatch: pytest.MonkeyPatch):
    hosts = [{"host": name, "address": address} for name, address in (("a", "10.0.0.1"), ("b", "127.0.1.1"))]
    with pytest.raises(UserError) as caught:
        check_addresses(hosts)
    assert str(caught.value) == (
        "network: b, the host of rank 1, resolves to 127.0.1.1, which other machines cannot reach; on every "
        "machine, set GLOO_SOCKET_IFNAME (on GPUs also NCCL_SOCKET_IFNAME) to its network interface, or "
        "correct /etc/hosts"
    )
    check_addresses(hosts[1:] * 2)  # one host
    check_addresses([hosts[0], {"host": "b", "address": ""}])  # GLOO_SOCKET_IFNAME
    found = {"bad": "192.0.2.1", "good": "127.0.0.1"}

    def resolve(name: str, *_: object, **__: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in found.values()]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert gloo_address() == "127.0.0.1"  # no interface has the first one
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert gloo_address() == ""


PROGRAM = """
import os, time
import torch.distributed as dist
from vil.runtime import rendezvous
from vil.runtime.launch import Ranks

rendezvous.WAITING_NOTICE_S = 0.2
for local_rank in (0, 1):
    child = os.fork()
    if child == 0:
        with rendezvous.StartMonitor(Ranks(0, 4, local_rank, 2), 1.2).running() as monitor:
            monitor.waiting_for = "rank 1 of 4"
            time.sleep(0.7)
            monitor.waiting_for = "rank 3 of 4"
            time.sleep(60)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_the_start_ends_after_its_timeout_and_names_the_ranks_it_waits_for():
    """The second rank of a machine prints nothing."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines() == [
        "waiting for rank 1 of 4",
        "waiting for rank 3 of 4",
        "error: start_timeout: still waiting for rank 3 of 4 after 1 s",
    ]
    assert done.stdout.split() == ["1", "1"]


def test_a_failure_reaches_a_rank_that_comes_later(monkeypatch: pytest.MonkeyPatch):
    """Rank 0, which has the store, waits for the others to read its line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {**MASTER, "MASTER_PORT": port, "WORLD_SIZE": "2"}
    code = "from vil.runtime.rendezvous import report_failure; report_failure('error: data: gone', 2)"
    environment = {**os.environ, **variables, "RANK": "0"}
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    for name, value in {**variables, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FailedRankError, match=r"^rank 0 .*failed: data: gone$"):
        rendezvous.create_store(Ranks(1, 2, 0, 1), StartMonitor(Ranks(1, 2, 0, 1), 60))
    assert first.poll() is None
    assert rendezvous.is_repeated_failure("error: data: gone")
    assert not rendezvous.is_repeated_failure("error: data: other")
    rendezvous.report_failure("error: rank 0 failed", 2)
    assert first.wait(20) == 0


def test_a_user_error_is_not_repeated_by_restarts(monkeypatch: pytest.MonkeyPatch):
    store = dist.HashStore()
    store.set("vil/failure", json.dumps({"rank": 0, "host": "a", "line": "error: x", "status": 2}))
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: store)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit) as caught:
        rendezvous.create_store(Ranks(0, 2, 0, 2), StartMonitor(Ranks(0, 2, 0, 2), 20))
    assert caught.value.code == 2
