"""Builds and loads the C++ twins of the ops (`csrc/`) on first use, once for each machine."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

logger: logging.Logger = logging.getLogger(__name__)

_FLAGS = {
    "AVX512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512bw",
        "-mfma",
        "-mf16c",
        "-DCPU_CAPABILITY_AVX512",
    ],
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
}

_lock = threading.Lock()
_loaded: bool | None = None


def _build() -> None:
    """Compile into the cache folder of `torch.utils.cpp_extension`; later processes load what is there."""
    from torch.utils import cpp_extension

    sources = sorted(str(path) for path in (Path(__file__).parent.parent / "csrc").glob("*_cpu.cpp"))
    if not sources:
        raise FileNotFoundError("the folder csrc/ is not part of this installation")
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in _FLAGS else "DEFAULT"
    name = f"lorarecycle_cpu_{capability.lower()}"
    folder = Path(cpp_extension._get_build_directory(name, False))
    with _whole_library(folder, folder / f"{name}.so"):
        cpp_extension.load(
            name=name,
            sources=sources,
            extra_cflags=["-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability}", *_FLAGS.get(capability, [])],
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )


@contextmanager
def _whole_library(folder: Path, library: Path) -> Iterator[None]:
    """While one process builds and loads, alone, a library that is not a damaged one of an earlier build.

    Loading a truncated library ends the process; PyTorch builds anew by the age of files alone. Its hash lies beside
    it: without, or with another one, it is removed first. So is the lock file of a builder that was killed, for which
    earlier releases of PyTorch wait for ever.
    """
    record = library.with_suffix(".sha256")
    with _alone(folder):
        (folder / "lock").unlink(missing_ok=True)
        if library.is_file() and not (record.is_file() and record.read_text() == _hash(library)):
            library.unlink()
        yield
        if library.is_file() and not (record.is_file() and record.read_text() == _hash(library)):
            temporary = record.with_suffix(f".{os.getpid()}")
            temporary.write_text(_hash(library))
            os.replace(temporary, record)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process holds the folder; the lock goes with the process. Without one where there are none."""
    handle = None
    try:
        with suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def available() -> bool:
    """Whether the C++ twins can run; the first call builds them, and says in the log why where it cannot."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                try:
                    _build()
                    _loaded = True
                except Exception as error:  # a missing tool and a failed build are one case: the reference runs
                    reason = str(error.__cause__ or error).strip().split("\n")[0]
                    logger.warning("C++ kernels are not built (%s); plain PyTorch runs instead.", reason)
                    _loaded = False
    return _loaded
