"""What a run leaves for people: its plan, what it took, where it ran, and what each adapter counts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from .adapters.adapter import Adapter
from .adapters.stored import head_of
from .meta.influence import leave_one_out
from .plan import Plan
from .runtime.version import __version__


def summarise(
    plan: Plan, seconds: Mapping[str, float], adapters: Sequence[Adapter], meta_lora: Adapter, *, resumed: bool
) -> dict[str, Any]:
    """The summary of a run, JSON-ready; `run.json` holds its settings and hashes.

    Args:
        plan: what was meant to be done.
        seconds: that each stage took.
        adapters: that took part.
        meta_lora: what came out.
        resumed: whether the folder held parts of the run before, so that `seconds` are of the rest alone.
    """
    return {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"lorarecycle": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": describe_machine(),
        "title": plan.title,
        "stages": [
            {"name": s.name, "what": s.what, "amount": s.amount, "bytes": s.bytes, "seconds": s.seconds}
            for s in plan.stages
        ],
        "notes": list(plan.notes),
        "took": dict(seconds),
        "resumed": resumed,
        "adapters": [
            {
                "name": adapter.name,
                "classes": list(head.class_names) if (head := head_of(adapter)) is not None else [],
                "rank": max(adapter.ranks.values()),
                **found._asdict(),
            }
            for adapter, found in zip(adapters, leave_one_out(adapters, meta_lora), strict=True)
        ],
    }


def describe_machine() -> str:
    """The GPU's name, or the number of cores that this process may use and their kind."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{cores} cores, {platform.machine()}, {torch.get_num_threads()} threads"
