import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from vil.training import rendezvous


def start(store: dist.Store, order: list[int]) -> set[str]:
    """The names on which three ranks agree that come in this order."""

    def come(rank: int) -> str:
        time.sleep(0.1 * order.index(rank))
        meet = rendezvous._name_start if rank == 0 else rendezvous._join_start
        return meet(store, rank, 3, time.monotonic() + 20)

    with ThreadPoolExecutor(3) as ranks:
        return set(ranks.map(come, range(3)))


def test_every_start_has_a_name_of_its_own():
    """In one store, as torchrun keeps it over all restarts, whoever comes first."""
    store = dist.HashStore()
    names = [start(store, order) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1])]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 4


def test_nobody_waits_for_ever():
    store = dist.HashStore()
    start(store, [0, 1, 2])
    for meet, rank in ((rendezvous._name_start, 0), (rendezvous._join_start, 1)):
        with pytest.raises(TimeoutError):
            meet(store, rank, 3, time.monotonic() + 0.1)
