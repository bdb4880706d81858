"""Old names that keep working for one release, with a warning that says what to write instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def warn_renamed(old: str, new: str, *, since: str, until: str, stacklevel: int = 3) -> None:
    """Say that a name was replaced in version `since` and is gone in `until`."""
    text = f"`{old}` is called `{new}` since lorarecycle {since}; the old name works until {until}."
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)


def renamed_fields(
    names: Mapping[str, str], *, since: str, until: str, removed: Mapping[str, str] | None = None
) -> Callable[[C], C]:
    """A decorator of a dataclass some of whose fields had other names, or are gone.

    Old names work as arguments and as attributes. A class that is decorated knows them as `RENAMED`.

    Args:
        names: old name -> new name.
        since, until: versions, see `warn_renamed`.
        removed: old name -> why it is gone; given as an argument it raises TypeError with that reason.
    """

    def decorate(cls: C) -> C:
        original: Callable[..., None] = cls.__init__  # type: ignore[misc]

        @wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            for name, reason in (removed or {}).items():
                if name in kwargs:
                    raise TypeError(f"`{name}` was removed in lorarecycle {since}: {reason}.")
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"`{old}` is the old name of `{new}`, got both; give `{new}`.")
                    warn_renamed(old, new, since=since, until=until)
                    kwargs[new] = kwargs.pop(old)
            original(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        for old, new in names.items():
            setattr(cls, old, property(_getter(old, new, since, until)))
        cls.RENAMED = dict(names)  # type: ignore[attr-defined]
        cls.REMOVED = dict(removed or {})  # type: ignore[attr-defined]
        return cls

    return decorate


def _getter(old: str, new: str, since: str, until: str) -> Callable[[Any], Any]:
    def get(self: Any) -> Any:
        warn_renamed(old, new, since=since, until=until)
        return getattr(self, new)

    return get
