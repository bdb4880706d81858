"""`split_heads`: the gradient put together in one pass against PyTorch's own; errors."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import split_heads, use_backend

# images, tokens, heads, features of a head
SIZES = [(2, 5, 3, 8), (1, 1, 1, 1), (3, 37, 2, 24), (2, 70, 4, 64)]
LAYOUTS = ("as attention leaves it", "heads outermost", "features not contiguous", "expanded")


def _gradients(layout, size, dtype, device):
    """Three gradients [B, H, M, d], laid out like that."""
    B, M, H, d = size
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def one():
        if layout == "as attention leaves it":
            return random(B, M, H, d).transpose(1, 2)
        if layout == "heads outermost":
            return random(H, B, M, d).transpose(0, 1)
        if layout == "features not contiguous":
            return random(B, H, d, M).transpose(2, 3)
        return random(B, 1, M, 1).expand(B, H, M, d)

    return [one() for _ in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradient_are_those_of_pytorch(size, layout, dtype, device):
    B, M, H, d = size
    qkv = torch.randn(B, M, 3 * H * d, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            parts = split_heads(qkv, H)
        results.append([*parts, *torch.autograd.grad(parts, qkv, _gradients(layout, size, dtype, device))])
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)
    assert results[0][-1].is_contiguous()


def test_a_part_that_is_not_used_has_gradient_zero(device):
    qkv = torch.randn(2, 5, 24, device=device).requires_grad_()
    with use_backend("triton"):
        q, _, v = split_heads(qkv, 2)
    (gradient,) = torch.autograd.grad((q * v).sum(), qkv)
    expected = torch.cat([qkv[..., 16:], torch.zeros_like(qkv[..., 8:16]), qkv[..., :8]], dim=-1)
    assert torch.equal(gradient, expected)


def test_the_parts_are_views(device):
    qkv = torch.randn(2, 5, 24, device=device).requires_grad_()
    with use_backend("triton"):
        parts = split_heads(qkv, 2)
    assert [part.data_ptr() - qkv.data_ptr() for part in parts] == [0, 32, 64]
    assert all(part.shape == (2, 2, 5, 4) for part in parts)


@pytest.mark.medium
def test_compiles_to_one_graph(device):
    qkv = torch.randn(2, 5, 24, device=device).requires_grad_()

    def attend(qkv):
        q, k, v = split_heads(qkv, 2)
        return (q * k + v).sum()

    with use_backend("triton"):
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(qkv)
        eager = attend(qkv)
    for ours, wanted in zip(torch.autograd.grad(compiled, qkv), torch.autograd.grad(eager, qkv), strict=True):
        assert torch.equal(ours, wanted)


def test_a_second_derivative_is_refused(device):
    qkv = torch.randn(1, 2, 6, device=device).requires_grad_()
    with use_backend("triton"):
        q, k, _ = split_heads(qkv, 1)
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad((q * k).sum(), qkv, create_graph=True)


@pytest.mark.parametrize("shape", [(2, 5, 23), (5, 24), (2, 5, 6)], ids=str)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`qkv` must be \[B, M, 3 D\]"):
        split_heads(torch.zeros(shape), 4)
