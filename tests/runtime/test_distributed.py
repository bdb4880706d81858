"""Groups of processes: what `join` made is ended, what the caller made is not."""

import pytest
import torch
import torch.distributed as dist

from lorarecycle.runtime.distributed import ALONE, Group, join, leave

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def own_group():
    """A group of one, which the test makes itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_of_the_caller_stays(own_group):
    assert join(torch.device("cpu")) == Group(0, 1)
    leave()
    assert dist.is_initialized()


def test_alone():
    assert join(torch.device("cpu")) is ALONE
    leave()
    assert not dist.is_initialized()
