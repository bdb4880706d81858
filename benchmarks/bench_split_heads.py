"""`split_heads`: the gradient of a fused projection from those of queries, keys and values, beside autograd's own."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import split_heads


def _unbound(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("form", ["ours", "eager", "compiled"])
def bench_backward(form, model, device, dtype, measure, benchmark, compile_plain):
    benchmark.group = f"split_heads backward {model.name}"
    B, M, H, D = model.batch, model.tokens, model.heads, model.width
    op = split_heads if form == "ours" else _unbound if form == "eager" else compile_plain(_unbound)
    qkv = torch.randn(B, M, 3 * D, device=device, dtype=dtype).requires_grad_()
    parts = op(qkv, H)
    gradients = [torch.randn(B, M, H, D // H, device=device, dtype=dtype).transpose(1, 2) for _ in parts]
    moved = 2 * qkv.numel() * dtype.itemsize
    measure(lambda: torch.autograd.grad(parts, qkv, gradients, retain_graph=True), bytes=moved)
