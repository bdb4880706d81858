"""Packed linear layers: the numbers and the gradients of those that they stand for."""

import pytest
import torch
from torch import nn

from lorarecycle import InversionConfig, invert, packed
from lorarecycle.packed import PackedLinear, pack
from lorarecycle.prior import BatchNormPrior

needs_bfloat16 = pytest.mark.skipif(not packed._supported(), reason="oneDNN has no bfloat16 on this CPU")


def run(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (dx,) = torch.autograd.grad((y * weights).sum(), x)
    return y, dx


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 197, 48), (3, 48), (2, 0, 48)], ids=str)
def test_linear(shape, bias):
    """Also where something overwrites the layer's output, and at the second call."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias)
    x = torch.randn(shape).bfloat16()
    expected = run(lambda x: 2 * linear(x), x.float())
    layer = PackedLinear(linear.bfloat16())
    for _ in range(2):
        for got, wanted in zip(run(lambda x: layer(x).mul_(2), x), expected, strict=True):
            assert got.dtype == torch.bfloat16
            scale = wanted.abs().max().item() if wanted.numel() else 1.0
            torch.testing.assert_close(got.float(), wanted, rtol=0, atol=2e-2 * scale)


@needs_bfloat16
def test_no_second_derivative():
    layer, x = PackedLinear(nn.Linear(4, 4).bfloat16()), torch.randn(2, 4).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@needs_bfloat16
def test_backbone(tiny_backbone):
    plain = tiny_backbone.clone().to(torch.bfloat16)
    copy = pack(plain)
    assert any(isinstance(m, PackedLinear) for m in copy.modules())
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    images = torch.randn(2, 3, plain.image_size, plain.image_size)
    for got, wanted in zip(run(copy, images), run(plain, images), strict=True):
        assert torch.nn.functional.cosine_similarity(got.float().flatten(), wanted.float().flatten(), dim=0) > 0.999


def test_the_rest_stays_as_it_is(tiny_backbone, monkeypatch):
    assert pack(tiny_backbone) is tiny_backbone
    monkeypatch.setattr(packed, "_supported", lambda: False)
    other = tiny_backbone.clone().to(torch.bfloat16)
    assert pack(other) is other


def test_inversion_in_bfloat16_with_a_prior(tiny_backbone, make_adapter):
    """The usual way on a CPU that knows bfloat16; the caller's model and prior are left alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    prior = BatchNormPrior(network, dtype=torch.bfloat16)
    before = prior.digest(), tiny_backbone.digest()
    config = InversionConfig(steps=3, images_per_class=2, init="noise", prune={1: 0.5})
    adapter = make_adapter(tiny_backbone)
    surrogate = invert(tiny_backbone, adapter, config, prior=prior, dtype=torch.bfloat16, quiet=True)
    assert surrogate.teacher_logits.isfinite().all()
    assert (prior.digest(), tiny_backbone.digest()) == before
    assert not any(isinstance(m, PackedLinear) for m in tiny_backbone.modules())
