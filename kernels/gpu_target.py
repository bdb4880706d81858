"""What the GPU can hold, for the launchers' choice of tiles; imports triton, so imported on first use."""

from __future__ import annotations

from functools import cache

import torch
import triton

# Shared memory one block may use, in KB, by compute capability (CUDA C++ Programming Guide, Table 30).
_SHARED_KB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}

MAX_REGISTERS = 255
"""Of one thread; as `maxnreg` of a launch it keeps ptxas from spilling for the sake of more blocks side by side."""


def arch() -> int:
    """Compute capability of the current GPU times ten, 90 for an H200; 0 where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return 0
    return int(triton.runtime.driver.active.get_current_target().arch)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; those of an H100 for a meta tensor, 0 where kernels are interpreted."""
    if triton.knobs.runtime.interpret:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def large_shared(gpu: int) -> bool:
    """Whether a block may use at least 163 KB of shared memory (A100, H100 and later data-centre GPUs)."""
    return _SHARED_KB.get(gpu, 99) >= 163


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def precision(x: torch.Tensor) -> str:
    """TF32 for float32 where the user allowed it for PyTorch's own products, else exact float32."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if x.dtype != torch.float32 or allowed else "ieee"
