"""Every few-shot method by name: what it is, where it comes from, what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from .average import AverageNearestMean
from .base import Method, Needs
from .nearest import NearestMean

RECYCLE = "LoRA Recycle (CVPR 2025)"


class Entry(NamedTuple):
    """A method in the registry."""

    make: Callable[..., Method]
    """Its settings as keyword arguments, all with defaults."""
    title: str
    source: str

    @property
    def kind(self) -> type[Method]:
        """Its class."""
        return self.make.func if isinstance(self.make, partial) else self.make  # type: ignore[return-value]

    @property
    def needs(self) -> Needs:
        """What it asks for."""
        return self.kind.needs


METHODS: dict[str, Entry] = {
    "nn": Entry(NearestMean, "NN: nearest class mean", f"{RECYCLE}, Sec. 5, baseline d"),
    "average": Entry(AverageNearestMean, "LoRAs Avg + NN", f"{RECYCLE}, Sec. 5, baseline a"),
}


def find_method(name: str) -> Entry:
    """The entry of a method.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


def make_method(name: str, **settings: Any) -> Method:
    """A method with its settings; those that it does not have are left out where they are None.

    Args:
        name: in `METHODS`.
        settings: of the method's class.

    Raises:
        ValueError: an unknown name, or a setting that the method does not have.
    """
    entry = find_method(name)
    known = {f.name for f in fields(entry.kind) if f.init}  # type: ignore[arg-type]
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"`{unknown[0]}` must be left out for method {name!r}, whose settings are {sorted(known)}.")
    return entry.make(**given)


def describe_methods() -> str:
    """A Markdown table of all methods."""
    rows = [f"| `{name}` | {e.title} | {e.needs.words()} | {e.source} |" for name, e in METHODS.items()]
    return "\n".join(["| name | method | needs | source |", "| --- | --- | --- | --- |", *rows])
