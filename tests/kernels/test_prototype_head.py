"""`prototype_head`: plain PyTorch only; its formula, gradient and the distance of zero."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import prototype_head


def _episode():
    generator = torch.Generator().manual_seed(0)
    support, query = torch.randn((6, 5), generator=generator), torch.randn((4, 5), generator=generator)
    return support, torch.tensor([2, 0, 1, 0, 2, 1]), query


@pytest.mark.parametrize(("distance", "power"), [("euclidean", 1), ("sqeuclidean", 2)])
def test_equals_the_equation(distance, power):
    support, labels, query = _episode()
    centres = torch.stack([support[labels == c].mean(0) for c in range(3)])
    expected = torch.stack([torch.stack([-((q - c).norm() ** power) for c in centres]).log_softmax(0) for q in query])
    assert torch.allclose(prototype_head(support, labels, query, 3, distance), expected, atol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
def test_gradcheck(distance):
    support, labels, query = _episode()
    inputs = support.double().requires_grad_(), query.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, q: prototype_head(s, labels, q, 3, distance), inputs)


def test_a_query_on_its_centre_has_a_finite_gradient():
    support = torch.eye(3).requires_grad_()
    log_probabilities = prototype_head(support, torch.arange(3), torch.eye(3), 3)
    log_probabilities.diagonal().sum().backward()
    assert support.grad is not None
    assert support.grad.isfinite().all()
