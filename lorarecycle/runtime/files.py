"""Files that are whole or absent: written aside, flushed, then put in place."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the exported session writes files without torch
    from torch import Tensor

LEFTOVER = ".partly-written-"


def write_atomic(path: str | PathLike[str], write: Callable[[Path], object]) -> Path:
    """Write a file through `write(temporary_path)` and put it in place in one step.

    Whatever goes wrong on the way (disk full, process killed), an earlier file at `path` stays whole.

    Raises:
        OSError: writing failed; the message names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=LEFTOVER)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path}: {error.strerror or error}; an earlier file is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_leftovers(folder: str | PathLike[str]) -> None:
    """Remove what writers left in a folder when their process was killed."""
    for path in Path(folder).glob(f"{LEFTOVER}*"):
        path.unlink()


def write_text(path: str | PathLike[str], text: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | PathLike[str], content: object) -> Path:
    """Write JSON atomically, keys in the order given."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON; the message names the file and the place.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be JSON, got text that does not parse ({error}); fetch the file again."
        ) from error


def save_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None
) -> Path:
    """Write a safetensors file atomically; `metadata` values are stored as JSON."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {"format": "pt", **{key: json.dumps(value) for key, value in (metadata or {}).items()}}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, str(temporary), metadata=meta)
        except SafetensorError as error:  # disk full arrives as one of these
            raise OSError(None, str(error)) from error

    return write_atomic(path, write)


def load_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU, and the metadata as stored (strings).

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, corrupt or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got one that does not read ({error}); fetch or make it again."
        ) from error
