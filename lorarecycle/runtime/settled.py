"""Reading files that belong together while another process may be replacing them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_WAITS = (0.05, 0.1, 0.2, 0.4)
"""Seconds before each new attempt."""


class TornFolderError(ValueError):
    """Files of a folder that were not saved together."""


def read_settled(folder: Path, names: Iterable[str], read: Callable[[], T]) -> T:
    """What `read()` gives, of files that nobody replaced meanwhile.

    It is called again, after a moment, where they were replaced, or where it raised `TornFolderError`: a writer
    replaces one file after the other.

    Args:
        folder: holds the files.
        names: of all files that `read` may look at; some may be absent.
        read: reads them, and checks that they belong together.

    Raises:
        TornFolderError: the files do not belong together, or do not come to rest.
        Exception: what else `read` raises of files at rest.
    """
    names = tuple(names)
    for wait in (*_WAITS, None):
        before = _stamps(folder, names)
        try:
            result = read()
        except (OSError, ValueError) as error:
            at_rest = _stamps(folder, names) == before
            if isinstance(error, TornFolderError):
                if wait is None:
                    raise
            elif at_rest:
                raise
            elif wait is None:
                raise _restless(folder) from error
        else:
            if _stamps(folder, names) == before:
                return result
            if wait is None:
                raise _restless(folder)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _restless(folder: Path) -> TornFolderError:
    return TornFolderError(
        f"the files in {folder} must stay as they are while they are read, got ones that another process keeps "
        "replacing; read them when it is done."
    )


def _stamps(folder: Path, names: Iterable[str]) -> list[tuple[int, int, int] | None]:
    """Which file each name stands for."""
    found: list[tuple[int, int, int] | None] = []
    for name in names:
        try:
            status = (folder / name).stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found
