"""Packed layers: the numbers and the gradients of the layers that they stand for."""

import copy

import pytest
import torch
from torch import nn

from lorarecycle.packed import PackedLinear, pack

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="packs for oneDNN")


def run(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (dx,) = torch.autograd.grad((y * weights).sum(), x)
    return y, dx


def check(layer, x):
    """In bfloat16 as near to float32 as the layer itself is."""
    layer = nn.Sequential(layer).requires_grad_(False)
    expected = run(layer, x.float())
    packed = pack(copy.deepcopy(layer).bfloat16())
    assert type(packed[0]) is not type(layer[0])
    for _ in range(2):  # packs at the first call
        for name, got, wanted in zip(("y", "dx"), run(packed, x.bfloat16()), expected, strict=True):
            assert got.dtype == torch.bfloat16
            assert got.shape == wanted.shape
            gap = (got.float() - wanted).abs().max() if got.numel() else 0.0
            assert gap <= 2e-2 * (wanted.abs().max() if got.numel() else 1.0), name


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 197, 48), (3, 48), (2, 0, 48)], ids=str)
def test_linear(shape, bias):
    torch.manual_seed(0)
    check(nn.Linear(48, 80, bias=bias), torch.randn(shape))


@needs_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolution(bias, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 16, 9, 10).to(memory_format=layout)
    check(nn.Conv2d(16, 24, 1, bias=bias), x)


@needs_onednn
@pytest.mark.parametrize("size", [(32, 32), (33, 30), (31, 35)], ids=str)
@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (3, 0), ((5, 3), (2, 1))], ids=str)
def test_stem(kernel, padding, size):
    torch.manual_seed(0)
    check(nn.Conv2d(3, 16, kernel, 2, padding, bias=False), torch.randn(2, 3, *size))


def test_the_rest_stays():
    layers = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, 2),
        nn.Conv2d(3, 4, 7, 2, padding_mode="reflect", padding=3),
        nn.Conv2d(3, 4, 4, 2),
        nn.Conv2d(3, 4, 3, 2, dilation=2),
    ]
    network = nn.Sequential(*layers).bfloat16()
    assert list(pack(network)) == layers
    for other in (nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)).double()):
        assert type(pack(other)[0]) is nn.Linear


@needs_onednn
def test_a_backbone_and_what_shares_its_weights(tiny_backbone):
    plain = tiny_backbone.clone().to(torch.bfloat16)
    packed = pack(plain.clone())
    assert any(isinstance(m, PackedLinear) for m in packed.modules())
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
    images = torch.randn(2, 3, packed.image_size, packed.image_size)
    found = [run(backbone, images) for backbone in (plain, packed)]
    for got, wanted in zip(found[1], found[0], strict=True):
        assert torch.nn.functional.cosine_similarity(got.float().flatten(), wanted.float().flatten(), dim=0) > 0.999
