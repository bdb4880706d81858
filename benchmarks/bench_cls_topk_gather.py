"""`cls_topk_gather`, 75 % pruned: against the eager chain and the same chain compiled."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import cls_topk_gather, reference


@pytest.fixture
def inputs(model, device, dtype):
    """q and k are views of a fused qkv, as in a block."""
    generator = torch.Generator().manual_seed(0)
    B, M, H, D = model.batch, model.tokens, model.heads, model.width
    qkv = torch.randn((B, M, 3, H, D // H), generator=generator).to(device, dtype).permute(2, 0, 3, 1, 4)
    return qkv[0], qkv[1], torch.randn((B, M, D), generator=generator).to(device, dtype)


def _bytes(model, dtype, num_keep):
    """Keys are read; kept rows are read and written."""
    return model.batch * model.width * (model.tokens + 2 * (num_keep + 1)) * dtype.itemsize


@pytest.fixture
def op(form, compile_plain):
    forms = {"ours": cls_topk_gather, "eager": reference.cls_topk_gather}
    return forms.get(form) or compile_plain(reference.cls_topk_gather)


@pytest.mark.parametrize("form", ["ours", "eager", "compiled"])
def bench_forward(form, op, model, inputs, dtype, measure, benchmark):
    benchmark.group = f"cls_topk_gather forward {model.name}"
    num_keep = model.patches // 4
    with torch.no_grad():
        measure(lambda: op(*inputs, num_keep), bytes=_bytes(model, dtype, num_keep))


@pytest.mark.parametrize("form", ["ours", "eager", "compiled"])
def bench_forward_and_backward(form, op, model, inputs, dtype, measure, benchmark, grad):
    benchmark.group = f"cls_topk_gather forward and backward {model.name}"
    num_keep = model.patches // 4
    q, k, x = inputs
    x.requires_grad_()
    moved = _bytes(model, dtype, num_keep) + x.nbytes + model.batch * (num_keep + 1) * model.width * dtype.itemsize
    measure(grad(lambda: op(q, k, x, num_keep)[0], [x]), bytes=moved)
