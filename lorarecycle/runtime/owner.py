"""Which process something on a disk belongs to, and whether that process is still there, as far as can be told."""

from __future__ import annotations

import os
import re
import socket
from functools import lru_cache


def host() -> str:
    """Name of this machine, fit for file names."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "localhost"


@lru_cache(maxsize=1)
def machine() -> str:
    """Digits of what process numbers of this machine count in: machines of one name, containers and boots differ."""
    text = ""
    for place, read in (("/proc/self/ns/pid", os.readlink), ("/proc/sys/kernel/random/boot_id", _first_line)):
        try:
            text += re.sub(r"\D", "", read(place))
        except OSError:
            continue
    return text[:40]


def rank() -> int:
    """This process's number within a run of several, 0 alone."""
    return int(os.environ.get("RANK") or 0)


def started(pid: int) -> str:
    """When a process of this machine began, in the system's ticks; "" where that cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_gone(pid: int) -> bool | None:
    """Whether no process of this machine has that number; None where that cannot be told."""
    if os.name != "posix":
        return None
    try:
        os.kill(pid, 0)  # sends nothing: asks whether there is such a process
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # somebody else's
        return False
    return False


def _first_line(place: str) -> str:
    with open(place, encoding="ascii") as file:
        return file.readline()
