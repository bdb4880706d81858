"""The plan: what a run needs, what it costs, and which settings and arguments can move its result."""

from dataclasses import fields, replace

import pytest
import torch

from lorarecycle import Backbone, InversionConfig, MetaConfig, Plan, RecycleConfig, make_plan, recycle
from lorarecycle.plan import unused_settings
from lorarecycle.stages import Needs

WEIGHTS = RecycleConfig(InversionConfig(pictures=10), MetaConfig(steps=5, n_way=2, n_query=2))
PAPER = RecycleConfig(
    InversionConfig(images_per_class=4, batch_size=6, steps=8, init="noise", prior="given", prune={1: 0.5}),
    MetaConfig(steps=5, n_way=2, n_query=2, guide_weight=0.0, init="random", r=2, lora_alpha=2.0, lr=1e-2),
)
MIXED = RecycleConfig(
    replace(PAPER.inversion, init="painted", steps=0, prune={}), replace(PAPER.meta, guide_weight=0.5)
)
ALONE = replace(WEIGHTS, meta=MetaConfig(steps=0))

OTHER = {
    "images_per_class": 5,
    "pictures": 11,
    "batch_size": 5,
    "steps": 6,
    "patience": 1,
    "lr": 0.03,
    "betas": (0.8, 0.9),
    "image_size": 40,
    "latent_size": 16,
    "candidates": 3,
    "schedule": "cosine",
    "prior": None,
    "prior_weight": 3.0,
    "prior_relative": True,
    "parametrization": "fourier",
    "warm_up": 0.5,
    "prior_size": 24,
    "prune": {2: 0.25},
    "prune_from": 0.9,
    "roll": 0.4,
    "flip": False,
    "episodes_per_step": 2,
    "n_way": 3,
    "n_shot": 2,
    "n_query": 1,
    "interpolation": 0.0,
    "distance": "cosine",
    "guide_weight": 0.25,
    "guide_size": 48,
    "guide_shift": False,
    "warm_start_gain": 1.7,
    "r": 3,
    "lora_alpha": 5.0,
    "sites": ("q",),
    "layers": (1,),
    "lr_min": 1e-3,
    "cycle": 4,
    "sparsity": 0.75,
    "resolutions": (8,),
}
"""Another value for each setting; `init` apart."""


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=i, size=0.1) for i in range(3)]


@pytest.fixture
def prior():
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.nn.init.normal_(network[0].weight, generator=generator)
    return network


def variants(config: RecycleConfig):
    """(name of a setting, the settings with another value there)."""
    for room in ("inversion", "meta"):
        own = getattr(config, room)
        for f in fields(own):
            if f.name == "init":
                value = {"noise": "painted", "painted": "noise", "random": "adapters", "adapters": "random"}[own.init]
                if value == "noise" and own.steps == 0:
                    continue  # refused
            else:
                value = OTHER[f.name]
            yield f"{room}.{f.name}", replace(config, **{room: replace(own, **{f.name: value})})


@pytest.mark.slow
@pytest.mark.parametrize("config", [WEIGHTS, PAPER, MIXED, ALONE], ids=["weights", "paper", "mixed", "alone"])
def test_every_setting_moves_the_result_or_is_listed_as_unused(tiny_backbone, adapters, prior, config, monkeypatch):
    monkeypatch.setattr("lorarecycle.inversion.optimise.READ_EVERY", 1)  # else patience needs 50 steps to show

    def run(config: RecycleConfig) -> torch.Tensor:
        given = None if config.inversion.prior is None else prior
        found = recycle(adapters, base=tiny_backbone, config=config, prior=given, quiet=True)
        return torch.cat([found.delta(site).flatten() for site in found.sites])

    baseline, unused, wrong = run(config), unused_settings(config), []
    for name, changed in variants(config):
        result = run(changed)
        moved = result.shape != baseline.shape or not torch.equal(result, baseline)
        if moved == (name in unused):
            wrong.append(f"{name}: {'moves' if moved else 'does not move'} the result, unused: {name in unused}")
    moved = not torch.equal(run(replace(config, seed=1)), baseline)
    assert moved != ("seed" in unused)
    assert not wrong, wrong


@pytest.mark.medium
def test_arguments_of_recycle(tiny_backbone, adapters, prior, build_vit, tmp_path):
    """Each argument in turn: whether the result moves."""
    other = Backbone(build_vit(seed=1), name="tiny")
    changes = {
        "base": (other, True),
        "work_dir": (tmp_path / "work", False),
        "preset": ("paper", True),
        "config": (replace(PAPER, seed=7), True),
        "inversion": ({"steps": 5}, True),
        "meta": ({"steps": 5}, True),
        "seed": (3, True),
        "strict": (True, False),
        "prior": (None, True),
        "device": ("cpu", False),
        "dtype": ("bfloat16", True),
        "images": ("all", True),  # the targets of the guide have the mean length of all images that are made
        "name": ("other", False),
        "compile": (False, False),
        "quiet": (True, False),
    }
    settings = {"inversion": {"images_per_class": 4, "steps": 3}, "meta": {"steps": 3, "n_way": 2, "n_query": 2}}
    settings = {**settings, "base": tiny_backbone, "prior": prior, "dtype": "float32", "quiet": True}
    baseline = recycle(adapters, **settings).weights_digest()
    moved = {}
    for name, (value, _) in changes.items():
        changed = {**settings, name: value}
        if name == "prior":
            changed["inversion"] = {**settings["inversion"], "prior": None}
        if name == "config":
            changed = {"config": value, "base": tiny_backbone, "prior": prior, "dtype": "float32", "quiet": True}
        if name == "preset":
            changed["inversion"] = {**settings["inversion"], "prior": None}
        moved[name] = recycle(adapters, **changed).weights_digest() != baseline
    assert moved == {name: expected for name, (_, expected) in changes.items()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RecycleConfig.weights(), {"images", "pictures", "guide", "warm_start"}),
        (RecycleConfig.paper(), {"images", "heads", "labels", "teacher_logits", "prior"}),
        (RecycleConfig(meta=MetaConfig(steps=0)), {"warm_start"}),
        (RecycleConfig(meta=MetaConfig(sparsity=0.5)), {"images", "pictures", "guide", "warm_start", "scores"}),
        (RecycleConfig(InversionConfig(candidates=4)), {"images", "heads", "guide", "warm_start"}),
        (
            RecycleConfig(meta=MetaConfig(guide_weight=0.5, interpolation=1.0)),
            {"images", "heads", "labels", "guide", "warm_start"},
        ),
    ],
)
def test_needs(config, expected):
    needs = Needs.of(config)
    assert {f.name for f in fields(needs) if getattr(needs, f.name)} == expected


def test_the_plan_is_a_short_table(tiny_backbone, adapters):
    plan = make_plan(adapters, base=tiny_backbone, inversion={"pictures": 60}, meta={"distance": "cosine"})
    assert isinstance(plan, Plan)
    assert [stage.name for stage in plan.stages] == ["warm start", "paint pictures", "guide features", "meta-training"]
    text = plan.describe()
    assert "60 pictures, 32 px" in text
    assert "60 images, 32 px, 4 views" in text
    assert "100 steps of 60 images" in text
    assert "needs: images, pictures, guide, warm start" in text
    assert "unused, as only the guide counts: meta.interpolation, meta.distance" in text
    assert "set, but without effect under the other settings: meta.distance='cosine'" in text
    assert plan.bytes >= 60 * 3 * 32 * 32
    assert plan.seconds > 0
    assert max(map(len, text.splitlines())) < 130


def test_sides_and_views_are_those_that_occur(tiny_backbone, adapters):
    def described(pictures=60, **meta):
        inversion = {"pictures": pictures, "image_size": 96}
        return make_plan(adapters, base=tiny_backbone, inversion=inversion, meta={"n_query": 20, **meta}).describe()

    assert "20 pictures, 96 px" in described(20)
    assert "60 pictures, 32/64/96 px" in described()
    assert "60 images, 96 px, 4 views" in described(sparsity=0.0), "nothing is left out"
    assert "60 images, 96 px, 2 views" in described(sparsity=0.5)
    assert "unused, as patches are left out: meta.guide_shift" in described(sparsity=0.5)
    assert "meta.guide_shift" not in described(sparsity=0.0)
    assert "views" not in described(flip=False, guide_shift=False)


def test_a_plan_checks_what_a_run_checks(tiny_backbone, adapters):
    with pytest.raises(ValueError, match="must have a classification head"):
        make_plan([a.with_head(None) for a in adapters], base=tiny_backbone, preset="paper")
    with pytest.raises(ValueError, match="`n_way` must be at most the classes of every adapter, got n_way=5 and 3"):
        make_plan(adapters, base=tiny_backbone, preset="paper", inversion={"prior": None})


def test_stages_of_the_paper(tiny_backbone, adapters, prior):
    plan = make_plan(adapters, base=tiny_backbone, preset="paper", prior=prior, meta={"n_way": 3})
    assert [stage.name for stage in plan.stages] == ["invert adapters", "meta-training"]
    assert "180 images of 3 adapters, 32 px" in plan.describe()
    longer = make_plan(
        adapters, base=tiny_backbone, preset="paper", prior=prior, meta={"n_way": 3}, inversion={"steps": 8000}
    )
    assert longer.stages[0].seconds > 2 * plan.stages[0].seconds, "time follows the steps, but for noise"


@pytest.mark.medium
def test_the_estimate_is_of_the_right_order(tiny_backbone, adapters):
    import time

    settings = {"base": tiny_backbone, "inversion": {"pictures": 300}, "meta": {"steps": 20}}
    start = time.perf_counter()
    recycle(adapters, quiet=True, **settings)
    taken = time.perf_counter() - start
    assert taken / 30 < make_plan(adapters, **settings).seconds < 30 * taken
