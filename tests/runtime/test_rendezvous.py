import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from vil.runtime.rendezvous import accept_prefix, propose_prefix


def start_ranks(store: dist.Store, order: list[int]) -> set[str]:
    """Return the prefixes on which three ranks agree that start in this order."""

    def agree(rank: int) -> str:
        time.sleep(0.1 * order.index(rank))
        function = propose_prefix if rank == 0 else accept_prefix
        return function(store, rank, 3, time.monotonic() + 20)

    with ThreadPoolExecutor(3) as ranks:
        return set(ranks.map(agree, range(3)))


def test_every_start_has_another_prefix_in_the_same_store():
    store = dist.HashStore()
    prefixes = [start_ranks(store, order) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1])]
    assert all(len(prefix) == 1 for prefix in prefixes)
    assert len(set.union(*prefixes)) == 4


def test_a_missing_rank_is_a_timeout():
    store = dist.HashStore()
    start_ranks(store, [0, 1, 2])
    for function, rank in ((propose_prefix, 0), (accept_prefix, 1)):
        with pytest.raises(TimeoutError, match="a rank did not arrive in time"):
            function(store, rank, 3, time.monotonic() + 0.1)
