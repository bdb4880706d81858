"""Builds and loads the C++ twins of the ops (`csrc/`) on first use, once for each machine."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

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
    cpp_extension.load(
        name=f"lorarecycle_cpu_{capability.lower()}",
        sources=sources,
        extra_cflags=["-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability}", *_FLAGS.get(capability, [])],
        extra_ldflags=["-fopenmp"],
        is_python_module=False,
    )


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
