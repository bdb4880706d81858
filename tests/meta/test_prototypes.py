"""Class centres and distance logits against their definitions; gradients stay finite."""

import pytest
import torch

from lorarecycle.meta import prototypes
from lorarecycle.meta.prototypes import class_centres, distance_logits, nearest_centres


def test_class_centres_are_means() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1, 2, 2, 0, 1])
    expected = torch.stack([features[labels == c].mean(dim=0) for c in range(3)])
    torch.testing.assert_close(class_centres(features, labels, 3), expected)


def test_leading_axes() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 6, 5, generator=generator)
    labels = torch.stack([torch.randperm(6, generator=generator) % 3 for _ in range(8)]).view(2, 4, 6)
    centres = class_centres(features, labels, 3)
    logits = distance_logits(features, centres)
    assert logits.shape == (2, 4, 6, 3)
    torch.testing.assert_close(centres[1, 2], class_centres(features[1, 2], labels[1, 2], 3))
    torch.testing.assert_close(logits[1, 2], distance_logits(features[1, 2], centres[1, 2]))


def test_distances() -> None:
    generator = torch.Generator().manual_seed(2)
    features, centres = torch.randn(40, 5, generator=generator), torch.randn(30, 5, generator=generator)
    difference = features[:, None] - centres[None]
    torch.testing.assert_close(distance_logits(features, centres), -difference.norm(dim=-1))
    torch.testing.assert_close(distance_logits(features, centres, "sqeuclidean"), -difference.square().sum(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(features[:, None], centres[None], dim=-1)
    torch.testing.assert_close(distance_logits(features, centres, "cosine"), cosine - 1)
    a, b = (x - 0.8 * centres.mean(0) for x in (features, centres))
    centred = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(distance_logits(features, centres, "centred_cosine"), 12 * (centred - 1))


def test_neither_lengths_nor_what_all_share_count() -> None:
    generator = torch.Generator().manual_seed(4)
    centres = torch.randn(5, 64, generator=generator)
    truth = torch.arange(5).repeat_interleave(40)
    features = centres[truth] + 1.4 * torch.randn(200, 64, generator=generator)
    shared = 4 * torch.randn(64, generator=generator)
    lengths = torch.tensor([0.2, 0.6, 1.0, 1.4, 1.8])[:, None]

    def accuracy(distance) -> float:
        found = nearest_centres(features + shared, lengths * centres + shared, distance)
        return (found == truth).float().mean().item()

    assert accuracy("centred_cosine") > 0.99 > max(accuracy("euclidean"), accuracy("cosine"))
    one = distance_logits(features, centres[:1], "centred_cosine")  # a single class: nothing to tell apart
    assert one.isfinite().all()


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "centred_cosine"])
def test_gradient_at_distance_zero_is_finite(distance: str) -> None:
    features = torch.ones(3, 4, requires_grad=True)
    centres = torch.ones(2, 4, requires_grad=True)
    logits = distance_logits(features, centres, distance)
    torch.testing.assert_close(logits, torch.zeros(3, 2))
    logits.sum().backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(centres.grad).all()


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "centred_cosine"])
def test_gradients(distance: str) -> None:
    generator = torch.Generator().manual_seed(3)
    support, query = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 1, 1, 0])

    def logits(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        return distance_logits(query, class_centres(support, labels, 2), distance)

    assert torch.autograd.gradcheck(logits, (support.requires_grad_(), query.requires_grad_()))


def test_small_distances_of_long_features_are_exact() -> None:
    centres = torch.full((30, 64), 1000.0)
    features = centres + 0.01
    torch.testing.assert_close(distance_logits(features, centres), torch.full((30, 30), -0.08), rtol=0.05, atol=0)


def test_half_precision_is_computed_in_float32() -> None:
    features = torch.randn(4, 3).half()
    assert class_centres(features, torch.tensor([0, 1, 0, 1]), 2).dtype == torch.float32
    assert distance_logits(features, features).dtype == torch.float32


def test_errors() -> None:
    features = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="`labels` must have one value per feature"):
        class_centres(features, torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="every class 0 to 2"):
        class_centres(features, torch.tensor([0, 1, 0, 1]), 3)
    with pytest.raises(ValueError, match="every class 0 to 0"):
        class_centres(features, torch.tensor([0, 1, 0, 1]), 1)
    with pytest.raises(ValueError, match="same width"):
        distance_logits(features, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="`distance` must be 'euclidean'"):
        distance_logits(features, features, "manhattan")


def test_many_classes_give_the_same_centres(monkeypatch):
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 5, generator=g), torch.arange(90) % 30
    whole = class_centres(features, labels, 30)
    monkeypatch.setattr(prototypes, "DENSE", 100)
    torch.testing.assert_close(class_centres(features, labels, 30), whole)
    for bad, message in ((labels.clamp(max=28), "1 without features"), (labels + 1, "labels out of range")):
        with pytest.raises(ValueError, match=f"must hold every class 0 to 29 and no other, got {message}"):
            class_centres(features, bad, 30)


def test_ten_thousand_classes_and_a_hundred_thousand_features():
    g = torch.Generator().manual_seed(0)
    labels = torch.randperm(100_000, generator=g) % 10_000
    features = torch.randn(100_000, 16, generator=g) * 0.1 + labels[:, None] % 7
    centres = class_centres(features, labels, 10_000)  # one matrix of members would take 4 GB
    torch.testing.assert_close(centres[1234], features[labels == 1234].mean(0))


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "centred_cosine"])
def test_the_nearest_of_many_is_the_nearest(distance):
    g = torch.Generator().manual_seed(0)
    centres = 100 + torch.randn(3000, 24, generator=g)  # far from the origin, where a bare product loses digits
    features = centres[torch.randint(3000, (200,), generator=g)] + torch.randn(200, 24, generator=g)
    expected = distance_logits(features.double(), centres.double(), distance).argmax(dim=-1)
    assert torch.equal(nearest_centres(features.double(), centres.double(), distance), expected)
    if "cosine" not in distance:
        agree = nearest_centres(features, centres, distance) == expected
        assert agree.float().mean() > 0.99
    few = centres[:5]
    assert torch.equal(nearest_centres(features, few, distance), distance_logits(features, few, distance).argmax(-1))
