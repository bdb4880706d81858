"""`prototype_head` of a 5-way episode: plain PyTorch beside the backbone's share of the same step.

A fused kernel has to beat the compiled form, and can save no more than the time shown here.
"""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import prototype_head

N_WAY, N_SHOT, N_QUERY = 5, 5, 15


@pytest.fixture
def episode(model, device, dtype):
    generator = torch.Generator().manual_seed(0)
    support = torch.randn((N_WAY * N_SHOT, model.width), generator=generator).to(device, dtype)
    query = torch.randn((N_WAY * N_QUERY, model.width), generator=generator).to(device, dtype)
    return support, torch.arange(N_WAY, device=device).repeat_interleave(N_SHOT), query


@pytest.mark.parametrize("form", ["eager", "compiled"])
def bench_forward_and_backward(form, model, episode, measure, benchmark, grad):
    benchmark.group = f"prototype_head forward and backward {model.name}"
    op = prototype_head if form == "eager" else torch.compile(prototype_head, fullgraph=True)
    support, labels, query = episode
    support.requires_grad_()
    query.requires_grad_()
    moved = 3 * (support.nbytes + query.nbytes)
    measure(grad(lambda: op(support, labels, query, N_WAY), [support, query]), bytes=moved)


def bench_one_block(model, device, dtype, measure, benchmark):
    """The qkv product of one block on the episode's images (a tenth of them on the CPU): the step's scale."""
    benchmark.group = f"prototype_head forward and backward {model.name}"
    rows = N_WAY * (N_SHOT + N_QUERY) * model.tokens // (1 if torch.cuda.is_available() else 10)
    x = torch.zeros(rows, model.width, device=device, dtype=dtype)
    weight = torch.zeros(3 * model.width, model.width, device=device, dtype=dtype)
    measure(lambda: x @ weight.T, bytes=x.nbytes + weight.nbytes, flops=2 * rows * weight.numel())
