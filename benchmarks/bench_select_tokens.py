"""`select_tokens`, 75 % pruned: against embedding every patch and gathering, plain and compiled."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import reference, select_tokens


@pytest.fixture
def inputs(model, device, dtype):
    generator = torch.Generator().manual_seed(0)
    B, D, p, N = model.batch, model.width, model.patch, model.patches

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    kept = torch.stack([torch.randperm(N, generator=generator)[: N // 4].sort().values for _ in range(B)])
    return random(B, 3, 224, 224), kept.to(device), random(D, 3, p, p), random(D), random(N, D), random(1, D)


def _product(images, kept, weight, bias, positions, prefix):
    """All patches by a matrix product, as `Backbone` embeds them on a GPU; "dense" is the convolution."""
    patches = reference.cut_patches(images, weight.shape[-1]).flatten(3).flatten(1, 2)
    x = torch.nn.functional.linear(patches, weight.flatten(1), bias) + positions
    return reference.gather_tokens(torch.cat([prefix.expand(len(x), -1, -1), x], dim=1), kept, len(prefix))


@pytest.mark.parametrize("form", ["ours", "sparse", "dense", "dense_compiled", "product"])
def bench_forward(form, model, inputs, dtype, measure, benchmark, compile_plain):
    benchmark.group = f"select_tokens forward {model.name}"
    forms = {"ours": select_tokens, "sparse": reference.select_tokens, "dense": reference.select_tokens_dense}
    forms["product"] = _product
    op = forms.get(form) or compile_plain(reference.select_tokens_dense)
    rows, width = model.batch * (model.patches // 4), 3 * model.patch**2
    moved = dtype.itemsize * (rows * (width + 2 * model.width) + width * model.width)
    with torch.no_grad():
        measure(lambda: op(*inputs), bytes=moved, flops=2 * rows * width * model.width)
