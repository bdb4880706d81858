"""Compiles what a launcher would launch on an absent GPU; a program that prints one JSON line a kernel.

    python gpu_compiler.py lora_qkv/large_rank4:bfloat16:90 cls_topk_gather/tokens197_width768:float32:80 ...
    python gpu_compiler.py --cases             # names of the whole grid, a JSON list
    python gpu_compiler.py --configurations    # those that a sweep of sizes would launch and the grid lacks

The launcher runs on meta tensors; every launch is compiled with exactly the arguments, tiles and alignments
it would have, and not started. Needs triton's own ptxas, no GPU and no driver.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class _AbsentGPU(DriverBase):
    """A driver that only knows which chip it stands for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _count(pattern: str, log: str) -> int:
    """Largest number that ptxas reports in this place; a kernel may hold functions it did not inline."""
    return max((int(found) for found in re.findall(pattern, log)), default=0)


def compile_case(case: str, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile all launches of `op[/variant]:dtype:arch` and describe them; `known` are those of earlier cases."""
    from gpu_cases import CASES

    op, dtype, arch = case.split(":")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    triton.runtime.driver.set_active(_AbsentGPU(int(arch)))
    triton.knobs.compilation.always_compile = True  # the log of ptxas is not in the cache
    triton.knobs.nvidia.dump_ptxas_log = True
    found: list[dict[str, Any]] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        log, ptx = output.getvalue(), kernel.asm["ptx"]
        if log:  # else an earlier launch was the same
            known[kernel.hash] = {
                "kernel": self.__name__,
                "shared": kernel.metadata.shared + _count(r"(\d+) bytes smem", log),
                "registers": _count(r"Used (\d+) registers", log),
                "spills": _count(r"(\d+) bytes spill stores", log),
                "num_warps": kernel.metadata.num_warps,
                "wgmma": ptx.count("wgmma.mma_async"),
                "mma": ptx.count("mma.sync"),
                "async_copies": ptx.count("cp.async.c"),
                "products": kernel.asm["ttir"].count("tt.dot "),
            }
        found.append({"case": case, **known[kernel.hash]})
        return kernel

    triton.runtime.jit.JITFunction.run = compile_only
    try:
        CASES[op](torch.float32 if dtype == "tf32" else getattr(torch, dtype))
    finally:
        triton.runtime.jit.JITFunction.run = run
    return found


# Masks of absent operands only leave code out; they are no configurations of their own.
_OPTIONAL = {"HAS_BIAS", "HAS_PREFIX"}


def configurations(launches: Iterable[Callable[[torch.dtype], None]]) -> set[str]:
    """Kernels, dtypes, chips and constants that launches would compile, without compiling them."""
    found: set[str] = set()
    run = triton.runtime.jit.JITFunction.run

    def record(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        dtype = next(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        chosen = {name: value for name, value in constants.items() if name not in _OPTIONAL}
        found.add(f"{self.__name__} {dtype} sm_{arch} {chosen}")

    triton.runtime.jit.JITFunction.run = record
    try:
        for launch, dtype, arch in product(launches, (torch.bfloat16, torch.float16, torch.float32), (80, 90)):
            triton.runtime.driver.set_active(_AbsentGPU(arch))
            launch(dtype)
    finally:
        triton.runtime.jit.JITFunction.run = run
    return found


def _main(arguments: list[str]) -> None:
    from gpu_cases import CASES, sweep

    if arguments == ["--cases"]:
        print(json.dumps(list(CASES)))  # noqa: T201
        return
    if arguments == ["--configurations"]:
        swept = configurations(sweep())
        print(json.dumps({"swept": len(swept), "missing": sorted(swept - configurations(CASES.values()))}))  # noqa: T201
        return
    earlier: dict[str, dict[str, Any]] = {}
    for name in arguments:
        for kernel in compile_case(name, earlier):
            print(json.dumps(kernel), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main(sys.argv[1:])
