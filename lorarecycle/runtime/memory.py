"""How much memory is free: of a GPU, or of this machine within the limits that a container sets."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHARE = 0.5
"""Of the free memory that images may take where no budget is given."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: on a GPU what its driver says, else what the system says is available."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    total = total_memory()
    found = [_counted("SC_AVPHYS_PAGES") or (int(SHARE * total) if total else 1 << 33)]  # macOS counts no free pages
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = [1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])]
    with suppress(OSError, ValueError):  # a container's limit; "max" is none
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    return min(found)


def total_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    return _counted("SC_PHYS_PAGES")


def image_budget(device: torch.device, given: int | None) -> int:
    """Bytes that images may take in memory: what is given, else half of what is free on the device.

    Raises:
        ValueError: a negative number.
    """
    if given is None:
        sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's, here
        return int(SHARE * free_memory(device) / sharing)
    if given < 0:
        raise ValueError(f"`memory_budget` must be at least 0 bytes, got {given}.")
    return given


def _counted(pages: str) -> int | None:
    """Bytes of the pages that the system counts under this name."""
    with suppress(AttributeError, OSError, ValueError):  # no `sysconf` at all, or not this name
        return max(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)) or None
    return None
