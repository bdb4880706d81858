"""The one reader of npz files: named arrays of plain numbers or text, whose sizes are known before they are read."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .files import refuse_pointer
from .memory import total_memory

PIECE = 1 << 24
"""Bytes that are unpacked at once."""
_BROKEN = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    KeyError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
)
"""What numpy and zipfile raise on damaged files."""


def names_in_npz(path: str | PathLike[str]) -> list[str]:
    """The names of the arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no npz file.
    """
    path = _require_file(path)
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except _BROKEN as error:
        raise _refusal(path, error) from error


def read_npz_arrays(path: str | PathLike[str], names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that are there; no other part of the file is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, arrays of objects, or more than memory holds; the message names the file.
    """
    path = _require_file(path)
    found: dict[str, np.ndarray] = {}
    room = total_memory() or math.inf
    try:
        with zipfile.ZipFile(path) as file:
            infos = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            wanted = [name for name in names if name in infos]
            needed = sum(infos[name].file_size for name in wanted)
            if needed <= room:
                for name in wanted:
                    with file.open(infos[name]) as member:
                        found[name] = _read(member, name, infos[name].file_size)
    except _BROKEN as error:
        raise _refusal(path, error) from error
    if needed > room:
        raise ValueError(
            f"{path} must unpack to less than the {room / 1e9:.0f} GB of memory here, got {needed / 1e9:.0f} GB; use "
            "a folder of images or parquet files, which `open_dataset` leaves on disk."
        )
    return found


def _read(member: Any, name: str, size: int) -> np.ndarray:
    """An array whose header promises as many bytes as there are."""
    try:
        version = np.lib.format.read_magic(member)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(member)
    except Exception as error:  # numpy has Python's own parser read it, whose errors are of many kinds
        raise ValueError(f"{name} with a header that does not parse ({str(error)[:100]})") from error
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise ValueError(f"{name} of type {dtype}")
    promised, there = math.prod(shape) * dtype.itemsize, size - member.tell()
    if min(shape, default=0) < 0 or promised != there:
        raise ValueError(f"{name} of shape {list(shape)} and {promised} bytes in a member of {there}")
    content, done = bytearray(there), 0
    while part := member.read(PIECE):  # to the end, where the checksum is compared; the array is in memory once
        content[done : done + len(part)] = part
        done += len(part)
    array = np.frombuffer(content, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _require_file(path: str | PathLike[str]) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    return path


def _refusal(path: Path, error: Exception) -> ValueError:
    refuse_pointer(path)
    return ValueError(
        f"{path} must be a whole npz file without pickled objects, got {type(error).__name__}: {str(error)[:300]}; "
        "make it again."
    )
