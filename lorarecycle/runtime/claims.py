"""Claims on pieces of work in a folder that several processes share: one does a piece, the others pass it by.

A claim is a file with its owner's host, process, rank and the time, which grows by a byte every few seconds while the
owner lives. Nothing depends on clocks or on the times of files: a claim is nobody's when its process is gone (same
machine), when it is of an earlier start of the same torchrun, or when another process has watched it for a while
without seeing it grow. It saves work only: two that do the same piece write the same file.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import owner

BEAT = 5.0
"""Seconds between two signs of life."""
STALE = 120.0
"""Seconds without a sign of life after which a claim from another machine is nobody's."""


class Claims:
    """Claims in one folder, which is made with the first and removed with the last.

    Args:
        folder: where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._watched: dict[str, tuple[int, float]] = {}  # name -> size, and when it was first seen

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Claim a piece of work while the block runs; yields whether that worked.

        Raises:
            OSError: the folder cannot be written, or is a file.
        """
        path, text = self.folder / name, _describe()
        if not self._create(path, text):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, stop), daemon=True, name=f"claim {name}")
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            with suppress(OSError):
                if path.read_text(encoding="utf-8").startswith(text):  # nobody has taken it over meanwhile
                    path.unlink()

    def clear(self) -> None:
        """Remove the claims of processes that are gone, and the folder where it is empty then."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if self._is_stale(path):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _create(self, path: Path, text: str) -> bool:
        for _ in range(2):
            if path.exists():
                if not self._is_stale(path):
                    return False
                self._take_over(path)
            self._make_folder()
            try:
                _create_whole(path, text)
            except (FileExistsError, FileNotFoundError):  # somebody was faster; or has removed the folder
                continue
            self._watched.pop(path.name, None)
            return True
        return False

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(
                errno.ENOTDIR, f"{self.folder} must be a folder of claims, got a file; move it away"
            ) from error

    def _take_over(self, path: Path) -> None:
        """Put a stale claim away: of several that try, one does."""
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with suppress(OSError):
            os.rename(path, aside)
            aside.unlink()

    def _is_stale(self, path: Path) -> bool:
        try:
            size, text = path.stat().st_size, path.read_text(encoding="utf-8")
        except OSError:
            return False  # gone: its work is done or free
        seen, since = self._watched.get(path.name, (-1, 0.0))
        if seen != size:
            self._watched[path.name] = (size, time.monotonic())
        elif time.monotonic() - since > STALE:
            return True
        try:
            found = json.loads(text.split("\n")[0])
            return isinstance(found, dict) and _is_gone(found)
        except ValueError:  # its owner is writing it, or died while it did
            return False


def _create_whole(path: Path, text: str) -> None:
    """Make a file with its content in one step, or raise FileExistsError; on network file systems too.

    Where the file system has no links, a process that is killed between two steps leaves a claim without an owner.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    beside.write_text(text, encoding="utf-8")
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
    finally:
        beside.unlink(missing_ok=True)


def _describe() -> str:
    """A line about this process; each is different."""
    pid = os.getpid()
    facts = {
        "host": owner.host(),
        "machine": owner.machine(),
        "pid": pid,
        "started": owner.started(pid),
        "rank": owner.rank(),
        "run": os.environ.get("TORCHELASTIC_RUN_ID", ""),
        "agent": os.getppid(),  # torchrun on this machine, which counts its restarts
        "restart": os.environ.get("TORCHELASTIC_RESTART_COUNT", ""),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "token": secrets.token_hex(4),
    }
    return json.dumps(facts) + "\n"


def _is_gone(found: dict[str, Any]) -> bool:
    """Whether the process that a claim describes is known to be gone."""
    run, restart = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    earlier = str(found.get("restart"))
    here = found.get("host") == owner.host() and found.get("machine") == owner.machine()
    ours = here and bool(run) and run != "none" and found.get("run") == run and found.get("agent") == os.getppid()
    if ours and restart.isdecimal() and earlier.isdecimal() and int(earlier) < int(restart):
        return True  # torchrun ends all processes before it starts any anew
    pid = found.get("pid")
    if not here or type(pid) is not int:
        return False
    return owner.is_gone(pid) is True or owner.started(pid) != found.get("started")


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError), open(path, "r+b") as file:  # not made anew where it was taken away
            file.seek(0, os.SEEK_END)
            file.write(b".")
