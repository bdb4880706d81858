"""The forward pass for many batches gives what the backbone gives."""

import time
from concurrent.futures import ThreadPoolExecutor

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


class Sums:
    """A backbone that takes its time."""

    device = torch.device("cpu")

    def __call__(self, images, pool):
        time.sleep(0.005)
        return images.flatten(1).sum(1, keepdim=True)


@pytest.fixture
def captured():
    """Buffers as on a GPU, without a graph."""
    forward = ReplayedForward(Sums(), compile=False)
    forward._graphs = True
    return forward


def test_threads_get_features_of_their_own_images(captured):
    def ask(value):
        return [captured(torch.full((2, 3, 4, 4), value)) for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for value, found in enumerate(pool.map(ask, map(float, range(4)))):
            assert all(torch.equal(each, torch.full((2, 1), 48.0 * value)) for each in found)


def test_first_calls_in_inference_mode(captured):
    images = torch.ones(2, 3, 4, 4)
    with torch.inference_mode():
        found = [captured(images) for _ in range(3)]
    assert torch.equal(captured(2 * images), 2 * found[0])


def test_shapes_that_do_not_come_often_are_not_captured():
    forward = ReplayedForward(Sums(), compile=False, after=2)
    forward._graphs = True
    for times in range(1, 5):
        forward(torch.ones(2, 3, 4, 4))
        assert len(forward._steps) == (times > 2)
