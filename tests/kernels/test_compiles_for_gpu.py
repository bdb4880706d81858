"""Every kernel compiles for sm_80 and sm_90 without a GPU: no spills, memory that fits, tensor cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # one block, A100 and H200

DEFAULT = [
    "lora_qkv:bfloat16:90",
    "lora_qkv:float16:80",
    "lora_qkv:float32:90",
    "lora_qkv/many:bfloat16:90",
    "lora_qkv/rank64:bfloat16:90",
    "cls_topk_gather:bfloat16:90",
    "cls_topk_gather:float32:80",
    "select_tokens:bfloat16:90",
    "select_tokens:bfloat16:80",
    "batch_norm_prior:bfloat16:90",
    "batch_norm_prior/channels_last:float32:80",
]


def _all_cases() -> list[str]:
    spec = importlib.util.spec_from_file_location("gpu_cases", HERE / "gpu_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [
        f"{case}:{dtype}:{arch}"
        for case in module.CASES
        for dtype in ("bfloat16", "float16", "float32")
        for arch in (80, 90)
    ]


def _compile(cases: list[str]) -> list[dict]:
    """A process of its own: this one may have loaded triton's interpreter in place of its compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, HERE / "gpu_compiler.py", *cases], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(kernels: list[dict], cases: list[str]) -> None:
    assert {kernel["case"] for kernel in kernels} == set(cases)
    wrong = []
    for kernel in kernels:
        _, dtype, arch = kernel["case"].split(":")
        if kernel["spills"]:
            wrong.append(f"spills {kernel['spills']} bytes: {kernel}")
        if kernel["shared"] > SHARED_LIMIT[int(arch)]:
            wrong.append(f"needs more shared memory than the chip has: {kernel}")
        tensor_core = kernel["wgmma"] if int(arch) == 90 else kernel["mma"]
        if dtype != "float32" and tensor_core < kernel["products"]:
            wrong.append(f"a product is not on the tensor cores: {kernel}")
    assert not wrong, "\n".join(wrong)


def test_default_set():
    _check(_compile(DEFAULT), DEFAULT)


@pytest.mark.slow
def test_full_grid():
    cases = _all_cases()
    _check(_compile(cases), cases)
