"""Every kernel compiles for sm_80 and sm_90 without a GPU: no spills, memory that fits, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

pytest.importorskip("triton")

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # one block, A100 and H200

DEFAULT = [
    "lora_qkv/even_rank4:bfloat16:90",
    "lora_qkv/even_rank4:float16:80",
    "lora_qkv/even_rank4:float32:90",
    "lora_qkv/even_rank64:bfloat16:90",
    "cls_topk_gather/tokens197_width768:bfloat16:90",
    "cls_topk_gather/tokens197_width768:float32:80",
    "select_tokens/patch16_batch100:bfloat16:90",
    "select_tokens/patch16_batch100:bfloat16:80",
    "split_heads/12x64:bfloat16:90",
    "batch_norm_prior/channels_last_relu+:bfloat16:90",
    "batch_norm_prior/nchw_deep_relu+:float32:80",
]
# tf32: float32 where the user allowed tensor cores for it; the ops that multiply no matrices do not ask
# float16 has the tiles of bfloat16; like tf32 it is compiled for one chip only
DTYPES = {80: ("bfloat16", "float32"), 90: ("bfloat16", "float16", "float32", "tf32")}


def _all_cases(cases: Iterable[str], arch: int) -> list[str]:
    return [
        f"{case}:{dtype}:{arch}"
        for case in cases
        for dtype in DTYPES[arch]
        if dtype != "tf32" or case.startswith(("lora_qkv", "select_tokens"))
    ]


def _compiler(*arguments: str) -> list:
    """A process of its own: this one may have loaded triton's interpreter in place of its compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, HERE / "gpu_compiler.py", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _compile_and_check(cases: list[str]) -> None:
    """One process for each chip, side by side."""
    by_chip = [[case for case in cases if case.endswith(f":{arch}")] for arch in SHARED_LIMIT]
    with ThreadPoolExecutor() as pool:
        kernels = [kernel for found in pool.map(lambda chosen: _compiler(*chosen), by_chip) for kernel in found]
    assert {kernel["case"] for kernel in kernels} == set(cases)
    wrong = []
    for kernel in kernels:
        _, dtype, arch = kernel["case"].split(":")
        if kernel["spills"]:
            wrong.append(f"spills {kernel['spills']} bytes: {kernel}")
        if kernel["shared"] > SHARED_LIMIT[int(arch)]:
            wrong.append(f"needs more shared memory than the chip has: {kernel}")
        hopper = int(arch) == 90 and dtype != "tf32"  # whose tiles may be too low for wgmma
        tensor_core = kernel["wgmma"] if hopper else kernel["wgmma"] + kernel["mma"]
        if dtype != "float32" and tensor_core < kernel["products"]:
            wrong.append(f"a product is not on the tensor cores: {kernel}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_default_set():
    _compile_and_check(DEFAULT)


def test_every_configuration_that_can_be_launched_is_in_the_grid():
    """What launchers choose for a sweep of sizes, ranks and batches, against what the grid compiles."""
    (found,) = _compiler("--configurations")
    assert found["swept"] > 300
    assert not found["missing"], "\n".join(found["missing"])


@pytest.mark.slow
@pytest.mark.grid
def test_full_grid():
    (names,) = _compiler("--cases")
    _compile_and_check([case for arch in SHARED_LIMIT for case in _all_cases(names, arch)])
