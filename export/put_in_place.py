"""A hidden folder inside the output to work in, and the step that puts what it holds in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.files import LEFTOVER


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A temporary folder in `target`, removed at the end; so is a `target` that was made here and is empty then.

    It lies inside, as a file moves in one step only within a file system, and `target` may be a mount point or a link.
    """
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target, prefix=LEFTOVER))
    except OSError as error:
        for empty in made:
            if empty.is_dir():
                empty.rmdir()
        raise OSError(
            error.errno, f"cannot write into the folder {target}: {error.strerror}; choose another"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        for empty in made:
            if not any(empty.iterdir()):
                empty.rmdir()


def put_in_place(folder: Path, target: Path, last: str = "") -> None:
    """Move every file of `folder` into `target`, one step each; the one named `last` at the end."""
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
        file.chmod(0o644)
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(file, target / file.name)
