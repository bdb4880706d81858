"""Adapters from whatever a caller has: objects, PEFT models, PEFT folders, Hub ids, or one folder that holds many."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypedDict

from ..runtime.strict import left_out_error
from .adapter import Adapter
from .copies import note_results
from .find import find_folders
from .peft.in_memory import adapter_names, is_peft_model
from .peft.read import read_peft
from .stored import StoredAdapter

logger: logging.Logger = logging.getLogger(__name__)

AdapterLike: TypeAlias = Adapter | str | PathLike[str] | Any
"""An `Adapter`, a PEFT folder, a Hub id, or a PEFT model in memory."""


class HubOptions(TypedDict, total=False):
    """How Hub ids among adapters are fetched; see `Adapter.from_pretrained`."""

    revision: str | None
    token: str | bool | None
    subfolder: str | None
    cache_dir: str | PathLike[str] | None
    local_files_only: bool


class Loaded(NamedTuple):
    """Adapters, and what was left out on the way."""

    adapters: list[Adapter]
    notes: tuple[str, ...]
    """What was not read, a line each; said in the log as well."""
    folders: tuple[Path, ...] = ()
    """On this machine, that they were read from."""


def load_adapters(
    adapters: AdapterLike | Iterable[AdapterLike],
    *,
    strict: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Adapter]:
    """The adapters of `load_all`; arguments and errors as there."""
    return load_all(
        adapters,
        strict=strict,
        revision=revision,
        token=token,
        subfolder=subfolder,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    ).adapters


def load_all(
    adapters: AdapterLike | Iterable[AdapterLike] | Loaded,
    *,
    strict: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    stored: bool = False,
) -> Loaded:
    """Adapters from objects, PEFT models, PEFT folders, Hub ids, or one folder that holds many PEFT folders.

    What is passed over (earlier checkpoints, hidden folders, weights that are no PEFT adapter, LoRA outside the
    blocks) is counted and named in the log and in the notes.

    Args:
        adapters: one or several. A single folder is searched with all that is below it, see `find_folders`; of a PEFT
            model with several adapters all are taken. What this function returned comes back as it is.
        strict: True: anything left out is an error. False: an adapter that cannot be read is left out too. None: what
            is left out is counted and said, and a bad adapter is an error.
        revision: branch, tag or commit of every Hub id.
        subfolder: where the adapter (or the folders of many) lies inside each directory and repository.
        token, cache_dir, local_files_only: for Hub ids, as in `Adapter.from_pretrained`.
        stored: leave the tensors of those that are read from files there until they are used (`StoredAdapter`).

    Raises:
        ValueError: none given or none readable, a `revision` or `subfolder` that nothing uses; with `strict=True`,
            anything left out.
        TypeError: neither adapter nor path.
        FileNotFoundError, PermissionError, ConnectionError: as in `Adapter.from_pretrained`.
    """
    if isinstance(adapters, Loaded):
        return adapters
    notes: list[str] = []
    below: list[Path] = []
    if isinstance(adapters, (str, PathLike)):
        folder = Path(adapters).expanduser()
        searched = folder / subfolder if subfolder else folder
        sources: list[Any] = [adapters]
        if searched.is_dir():
            found = find_folders(searched)
            notes += found.notes
            below = found.folders
            if below != [searched]:
                sources, subfolder = list(below), None
            if not found.folders:
                raise ValueError(
                    f"`adapters` must be a folder of PEFT adapters, got {searched} with none in it or below"
                    f"{''.join(f'; {note}' for note in notes)}."
                )
    elif isinstance(adapters, Adapter) or is_peft_model(adapters):
        sources = [adapters]
    else:
        sources = list(adapters)
    sources = [one for source in sources for one in _apart(source)]
    if not sources:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    _check_sources(sources, revision, subfolder)
    searched_below = set(map(id, below))
    loaded: list[Adapter] = []
    errors: list[Exception] = []
    for source in sources:
        here = not isinstance(source, (str, PathLike)) or Path(source).expanduser().is_dir()
        options: HubOptions = {
            "revision": None if here else revision,
            "token": token,
            "subfolder": subfolder,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        try:
            loaded.append(_load(source, options, searched=id(source) in searched_below, stored=stored))
        except (ValueError, OSError) as error:
            if strict is not False:
                raise
            errors.append(error)
            notes.append(f"left out, as it cannot be read: {_shown(source)} ({error})")
    if not loaded:
        raise ValueError(f"`adapters` must hold at least one that can be read, got {len(errors)} bad: {errors[0]}")
    own = [f"{adapter.name}: {note}" for adapter in loaded for note in adapter.notes]
    if strict and (notes or own):
        raise left_out_error("; ".join([*notes, *own]))
    notes += note_results(sources)
    if notes:
        logger.warning("%d adapters read; %s.", len(loaded), "; ".join(notes))
    paths = (Path(source).expanduser() for source in sources if isinstance(source, (str, PathLike)))
    return Loaded(loaded, (*notes, *own), tuple(path for path in paths if path.is_dir()))


def _load(source: Any, options: HubOptions, *, searched: bool, stored: bool) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, _OfModel):
        return Adapter.from_peft(source.model, source.name)
    read = _read(source, options, searched=searched)
    if not stored:
        return read
    here = Path(source).expanduser().is_dir()
    again: HubOptions = options if here else {**options, "local_files_only": True}  # what was fetched just now
    return StoredAdapter(read, partial(_read, source, again, searched=searched))


def _read(source: str | PathLike[str], options: HubOptions, *, searched: bool) -> Adapter:
    if searched:  # with all that is below it
        return read_peft(Path(source), Adapter, name=Path(source).resolve().name)
    return Adapter.from_pretrained(source, **options)


class _OfModel(NamedTuple):
    """One adapter of a PEFT model."""

    model: Any
    name: str


def _apart(source: Any) -> list[Any]:
    return [_OfModel(source, name) for name in adapter_names(source)] if is_peft_model(source) else [source]


def _check_sources(sources: list[Any], revision: str | None, subfolder: str | None) -> None:
    for source in sources:
        if not isinstance(source, (Adapter, _OfModel, str, PathLike)):
            raise TypeError(
                f"`adapters` must hold Adapter objects, PEFT models, folders or Hub ids, got {type(source).__name__}; "
                "`Adapter.load` reads a folder."
            )
    paths = [source for source in sources if isinstance(source, (str, PathLike))]
    if revision is not None and all(Path(path).expanduser().is_dir() for path in paths):
        raise ValueError(
            f"`revision` must come with a Hub id among `adapters`, got {revision!r} and none; leave it out."
        )
    if subfolder is not None and not paths:
        raise ValueError(f"`subfolder` must come with folders or Hub ids, got {subfolder!r} and none; leave it out.")


def _shown(source: Any) -> str:
    if isinstance(source, _OfModel):
        return f"adapter {source.name!r} of a PEFT model"
    return str(getattr(source, "name", source) if isinstance(source, Adapter) else source)
