"""Several adapters inverted in one batch: the surrogates that each would get alone."""

from dataclasses import replace

import pytest
import torch
from timm.layers import GluMlp

from lorarecycle import Backbone, BatchNormPrior, InversionConfig, LoRAStack, inversion, recycle
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
    return [third, second.with_head(replace(second.head, pool="mean")), first]


@pytest.fixture
def prior():
    torch.manual_seed(0)
    return BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))


@pytest.mark.parametrize("prune", [None, {1: 0.5}], ids=str)
def test_losses_and_gradients_are_those_of_each_alone(tiny_backbone, adapters, prior, prune):
    rows = (2, 5, 4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(rows), 3, 32, 32, generator=generator).requires_grad_()
    labels = torch.arange(sum(rows)) % 2
    heads = [adapter.head for adapter in adapters]
    teachers = Teachers.of(tiny_backbone, heads, rows, LoRAStack(adapters))
    together = inversion_losses(teachers, images, labels, prune, prior, 0.1, 32)
    (gradient,) = torch.autograd.grad(together.sum(), images)
    assert together.shape == (3,)
    for k, own in enumerate(images.detach().split(rows)):
        own = own.requires_grad_()
        alone = Teachers.of(tiny_backbone.merge(adapters[k]), [heads[k]], [rows[k]])
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


def test_bfloat16(tiny_backbone, adapters, prior, monkeypatch):
    dtypes, original = [], inversion.inversion_losses

    def spy(teachers, *rest):
        dtypes.append((teachers.backbone.dtype, next(teachers.stack.buffers()).dtype))
        return original(teachers, *rest)

    monkeypatch.setattr(inversion, "inversion_losses", spy)
    config = InversionConfig(**SETTINGS)
    found = invert_together(tiny_backbone, adapters, config, prior=prior, dtype=torch.bfloat16, quiet=True)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    monkeypatch.undo()
    alone = invert(tiny_backbone, adapters[1], config, prior=prior, dtype=torch.bfloat16, quiet=True)
    assert (found[1].images.int() - alone.images.int()).abs().float().mean() < 5
    assert tiny_backbone.dtype == torch.float32


def test_a_loss_that_is_never_finite_names_its_adapter(tiny_backbone, adapters, monkeypatch):
    def losses(teachers, images, *rest):
        return images.sum() * 0 + torch.tensor([1.0, 1.0, torch.nan])  # the one of the fewest classes is last

    monkeypatch.setattr(inversion, "inversion_losses", losses)
    config = InversionConfig(**SETTINGS | {"batch_size": 20})
    with pytest.raises(FloatingPointError, match="the loss of adapter adapter-2 was never finite in 4 steps"):
        invert_together(tiny_backbone, adapters, config, quiet=True)


def test_each_adapter_has_its_own_best_step_and_end(tiny_backbone, make_adapter, monkeypatch):
    """The first settles at once and must not take later images, however good; the second falls to the end."""
    adapters = [make_adapter(tiny_backbone, seed=seed) for seed in range(2)]
    seen = []

    def losses(teachers, images, *rest):
        seen.append([part.detach().clone() for part in images.split(teachers.rows)])
        first = 5.0 if len(seen) < 9 else -5.0
        pull = images.sum()  # its gradient moves the images, its value is left out
        return pull - pull.detach() + torch.tensor([first, 100.0 - 10 * len(seen)])

    monkeypatch.setattr(inversion, "inversion_losses", losses)
    settings = SETTINGS | {"steps": 12, "batch_size": 9, "prune": {}, "patience": 4, "roll": 0.0, "flip": False}
    found = invert_together(tiny_backbone, adapters, InversionConfig(**settings), quiet=True)
    assert len(seen) == 12
    assert not torch.equal(seen[0][0], seen[11][0])
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


def test_gated_mlps_are_refused_before_work_starts(build_vit, make_adapter, tmp_path):
    """Such adapters can be merged, so one by one is the way."""
    gated = Backbone(build_vit(mlp_layer=GluMlp), name="tiny")
    pool = [make_adapter(gated, seed=seed, sites=("attn.q", "mlp.fc2")) for seed in range(2)]
    message = r"must leave gated MLPs alone, got 'adapter-0' with blocks\.0\.mlp\.fc2; invert them one by one"
    with pytest.raises(ValueError, match=message):
        invert_together(gated, pool, InversionConfig(**SETTINGS))
    settings = {"n_way": 3, "n_query": 2, "steps": 1}
    inversion_settings = SETTINGS | {"adapters_per_batch": 2}
    with pytest.raises(ValueError, match=message):
        recycle(pool, base=gated, work_dir=tmp_path / "never", inversion=inversion_settings, meta=settings)
    assert not (tmp_path / "never").exists()
    assert len(invert_together(gated, pool[:1], InversionConfig(**SETTINGS), quiet=True)) == 1
