"""LoRA Inversion: images that the adapter recognises, the step with the lowest loss, masks, seeds."""

import math
from dataclasses import replace

import pytest
import torch

from lorarecycle import BatchNormPrior, InversionConfig, invert
from lorarecycle.data.images import normalize
from lorarecycle.inversion import optimise as module

FAST = {
    "prior": None,
    "init": "noise",
    "images_per_class": 3,
    "batch_size": 6,
    "steps": 30,
    "roll": 0.0,
    "flip": False,
}


def make_prior() -> BatchNormPrior:
    torch.manual_seed(0)
    return BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))


def test_the_teacher_recognises_its_surrogates(tiny_backbone, make_adapter):
    adapter = make_adapter(tiny_backbone)
    surrogate = invert(tiny_backbone, adapter, config=FAST, quiet=True)
    assert surrogate.images.shape == (9, 3, 32, 32)
    assert surrogate.labels.tolist() == [0, 1, 2] * 3
    assert surrogate.class_names == adapter.head.class_names
    assert surrogate.adapter_digest == adapter.weights_digest()
    assert (surrogate.teacher_logits.argmax(1) == surrogate.labels).float().mean() == 1.0
    teacher = tiny_backbone.merge(adapter)
    x = normalize(surrogate.images, teacher.mean, teacher.std)
    torch.testing.assert_close(surrogate.teacher_logits, adapter.head(teacher(x)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(surrogate.scores, teacher.encode(x, scores=True).scores)
    assert surrogate.kept is None


def test_the_images_returned_are_those_of_the_lowest_loss(tiny_backbone, make_adapter, monkeypatch):
    adapter = make_adapter(tiny_backbone)
    seen = []
    original = module.inversion_loss

    def spoilt_at_the_end(teacher, head, images, *rest):
        loss = original(teacher, head, images, *rest)
        seen.append((loss.item(), images.detach().clone()))
        return loss + (100 if len(seen) > 5 else 0)

    monkeypatch.setattr(module, "inversion_loss", spoilt_at_the_end)
    surrogate = invert(tiny_backbone, adapter, config=FAST | {"steps": 9, "batch_size": 9}, quiet=True)
    best = min(seen[:5], key=lambda pair: pair[0])[1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny_backbone.mean, tiny_backbone.std))
    pixels = ((best * std + mean) * 255).clamp(0, 255).round().to(torch.uint8)
    assert torch.equal(surrogate.images, pixels)


def test_a_settled_batch_stops(tiny_backbone, make_adapter, monkeypatch):
    steps = []

    def falls_for_ten_steps(teacher, head, images, *rest):
        steps.append(len(images))
        return images.sum() * 0 + max(20 - len(steps), 10)

    monkeypatch.setattr(module, "inversion_loss", falls_for_ten_steps)
    settings = FAST | {"steps": 100, "batch_size": 9}
    for patience, prune, expected in (
        (8, {}, 50),
        (8, {1: 0.5}, 50),
        (45, {}, 100),
        (45, {1: 0.5}, 100),
        (None, {}, 100),
    ):
        steps.clear()
        config = InversionConfig(**settings, patience=patience, prune=prune)
        invert(tiny_backbone, make_adapter(tiny_backbone), config=config, quiet=True)
        assert len(steps) == expected


def test_a_loss_that_is_never_finite_is_an_error(tiny_backbone, make_adapter, monkeypatch):
    monkeypatch.setattr(module, "inversion_loss", lambda *args: args[2].sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="never finite in 30 steps; lower `lr`"):
        invert(tiny_backbone, make_adapter(tiny_backbone), config=FAST, quiet=True)


@pytest.mark.medium
def test_pixels_stay_in_range_and_the_prior_pulls(tiny_backbone, make_adapter):
    adapter, prior = make_adapter(tiny_backbone), make_prior()
    values = {}
    for weight in (0.0, 10.0):
        config = InversionConfig(**FAST | {"prior_weight": weight})
        images = invert(tiny_backbone, adapter, config=config, prior=prior, quiet=True).images
        x = normalize(images, tiny_backbone.mean, tiny_backbone.std)
        values[weight] = float(prior(x, tiny_backbone.mean, tiny_backbone.std))
    assert values[10.0] < 0.7 * values[0.0]


@pytest.mark.parametrize("prune", [{1: 0.5}, {0: 0.3, 2: 0.25}])
def test_pruned_inversion_keeps_the_tokens_of_the_finished_images(tiny_backbone, make_adapter, prune):
    adapter = make_adapter(tiny_backbone)
    surrogate = invert(tiny_backbone, adapter, config=FAST | {"steps": 8, "prune": prune}, quiet=True)
    n = 16
    for layer in sorted(prune):
        n -= math.floor(n * prune[layer])
    assert surrogate.kept.shape == (9, n)
    assert (surrogate.kept.diff(dim=1) > 0).all()
    teacher = tiny_backbone.merge(adapter)
    x = normalize(surrogate.images, teacher.mean, teacher.std)
    assert torch.equal(surrogate.kept, teacher.encode(x, prune=prune).kept)
    assert surrogate.scores.shape == (9, 16)


def test_pruning_starts_after_its_share_of_the_steps(tiny_backbone, make_adapter, monkeypatch):
    calls = []
    original = module.inversion_loss

    def spy(teacher, head, images, labels, prune, *rest):
        calls.append(prune)
        return original(teacher, head, images, labels, prune, *rest)

    monkeypatch.setattr(module, "inversion_loss", spy)
    config = InversionConfig(**FAST | {"steps": 8, "batch_size": 9, "prune": {1: 0.5}})
    invert(tiny_backbone, make_adapter(tiny_backbone), config=config, quiet=True)
    assert calls == [None] * 2 + [{1: 0.5}] * 6


def test_the_seed_decides(tiny_backbone, make_adapter):
    adapter, config = (
        make_adapter(tiny_backbone),
        InversionConfig(**FAST | {"steps": 3, "roll": 0.1, "flip": True}),
    )
    images = [invert(tiny_backbone, adapter, config=config, seed=s, quiet=True).images for s in (0, 0, 1)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_another_image_size(tiny_backbone, make_adapter):
    config = InversionConfig(**FAST | {"steps": 2, "image_size": 48})
    surrogate = invert(tiny_backbone, make_adapter(tiny_backbone), config=config, quiet=True)
    assert surrogate.images.shape[-1] == 48
    assert surrogate.scores.shape[1] == 36


def test_only_what_is_asked_for_is_computed(tiny_backbone, make_adapter, monkeypatch):
    passes = []
    original = type(tiny_backbone).encode
    monkeypatch.setattr(
        type(tiny_backbone), "encode", lambda self, *a, **k: passes.append(k) or original(self, *a, **k)
    )
    config = {"images_per_class": 3, "steps": 0}
    bare = invert(tiny_backbone, make_adapter(tiny_backbone), config=config, teacher_logits=False, scores=False)
    assert not passes
    assert bare.teacher_logits is bare.scores is bare.kept is None
    whole = invert(tiny_backbone, make_adapter(tiny_backbone), config=config)
    assert len(passes) == 1, "logits and scores come from one pass"
    assert torch.equal(whole.images, bare.images)


def test_names_play_no_part(tiny_backbone, make_adapter):
    adapter = make_adapter(tiny_backbone)
    renamed = replace(adapter, name="other", head=replace(adapter.head, class_names=("x", "y", "z")))
    images = [invert(tiny_backbone, a, config={**FAST, "steps": 3}, quiet=True).images for a in (adapter, renamed)]
    assert torch.equal(*images)


def test_bad_input(tiny_backbone, make_adapter, build_vit):
    from lorarecycle import Backbone

    adapter = make_adapter(tiny_backbone)
    with pytest.raises(ValueError, match=r"must have a classification head .*Adapter\.load\(path, head="):
        invert(tiny_backbone, adapter.with_head(None), config=FAST)
    with pytest.raises(ValueError, match="`prune` must name layers 0 to 2, got 3"):
        invert(tiny_backbone, adapter, config=FAST | {"prune": {3: 0.5}})
    with pytest.raises(ValueError, match="`image_size` must be a positive multiple of the patch size 8"):
        invert(tiny_backbone, adapter, config=FAST | {"image_size": 30})
    wide = Backbone(build_vit(embed_dim=48), name="wide")
    with pytest.raises(ValueError, match="must fit backbone 'wide': at blocks.0.attn.q"):
        invert(wide, adapter, config=FAST)
    shallow = Backbone(build_vit(depth=2), name="shallow")
    with pytest.raises(ValueError, match="must have sites of backbone 'shallow' only: no site 'blocks.2.attn.q'"):
        invert(shallow, adapter, config=FAST)
