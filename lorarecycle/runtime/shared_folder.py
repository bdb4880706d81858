"""Whether a folder can keep a run that several processes share, on a network file system too: tried, not guessed."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from .files import LEFTOVER
from .owner import host, machine, rank

SEEN_WITHIN = 90.0
"""Seconds within which other processes must see a file: network file systems keep what they know for up to a minute."""


def require_shared_folder(folder: Path) -> None:
    """Try what runs ask of a folder: exclusive creation, replacing in one step, flushing, reading back.

    Nothing is asked of the times of files, of renaming across folders, or of locks.

    Args:
        folder: that exists.

    Raises:
        ValueError: one of them does not work there; the message names the folder and what failed.
    """
    stem = f"{LEFTOVER}{host()}-{os.getpid()}-{machine()}.r{rank()}.{secrets.token_hex(4)}"
    one, other = folder / stem, folder / f"{stem}b"
    doing = "be written to"
    try:
        _create(one, b"one")
        doing = "refuse to create a file that is there (O_EXCL), which claims on work rest on"
        try:
            _create(one, b"two")
        except FileExistsError:
            pass
        else:
            raise OSError("it was created again")
        doing = "replace one file by another in one step"
        _create(other, b"three")
        os.replace(other, one)
        if other.exists() or one.read_bytes() != b"three":
            raise OSError("the new content was not there afterwards")
    except OSError as error:
        raise ValueError(
            f"`work_dir` {folder} must {doing}, got {error.strerror or error}; choose a folder on another file system."
        ) from error
    finally:
        for path in (one, other):
            with suppress(OSError):
                path.unlink()


def require_seen(path: Path) -> None:
    """Wait until a file that another process wrote is there.

    Raises:
        ValueError: it does not come: the processes do not share the folder.
    """
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"`work_dir` must be one folder for all processes, got {path.parent} in which {host()} does not see "
                f"{path.name} of rank 0; choose a folder on a disk that all machines share."
            )
        with suppress(OSError):
            os.listdir(path.parent)  # asks a network file system anew
        time.sleep(0.05)


def _create(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        os.write(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)
