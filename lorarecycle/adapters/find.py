"""The PEFT adapters in a folder and below: which are read, and what is passed over, counted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .peft.config import CONFIG_FILE

_CHECKPOINT = re.compile(r"(?:checkpoints?|epochs?|steps?|iter(?:ation)?s?)[-_]?(\d+)", re.IGNORECASE)
_SHELF = re.compile(r"checkpoints?|ckpts?", re.IGNORECASE)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
_ARCHIVE = re.compile(r".*\.(?:zip|7z|rar|tgz|tbz2?|txz|tar(?:\.\w+)?)", re.IGNORECASE)
_SHOWN = 5


class FoundFolders(NamedTuple):
    """What a folder holds."""

    folders: list[Path]
    """PEFT folders to read, sorted."""
    notes: tuple[str, ...]
    """What is passed over, a line for each kind."""


def find_folders(folder: Path) -> FoundFolders:
    """All PEFT folders in a folder and below, the folder itself among them.

    PEFT saves several adapters of one model into one folder and its sub-folders; all of them are found. Of a run's
    checkpoints (`checkpoint-500`, `epoch-0003`, also inside `checkpoints`) the last counts, or none where the run's own
    folder holds an adapter. Hidden files and folders are never read. Symbolic links are followed, each folder once.

    Args:
        folder: that exists.
    """
    candidates: list[Path] = []
    hidden: list[str] = []
    loose: list[str] = []
    packed: list[str] = []
    for path, files, dotted in _walk(folder):
        hidden += [str((path / name).relative_to(folder)) for name in dotted]
        if CONFIG_FILE in files:
            candidates.append(path)
        else:
            loose += [str((path / name).relative_to(folder)) for name in files if Path(name).suffix in _WEIGHTS]
            packed += [str((path / name).relative_to(folder)) for name in files if _ARCHIVE.fullmatch(name)]
    runs: dict[Path, list[Path]] = {}
    for path in candidates:
        runs.setdefault(_run_of(path, folder), []).append(path)
    chosen, earlier = [], []
    for run, members in runs.items():
        last = run if run in members else max(members, key=_step)
        chosen.append(last)
        earlier += [str(path.relative_to(folder)) for path in members if path != last]
    notes = [
        _note(earlier, "earlier checkpoints of the same runs", "name one of them to read it"),
        _note(hidden, "adapters in hidden folders", "rename a folder to read it"),
        _note(loose, f"weights without {CONFIG_FILE}", "see docs/read_and_refused.md for how to convert them"),
        _note(packed, "archives", "unpack them to read the adapters in them"),
    ]
    return FoundFolders(sorted(chosen), tuple(filter(None, notes)))


def find_siblings(folder: Path) -> str:
    """A note on the other adapters that PEFT saved below an adapter's folder; "" where there are none.

    Checkpoints of the same run are none.
    """
    inner = sorted(path.parent.name for path in folder.glob(f"[!.]*/{CONFIG_FILE}"))
    others = [name for name in inner if not _CHECKPOINT.fullmatch(name)]
    return _note(
        others, "more adapters in sub-folders", "`subfolder=` reads one, `recycle` and `load_adapters` read all"
    )


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder that is not hidden, with its files that are not, and its hidden folders that hold an adapter."""
    seen = set()
    for root, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        path = Path(root)
        dotted = sorted(name for name in inner if name.startswith(".") and (path / name / CONFIG_FILE).is_file())
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield path, sorted(name for name in files if not name.startswith(".")), dotted


def _run_of(path: Path, folder: Path) -> Path:
    """The folder of the run that an adapter is of: itself, unless it is a checkpoint."""
    if path == folder or not _CHECKPOINT.fullmatch(path.name):
        return path
    run = path.parent
    return run.parent if run != folder and _SHELF.fullmatch(run.name) else run


def _step(path: Path) -> tuple[int, str]:
    match = _CHECKPOINT.fullmatch(path.name)
    return (int(match[1]) if match else -1, path.name)


def _note(names: list[str], what: str, advice: str) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"not read: {len(names)} {what} ({shown}); {advice}"
