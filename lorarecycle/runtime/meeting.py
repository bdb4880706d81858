"""How the processes of one start of a run find a name of their own, in a store that earlier starts have written to."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import Store

LOOK = 0.02
"""Seconds between two looks at who has come."""


def agree(store: Store, rank: int, size: int, patience: timedelta) -> str:
    """A name that the processes of this start share and no earlier start has had.

    torchrun's store outlives a restart, and nothing that torchrun says tells one start from another on every machine:
    `TORCHELASTIC_RESTART_COUNT` rises only where a process failed, not on the machines that start anew with it. So rank
    0 draws the name. The others must not take one that rank 0 of an earlier start has left: each asks with a word of
    its own, which only a rank 0 that is there now can answer.

    Args:
        store: that all of them reach.
        rank, size: of this process, and of all.
        patience: how long rank 0 waits for the others; they wait as long as the store does.

    Raises:
        RuntimeError: some do not come.
    """
    if rank:
        own = secrets.token_hex(8)
        store.set(f"word of {rank}", own)
        name = store.get(f"answer to {own}").decode()
        store.set(f"{rank} is in {name}", "")
        return name
    name, missing, deadline = secrets.token_hex(8), set(range(1, size)), time.monotonic() + patience.total_seconds()
    answered = set[bytes]()
    while missing:
        for other in sorted(missing):
            if store.check([f"{other} is in {name}"]):
                missing.discard(other)
            elif store.check([f"word of {other}"]):
                word = store.get(f"word of {other}")
                if word not in answered:  # maybe of an earlier start: then nobody hears the answer
                    store.set(f"answer to {word.decode()}", name)
                    answered.add(word)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(
                f"the {size} processes of a run must find one another within {patience.total_seconds():.0f} s, got "
                f"none of rank {', '.join(map(str, sorted(missing)))}; look at what those processes say."
            )
        time.sleep(LOOK if missing else 0)
    return name
