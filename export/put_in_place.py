"""A folder beside the output to work in, and the step that puts what it holds in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import LEFTOVER


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent`, removed at the end; so is a `parent` that was made here and is empty then."""
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=LEFTOVER))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        for empty in made:
            if not any(empty.iterdir()):
                empty.rmdir()


def put_in_place(folder: Path, target: Path, last: str = "") -> None:
    """Move every file of `folder` into `target`, one step each; the one named `last` at the end."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
        file.chmod(0o644)
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(file, target / file.name)
