"""The forward pass for many batches gives what the backbone gives."""

import pytest
import torch

from lorarecycle.vit.features import extract_features
from lorarecycle.vit.replay import ReplayedForward

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_features_are_those_of_the_backbone(tiny_backbone, device):
    backbone = tiny_backbone.clone().to(device)
    forward = ReplayedForward(backbone, compile=False)
    generator = torch.Generator().manual_seed(0)
    first = None
    for n in (4, 4, 4, 2, 4, 2, 2):
        images = torch.randn(n, 3, 32, 32, generator=generator).to(device)
        features = forward(images)
        torch.testing.assert_close(features, backbone(images).detach(), rtol=1e-5, atol=1e-5)
        assert not features.requires_grad
        first = features if first is None else first
    again = forward(torch.zeros_like(images))
    assert not torch.equal(features, again), "features of earlier batches are not written over"
    assert first.abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_many_batches_and_a_last_one(tiny_backbone, tiny_data, device):
    backbone = tiny_backbone.clone().to(device)
    whole = extract_features(tiny_backbone, tiny_data.images)
    parts = extract_features(backbone, tiny_data.images, batch_size=5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
