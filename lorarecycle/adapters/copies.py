"""Adapters that are there twice: what they share with themselves counts twice, so they are named."""

from __future__ import annotations

from collections.abc import Sequence

from .adapter import Adapter


def note_copies(adapters: Sequence[Adapter]) -> list[str]:
    """A note that names adapters of equal weights, such as a folder and its copy; none where all differ."""
    groups: dict[str, list[str]] = {}
    for adapter in adapters:
        groups.setdefault(adapter.weights_digest(), []).append(adapter.name)
    copies = sorted(" = ".join(sorted(names)) for names in groups.values() if len(names) > 1)
    if not copies:
        return []
    shown = "; ".join(copies[:5]) + ("; ..." if len(copies) > 5 else "")
    return [f"equal weights under several names, of which each counts: {shown}"]
