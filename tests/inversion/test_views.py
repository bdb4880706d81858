"""How images are seen at each step: rolled and mirrored by index, gradients back along the same way."""

import pytest
import torch

from lorarecycle import InversionConfig
from lorarecycle.inversion.views import draw_views, seen_as


@pytest.mark.parametrize("view", [(0, 0, 0), (2, -3, 0), (-1, 1, 1), (0, 0, 1), (7, 20, 1)])
def test_views_are_rolls_and_flips(view):
    images = torch.randn(2, 3, 7, 7, requires_grad=True)
    other = images.detach().clone().requires_grad_()
    weights = torch.randn(2, 3, 7, 7)
    seen = seen_as(images, torch.tensor(view))
    expected = other.roll(view[:2], dims=(2, 3))
    expected = expected.flip(-1) if view[2] else expected
    assert torch.equal(seen, expected)
    (seen * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(images.grad, other.grad)


def test_views_stay_within_their_reach():
    config = InversionConfig(steps=400, roll=0.25)
    views = draw_views(config, 16, torch.Generator().manual_seed(0))
    assert views.shape == (400, 3)
    assert views[:, :2].min() == -4
    assert views[:, :2].max() == 4
    assert 150 < views[:, 2].sum() < 250
    still = draw_views(InversionConfig(steps=50, roll=0.0, flip=False), 16, torch.Generator().manual_seed(0))
    assert not still.any()
