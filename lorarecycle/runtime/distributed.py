"""Several processes that share one run, as `torchrun` starts them: who this one is, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .meeting import agree

PATIENCE = timedelta(hours=12)
"""How long a process waits for another one; one that dies is noticed by torchrun, which ends or restarts all."""
MEETING = timedelta(minutes=2)
"""How long the processes may take to find one another; those that end with an error then are restarted by torchrun."""


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: this one's number, 0 to size - 1; 0 writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all processes'."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        if self.size > 1:
            import torch.distributed as dist

            with torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor.data, 0)

    def own(self, count: int) -> tuple[int, int]:
        """The part of `count` things that is this process's, [first, last)."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size


ALONE = Group()
_joined: Any = None
"""The process group that `join` made."""


def launched() -> int:
    """How many processes torchrun (or `accelerate launch`) started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def local_rank() -> int | None:
    """This process's number on its machine, which is that of its GPU; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def join(device: torch.device) -> Group:
    """The group that torchrun started this process in, or that the caller has made; alone without one.

    Args:
        device: where this process computes: gloo serves a CPU, nccl a GPU.

    Raises:
        RuntimeError: a group of another kind is there, which cannot exchange tensors of this device.
    """
    import torch.distributed as dist

    global _joined
    if not dist.is_available() or (not dist.is_initialized() and launched() == 1):
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        # torchrun's store outlives a restart: without a name of their own, processes find addresses of those before
        name = agree(dist.PrefixStore("lorarecycle", store), rank, size, MEETING)
        store = dist.PrefixStore(f"lorarecycle {name}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=MEETING)
        _joined = dist.group.WORLD
        dist.barrier()  # all connections are there
        be_patient = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        be_patient(PATIENCE, dist.group.WORLD)
    if device.type == "cpu" and "gloo" not in str(dist.get_backend_config()):
        raise RuntimeError(
            f"the process group must exchange tensors of a CPU, got backend {dist.get_backend()!r}; make it with "
            "`init_process_group('cpu:gloo,cuda:nccl')`."
        )
    return Group(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """End the group that `join` made, at the end of a program; one that the caller made stays."""
    import torch.distributed as dist

    global _joined
    if _joined is not None and dist.is_initialized() and dist.group.WORLD is _joined:
        dist.destroy_process_group()
    _joined = None


def leads() -> bool:
    """Whether this process is the one that prints and writes, known without joining a group."""
    return int(os.environ.get("RANK") or 0) == 0 if launched() > 1 else True
