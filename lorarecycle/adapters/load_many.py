"""Adapters from whatever a caller has: objects, PEFT folders, Hub ids, or one folder that holds many."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TypedDict

from .adapter import Adapter
from .peft.config import CONFIG_FILE

AdapterLike = Adapter | str | PathLike[str]


class HubOptions(TypedDict, total=False):
    """How Hub ids among adapters are fetched; see `Adapter.from_pretrained`."""

    revision: str | None
    token: str | bool | None
    subfolder: str | None
    cache_dir: str | PathLike[str] | None
    local_files_only: bool


def load_adapters(
    adapters: AdapterLike | Iterable[AdapterLike],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Adapter]:
    """Adapters from objects, PEFT folders, Hub ids, or one folder that holds many PEFT folders.

    Args:
        adapters: one or several.
        revision: branch, tag or commit of every Hub id.
        subfolder: where the adapter (or the folders of many) lies inside each directory and repository.
        token, cache_dir, local_files_only: for Hub ids, as in `Adapter.from_pretrained`.

    Raises:
        ValueError: none given, or a `revision` or `subfolder` that nothing uses.
        TypeError: neither adapter nor path.
        FileNotFoundError, PermissionError, ConnectionError: as in `Adapter.from_pretrained`.
    """
    if isinstance(adapters, (str, PathLike)):
        folder = Path(adapters).expanduser()
        many = _many(folder / subfolder if subfolder else folder)
        sources: list[AdapterLike] = [adapters] if many is None else list(many)
        subfolder = subfolder if many is None else None
    else:
        sources = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    if not sources:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    for source in sources:
        if not isinstance(source, (Adapter, str, PathLike)):
            raise TypeError(
                f"`adapters` must hold Adapter objects, folders or Hub ids, got {type(source).__name__}; "
                "`Adapter.load` reads a folder."
            )
    local = [isinstance(source, Adapter) or Path(source).expanduser().is_dir() for source in sources]
    if revision is not None and all(local):
        raise ValueError(
            f"`revision` must come with a Hub id among `adapters`, got {revision!r} and none; leave it out."
        )
    if subfolder is not None and all(isinstance(source, Adapter) for source in sources):
        raise ValueError(f"`subfolder` must come with folders or Hub ids, got {subfolder!r} and none; leave it out.")
    return [
        source
        if isinstance(source, Adapter)
        else Adapter.from_pretrained(
            source,
            revision=None if here else revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        for source, here in zip(sources, local, strict=True)
    ]


def _many(folder: Path) -> list[Path] | None:
    """The PEFT folders inside one that is none itself, hidden ones (half-written) left out; None for any other."""
    if not folder.is_dir() or (folder / CONFIG_FILE).exists():
        return None
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{CONFIG_FILE}"))
    if not found:
        raise ValueError(f"`adapters` must be a folder of PEFT adapters, got {folder} with none in it.")
    return found
