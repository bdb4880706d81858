"""Adapters from whatever people have: objects, PEFT folders, Hub ids, or one folder that holds many."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from .adapter import Adapter

AdapterLike = Adapter | str | PathLike[str]


def load_adapters(adapters: AdapterLike | Iterable[AdapterLike]) -> list[Adapter]:
    """Adapters from objects, PEFT folders, Hub ids, or one folder that holds many PEFT folders.

    Raises:
        ValueError: none given.
        FileNotFoundError: a path without an adapter.
    """
    if isinstance(adapters, (str, PathLike)):
        folder = Path(adapters).expanduser()
        if folder.is_dir() and not (folder / "adapter_config.json").exists():
            found = sorted(p.parent for p in folder.glob("[!.]*/adapter_config.json"))
            if not found:
                raise ValueError(f"`adapters` must be a folder of PEFT adapters, got {folder} with none in it.")
            adapters = list(found)
        else:
            adapters = [adapters]
    elif isinstance(adapters, Adapter):
        adapters = [adapters]
    loaded = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    if not loaded:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    return loaded
