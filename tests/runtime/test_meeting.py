"""Processes of one start agree on a name, whatever earlier starts have left in the store."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lorarecycle.runtime.meeting import agree

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
PATIENCE = timedelta(seconds=20)


def start(store, size):
    """The name that each rank of a new start comes to."""
    store.set_timeout(PATIENCE)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: agree(store, rank, size, PATIENCE), reversed(range(size))))


def test_each_start_has_one_name():
    store, seen = dist.HashStore(), set()
    for size in (3, 3, 2, 4):  # machines may leave and come
        names = start(store, size)
        assert len(set(names)) == 1
        assert names[0] not in seen
        seen.add(names[0])


def test_ranks_that_died_on_the_way_do_not_count():
    """A start in which ranks 1 and 2 asked and rank 2 did not wait for the answer."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    for rank in (1, 2):
        with pytest.raises(RuntimeError):
            agree(store, rank, 3, PATIENCE)
    with pytest.raises(RuntimeError, match="the 3 processes of a run must find one another within 0 s, got none of"):
        agree(store, 0, 3, timedelta(seconds=0.1))
    assert len(set(start(store, 3))) == 1


def test_rank_0_goes_on_when_all_are_there():
    store, gate = dist.HashStore(), threading.Event()
    store.set_timeout(PATIENCE)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agree, store, 0, 2, PATIENCE)
        gate.wait(0.1)
        assert not first.done()
        assert agree(store, 1, 2, PATIENCE) == first.result()
