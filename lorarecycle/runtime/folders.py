"""Folders that appear whole: written aside, then put in place at the end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path

from .files import flush, flush_folder, hidden_folder, holders_of_new, move, reason, remove_leftovers

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


@contextmanager
def atomic_folder(
    target: str | PathLike[str],
    *,
    first: str | None = None,
    last: Sequence[str] = (),
    stale: Collection[str] | Callable[[], Collection[str]] = (),
) -> Iterator[Path]:
    """A hidden folder to write files into, which are put into `target` when the block ends without an error.

    A target that is not there yet appears in one step. In one that is, each file is replaced in one step of its own:
    the hidden folder lies inside, as the target may be a mount point or a link to another file system. What processes
    that are gone left there is removed first; what others may be writing stays.

    Args:
        target: the folder, made with its parents where it is absent.
        first: name of the file that is replaced before all others, such as one that says what the others must be.
        last: names of files that are replaced after all others, in this order, such as one that lists them.
        stale: names of files of an earlier writer, removed before the `last` unless this one wrote them too; or what
            gives them, called when no other writer puts files into the target.

    Yields:
        the hidden folder; files only, no folders in it.

    Raises:
        OSError: writing failed; the message names `target` and says whether its files are still those from before.
            After any error in the block nothing is left, folders made here included.
        ValueError: `stale` names something outside the folder.
    """
    if not callable(stale):
        _require_names(stale)
    real = Path(os.path.realpath(os.path.expanduser(target)))
    remove_leftovers(real)
    remove_leftovers(real.parent)
    changed = [real, real.parent, *holders_of_new(real.parent)]
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(hidden_folder(real if real.exists() else real.parent))
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write into the folder {target}: {reason(error)}; choose another"
            ) from error
        try:
            yield folder
        except OSError as error:
            if error.errno not in _DISK and folder.name not in str(error):  # of something else that the block does
                raise
            raise OSError(
                error.errno, f"cannot write {target}: {reason(error)}; earlier files are unchanged"
            ) from error
        names = sorted(path.name for path in folder.iterdir())
        early = [first] if first in names else []
        final = [name for name in last if name in names]
        middle = [name for name in names if name not in (*early, *final)]
        _put_in_place(folder, real, target, [*early, *middle], final, stale)
    for each in changed:
        flush_folder(each)


def _put_in_place(
    folder: Path,
    real: Path,
    target: str | PathLike[str],
    before: Sequence[str],
    last: Sequence[str],
    stale: Collection[str] | Callable[[], Collection[str]],
) -> None:
    names = [*before, *last]
    placed: list[str] = []
    made = not real.exists()
    try:
        for name in names:
            flush(folder / name)
        flush_folder(folder)
        if not (made and _renamed(folder, real)):
            real.mkdir(exist_ok=True)
            for name in names:
                if (real / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, f"{name} there is a folder")
            with _alone(real):
                old = set(stale() if callable(stale) else stale) - set(names)
                _require_names(old)
                for name in before:
                    move(folder / name, real / name)
                    placed.append(name)
                for name in old:
                    (real / name).unlink(missing_ok=True)
                for name in last:
                    move(folder / name, real / name)
                    placed.append(name)
    except OSError as error:
        if made:
            with suppress(OSError):  # holds something
                real.rmdir()
        state = "earlier files are unchanged"
        if placed:
            state = f"{', '.join(placed)} are new, other files as before; write again"
        raise OSError(error.errno, f"cannot write {target}: {reason(error)}; {state}") from error


def _require_names(stale: Collection[str]) -> None:
    for name in stale:
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"`stale` must be names of files in the folder, got {name!r}.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other writer of this kind puts files into a folder, where the system can tell.

    The lock goes with the process. A writer that does not come to its end is waited for 5 s.
    """
    handle = None
    try:
        with suppress(ImportError, OSError):  # no such locks on this system, or on this file system
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            for _ in range(500):
                with suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.01)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _renamed(folder: Path, real: Path) -> bool:
    """Whether the target could appear in one step: not where another process was quicker, nor on some layered disks."""
    try:
        os.rename(folder, real)
    except OSError:
        return False
    return True
