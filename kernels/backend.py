"""Which implementation of an op runs: Triton on CUDA, C++ on the CPU, or plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from . import cpp

BACKENDS = ("auto", "reference", "triton", "cpp")

_backend: ContextVar[str] = ContextVar("lorarecycle_backend", default="auto")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose by hand the implementation of every op called inside the `with` block.

    The choice is local to the context (thread or asyncio task) that made it. Enter the block outside of a
    function compiled by `torch.compile`: the compiled function then follows the choice, and is compiled
    once for each.

    Args:
        backend: "auto" (the default: Triton for CUDA tensors, C++ for CPU tensors where an op has such a twin
            and a compiler is there, else plain PyTorch), "reference" (plain PyTorch), "triton" or "cpp" (an
            op without a C++ twin runs its reference). While a model is exported the reference always runs.

    Raises:
        ValueError: the backend is none of these.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


_HAS_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None  # kernels for CUDA only


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of `x` the current one, where Triton launches; does nothing for a tensor elsewhere."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CPP_DTYPES = (torch.float32, torch.bfloat16)


def choose_backend(x: torch.Tensor, *, has_cpp: bool) -> str:
    """Name of the implementation for an op whose main input is `x`: "reference", "triton" or "cpp".

    Args:
        x: the op's main input; its device and dtype decide.
        has_cpp: whether the op has a C++ twin.

    Raises:
        ValueError: the backend chosen by hand cannot run on the device or the dtype of `x`.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # the second: ONNX export through TorchScript, too
        return "reference"
    backend = _backend.get()
    if backend == "auto":
        if x.is_cuda and x.dtype in _TRITON_DTYPES and _HAS_TRITON:
            return "triton"
        backend = "cpp" if has_cpp and x.device.type == "cpu" and x.dtype in _CPP_DTYPES else "reference"
    elif backend == "triton":
        if not x.is_cuda and not _interpreted():
            raise ValueError(
                f"`backend` must be one that runs on the device of the tensors, got 'triton' for {x.device}; "
                "move the tensors to a CUDA device or use 'auto'."
            )
        if x.dtype not in _TRITON_DTYPES:
            raise ValueError(
                f"`backend` must be one that takes the dtype of the tensors, got 'triton' for {x.dtype}; "
                "use float32, float16, bfloat16 or the backend 'reference'."
            )
    elif backend == "cpp" and has_cpp:
        if x.device.type != "cpu":
            raise ValueError(
                f"`backend` must be one that runs on the device of the tensors, got 'cpp' for {x.device}; "
                "move the tensors to the CPU or use 'auto'."
            )
        if x.dtype not in _CPP_DTYPES:
            raise ValueError(
                f"`backend` must be one that takes the dtype of the tensors, got 'cpp' for {x.dtype}; "
                "use float32, bfloat16 or the backend 'reference'."
            )
    if backend != "cpp":
        return backend
    if not has_cpp:
        return "reference"
    if torch.compiler.is_compiling():  # no build inside a trace; where there is no compiler the op itself knows
        return "cpp"
    return "cpp" if cpp.available() else "reference"
