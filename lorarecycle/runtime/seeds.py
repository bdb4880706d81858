"""Independent random streams named by what they are for, so that a resumed run draws what an unbroken one draws."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the purpose `names`; equal arguments give equal streams."""
    text = "/".join(map(str, (seed, *names)))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(value % 2**63)


def derive(seed: int, *names: object) -> int:
    """Another seed, for the purpose `names`, in [0, 2**63)."""
    return int(torch.randint(2**63 - 1, (), generator=stream(seed, *names)))
