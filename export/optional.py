"""Packages that not every installation has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explain_missing(need: str, fix: str) -> Iterator[None]:
    """Around an import: where it fails, an error says what needs it and what to do.

    Raises:
        ImportError: `need`, Python's reason, and `fix`.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{need} ({error}); {fix}") from None
