"""Attention with its backward pass on a CPU in bfloat16: PyTorch's fused form beside the one written out.

    pytest benchmarks/bench_attention.py --benchmark-only

Why `attend` writes it out there (`lorarecycle/attention.py`). On CUDA the fused form always runs: nothing to compare.
"""

from __future__ import annotations

import platform

import pytest
import torch

from lorarecycle.vit import attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="attention is written out on CPUs only")
@pytest.mark.parametrize("form", ["fused", "written_out"])
@pytest.mark.parametrize("kept", [1.0, 0.25], ids=["dense", "sparse_75"])
def bench_attention(form, kept, model, benchmark, monkeypatch):
    benchmark.group = f"attention, forward and backward, bfloat16, {model.name}, {kept:.0%} of the patches"
    monkeypatch.setattr(attention, "MAX_STORED", 2**26 if form == "written_out" else 0)
    tokens = 1 + int(model.patches * kept)
    qkv = torch.randn(model.batch, tokens, 3, model.heads, model.width // model.heads, dtype=torch.bfloat16)
    qkv.requires_grad_()

    def run() -> None:
        y = attention.attend(*qkv.permute(2, 0, 3, 1, 4), "sdpa")
        torch.autograd.grad(y, qkv, torch.ones_like(y))

    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
    benchmark.extra_info |= {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    benchmark.extra_info["threads"] = torch.get_num_threads()
