"""Several adapters inverted in one batch: the surrogates that each would get alone."""

from dataclasses import replace

import pytest
import torch

from lorarecycle import BatchNormPrior, InversionConfig, LoRAStack, inversion
from lorarecycle.inversion import invert, invert_together
from lorarecycle.teachers import Teachers, inversion_losses

SETTINGS = {
    "prior": None,
    "init": "noise",
    "images_per_class": 3,
    "batch_size": 6,
    "steps": 4,
    "prune": {1: 0.5},
}


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    """Of different ranks, sites and numbers of classes; the second reads another feature."""
    first = make_adapter(tiny_backbone, seed=0)
    second = make_adapter(tiny_backbone, seed=1, r=3, n_classes=4, sites=("attn.q", "attn.proj", "mlp.fc1"))
    third = make_adapter(tiny_backbone, seed=2, n_classes=2, sites=("attn.v", "mlp.fc2"))
    return [first, second.with_head(replace(second.head, pool="mean")), third]


@pytest.fixture
def prior():
    torch.manual_seed(0)
    return BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))


@pytest.mark.parametrize("prune", [None, {1: 0.5}], ids=str)
def test_losses_and_gradients_are_those_of_each_alone(tiny_backbone, adapters, prior, prune):
    rows = (4, 5, 2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(rows), 3, 32, 32, generator=generator).requires_grad_()
    labels = torch.arange(sum(rows)) % 2
    ids = torch.arange(3).repeat_interleave(torch.tensor(rows))
    heads = tuple(adapter.head for adapter in adapters)
    teachers = Teachers(tiny_backbone, heads, rows, LoRAStack(adapters), ids)
    together = inversion_losses(teachers, images, labels, prune, prior, 0.1, 32)
    (gradient,) = torch.autograd.grad(together.sum(), images)
    assert together.shape == (3,)
    for k, own in enumerate(images.detach().split(rows)):
        own = own.requires_grad_()
        alone = Teachers(tiny_backbone.merge(adapters[k]), heads[k : k + 1], rows[k : k + 1])
        (loss,) = inversion_losses(alone, own, labels.split(rows)[k], prune, prior, 0.1, 32)
        torch.testing.assert_close(together[k], loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient.split(rows)[k], torch.autograd.grad(loss, own)[0], rtol=1e-3, atol=1e-6)


def test_surrogates_are_those_of_each_alone(tiny_backbone, adapters, prior):
    config = InversionConfig(**SETTINGS)
    together = invert_together(tiny_backbone, adapters, config, prior=prior, seed=3, quiet=True)
    for adapter, surrogate in zip(adapters, together, strict=True):
        alone = invert(tiny_backbone, adapter, config, prior=prior, seed=3, quiet=True)
        assert torch.equal(surrogate.labels, alone.labels)
        assert surrogate.class_names == alone.class_names
        assert surrogate.adapter_digest == adapter.digest()
        assert surrogate.kept.shape == alone.kept.shape
        difference = (surrogate.images.int() - alone.images.int()).abs().float()
        assert difference.mean() < 0.5, "of 255; Adam turns rounding errors of small gradients into whole steps"
        torch.testing.assert_close(surrogate.teacher_logits, alone.teacher_logits, rtol=0.05, atol=0.05)


def test_each_adapter_has_its_own_best_step_and_end(tiny_backbone, make_adapter, monkeypatch):
    """The first settles at once and must not take later images, however good; the second falls to the end."""
    adapters = [make_adapter(tiny_backbone, seed=seed) for seed in range(2)]
    seen = []

    def losses(teachers, images, *rest):
        seen.append([part.detach().clone() for part in images.split(teachers.rows)])
        first = 5.0 if len(seen) < 9 else -5.0
        return images.sum() * 0 + torch.tensor([first, 100.0 - 10 * len(seen)])

    monkeypatch.setattr(inversion, "inversion_losses", losses)
    settings = SETTINGS | {"steps": 12, "batch_size": 9, "prune": {}, "patience": 4, "roll": 0.0, "flip": False}
    found = invert_together(tiny_backbone, adapters, InversionConfig(**settings), quiet=True)
    assert len(seen) == 12
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny_backbone.mean, tiny_backbone.std))
    for surrogate, best in zip(found, (seen[0][0], seen[11][1]), strict=True):
        pixels = ((best * std + mean) * 255).clamp(0, 255).round().to(torch.uint8)
        assert torch.equal(surrogate.images, pixels)


def test_bad_input(tiny_backbone, make_adapter):
    with pytest.raises(ValueError, match="`adapters` must hold at least one adapter, got none"):
        invert_together(tiny_backbone, [], InversionConfig(**SETTINGS))
    pool = [make_adapter(tiny_backbone), make_adapter(tiny_backbone, head=False, name="bare")]
    with pytest.raises(ValueError, match="'bare' must have a classification head"):
        invert_together(tiny_backbone, pool, InversionConfig(**SETTINGS))
    with pytest.raises(ValueError, match="`adapters_per_batch` must be at least 1, got 0"):
        InversionConfig(**SETTINGS, adapters_per_batch=0)
