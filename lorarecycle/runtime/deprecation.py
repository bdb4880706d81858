"""Old names that keep working for one release, with a warning that says what to write instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

C = TypeVar("C", bound=type)
P = ParamSpec("P")
R = TypeVar("R")

SINCE, UNTIL = "0.2", "0.3"
"""The release that brought the new names, and the one in which the old ones are gone."""


def renamed(old: str, new: str) -> str:
    """What users of an old name are told."""
    return f"`{old}` is called `{new}` since lorarecycle {SINCE}; the old name works until {UNTIL}."


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Say that a name was replaced; the warning points `stacklevel` calls up."""
    warnings.warn(renamed(old, new), DeprecationWarning, stacklevel=stacklevel)


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator of a function whose keyword arguments had other names; the old ones work, with a warning.

    `inspect.signature` and type checkers see the new names only.

    Args:
        names: `old="new"` for each argument.

    Raises:
        TypeError: (when called) an argument given under both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"`{old}` is the old name of `{new}`, got both; give `{new}`.")
                warn_renamed(old, new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_fields(names: Mapping[str, str], removed: Mapping[str, str] | None = None) -> Callable[[C], C]:
    """A decorator of a dataclass some of whose fields had other names, or are gone.

    Old names work as arguments and as attributes. A class that is decorated knows them as `RENAMED` and `REMOVED`.

    Args:
        names: old name -> new name.
        removed: old name -> why it is gone; given as an argument it raises TypeError with that reason.
    """

    def decorate(cls: C) -> C:
        original = renamed_arguments(**names)(cls.__init__)  # type: ignore[misc]

        @wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs.keys() & (removed or {}).keys():
                raise TypeError(f"`{name}` was removed in lorarecycle {SINCE}: {(removed or {})[name]}.")
            original(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        for old, new in names.items():
            setattr(cls, old, property(_getter(old, new)))
        cls.RENAMED, cls.REMOVED = dict(names), dict(removed or {})  # type: ignore[attr-defined]
        return cls

    return decorate


def _getter(old: str, new: str) -> Callable[[Any], Any]:
    def get(self: Any) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)

    return get
