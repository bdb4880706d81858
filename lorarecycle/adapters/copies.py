"""Adapters that are there twice, as copies or in what was made of them: they count twice, so they are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from ..runtime.files import read_object
from .adapter import Adapter
from .peft.metadata import METADATA_FILE


def note_copies(adapters: Sequence[Adapter]) -> list[str]:
    """A note that names adapters of equal weights, such as those of a folder and its copy; none where all differ."""
    groups: dict[str, list[str]] = {}
    for adapter in adapters:
        groups.setdefault(adapter.weights_digest(), []).append(adapter.name)
    copies = sorted(" = ".join(_counted(names)) for names in groups.values() if len(names) > 1)
    if not copies:
        return []
    shown = "; ".join(copies[:5]) + ("; ..." if len(copies) > 5 else "")
    return [f"equal weights, of which each copy counts: {shown}"]


def _counted(names: Sequence[str]) -> list[str]:
    """Each name once; a copied folder's adapter has the name of the first."""
    return [name + (f" ({count} times)" if count > 1 else "") for name, count in sorted(Counter(names).items())]


def note_results(sources: Sequence[Any]) -> list[str]:
    """A note that names the folders among several in which a result lies: an adapter that was made of others."""
    results = []
    folders = [Path(one).expanduser() for one in sources if isinstance(one, (str, PathLike))]
    for folder in folders if len(sources) > 1 else ():
        with suppress(ValueError, OSError):  # of a Hub id; damaged
            if read_object(folder / METADATA_FILE).get("sources"):
                results.append(folder.name)
    if not results:
        return []
    shown = ", ".join(sorted(results)[:5]) + (", ..." if len(results) > 5 else "")
    return [f"made of other adapters, and counted as one more: {shown}; keep results in another folder"]
