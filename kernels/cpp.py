"""Builds and loads the C++ twins of the ops (`csrc/`) on first use, once for each machine."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
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
    """Load the library that the cache of `torch.utils.cpp_extension` holds for these sources; build it first if none.

    Each set of sources, flags and PyTorch has a folder of its own, so that environments do not build over one another
    in turn.
    """
    log = logging.getLogger("torch.utils.cpp_extension")
    log.addFilter(lambda record: not record.getMessage().startswith("No CUDA runtime"))  # these are built for the CPU
    from torch.utils import cpp_extension

    sources = sorted((Path(__file__).parent.parent / "csrc").glob("*_cpu.cpp"))
    if not sources:
        raise FileNotFoundError("the folder csrc/ is not part of this installation")
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in _FLAGS else "DEFAULT"
    flags = ["-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability}", *_FLAGS.get(capability, [])]
    name = f"lorarecycle_cpu_{capability.lower()}"
    facts = [torch.__version__, *flags, *(_hash(source).decode() for source in sources)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    folder = Path(cpp_extension._get_build_directory(name, False), key)
    folder.mkdir(exist_ok=True)

    def build() -> None:
        cpp_extension.load(
            name=name,
            sources=[str(source) for source in sources],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )

    _load(folder / f"{name}{cpp_extension.LIB_EXT}", build)


def _load(library: Path, build: Callable[[], None]) -> None:
    """Load a whole library, or build (and so load) it, one process at a time.

    A library counts only with its hash beside it: loading a truncated one ends the process. Whatever else is in the
    folder goes with one that does not count: objects that were cut with it, of which a build would make use, and the
    lock file of a builder that was killed, for which earlier releases of PyTorch wait for ever.
    """
    with _alone(library.parent):
        if _is_whole(library):
            torch.ops.load_library(library)
            return
        for path in library.parent.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        build()
        if not library.is_file():
            return
        temporary = _record(library).with_suffix(f".{os.getpid()}")
        temporary.write_bytes(_hash(library))
        os.replace(temporary, _record(library))


def _is_whole(library: Path) -> bool:
    record = _record(library)
    return library.is_file() and record.is_file() and record.read_bytes() == _hash(library)


def _record(library: Path) -> Path:
    return library.with_suffix(".sha256")


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


def _hash(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).hexdigest().encode()


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
