"""Only images that meta-training draws are made: which they are, and that making no others changes nothing."""

from dataclasses import replace

import pytest
import torch

from lorarecycle import InversionConfig, MetaConfig, RecycleConfig, Surrogate, invert, make_plan, recycle
from lorarecycle.config import RecycleConfig as Config
from lorarecycle.inversion.invert import Inverter
from lorarecycle.inversion.pictures import painted_surrogate
from lorarecycle.meta.drawn import find_drawn
from lorarecycle.meta.episodes import EpisodeSampler, Layout

INVERSION = InversionConfig(images_per_class=6, batch_size=4, steps=5, init="noise", prior=None, prune={1: 0.5})
EPISODES = MetaConfig(steps=3, n_way=2, n_query=2, guide_weight=0.0, init="random")
PAPER = RecycleConfig(INVERSION, EPISODES)


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=i) for i in range(12)]


def layouts(n: int = 5, classes: int = 3) -> list[Layout]:
    return [Layout.planned(f"a{i}", tuple(map(str, range(classes))), 6, teacher_logits=True) for i in range(n)]


@pytest.mark.parametrize("guide_weight", [0.0, 1.0])
def test_what_is_drawn_is_what_episodes_draw(guide_weight):
    config = replace(EPISODES, guide_weight=guide_weight)
    drawn, whole = (find_drawn(layouts(), config, 3, everything=every) for every in (False, True))
    used = torch.cat([drawn.episodes(step).images for step in range(config.steps)]).unique()
    assert torch.equal(drawn.rows, used)
    assert len(drawn.rows) < drawn.total == 90 == len(whole.rows)
    own = [drawn.of(i) + 18 * i for i in range(5)]
    assert torch.equal(torch.cat(own), drawn.rows)
    assert drawn.adapters == [i for i in range(5) if len(own[i])]
    for step in range(config.steps):
        assert torch.equal(drawn.rows[drawn(step).images], whole(step).images)


def test_a_sampler_needs_no_images():
    made = [
        Surrogate(torch.zeros(18, 3, 8, 8, dtype=torch.uint8), one.labels, torch.zeros(18, 3), one.class_names, 8)
        for one in layouts()
    ]
    for step in range(5):
        known, planned = (EpisodeSampler(each, EPISODES, seed=1)(step) for each in (made, layouts()))
        assert torch.equal(known.images, planned.images)


def test_some_images_of_an_adapter_are_those_of_a_full_inversion(tiny_backbone, make_adapter):
    adapter = make_adapter(tiny_backbone)
    full = invert(tiny_backbone, adapter, config=INVERSION, quiet=True)
    rows = torch.tensor([5, 6, 16])  # of batches 1 and 4 (the last, of two images), not of 0, 2, 3
    some = Inverter(tiny_backbone, config=INVERSION)(adapter, rows=rows, quiet=True)
    assert torch.equal(some.rows, rows)
    for name in ("images", "labels", "teacher_logits", "scores", "kept", "curves"):
        assert torch.equal(getattr(some, name), getattr(full, name)[rows]), name
    assert full.rows is None


def test_rows_are_kept_in_files(tiny_backbone, make_adapter, tmp_path):
    made = Inverter(tiny_backbone, config=INVERSION)(make_adapter(tiny_backbone), rows=torch.tensor([3, 9]), quiet=True)
    assert torch.equal(Surrogate.load(made.save(tmp_path / "s.safetensors")).rows, torch.tensor([3, 9]))
    assert torch.equal(made.select(torch.tensor([1])).rows, torch.tensor([9]))


def test_some_pictures_are_those_of_the_whole_set(tiny_backbone):
    config = InversionConfig(pictures=60, image_size=80)  # painted at 80, 32 and 64 pixels
    full = painted_surrogate(tiny_backbone, config, seed=0, quiet=True)
    rows = torch.tensor([1, 30, 59])
    assert torch.equal(
        painted_surrogate(tiny_backbone, config, seed=0, rows=rows, quiet=True).images, full.images[rows]
    )


@pytest.mark.medium
def test_only_drawn_images_are_made_and_the_result_is_the_same(tiny_backbone, adapters, tmp_path, monkeypatch):
    inverted = []
    original = Inverter.__call__
    monkeypatch.setattr(
        Inverter,
        "__call__",
        lambda self, adapter, **more: inverted.append(adapter.name) or original(self, adapter, **more),
    )
    some = recycle(adapters, base=tiny_backbone, config=PAPER, work_dir=tmp_path / "some", quiet=True)
    few = len(inverted)
    every = recycle(adapters, base=tiny_backbone, config=PAPER, work_dir=tmp_path / "all", images="all", quiet=True)
    assert few <= 3 * 2, "three episodes of two classes"
    assert len(inverted) - few == 12
    assert some.digest() == every.digest()
    files = sorted((tmp_path / "some" / "surrogates").iterdir())
    assert len(files) == few
    assert sum(len(Surrogate.load(file).images) for file in files) <= 3 * 6
    with pytest.raises(ValueError, match="differs in images"):
        recycle(adapters, base=tiny_backbone, config=PAPER, work_dir=tmp_path / "some", images="all", quiet=True)


@pytest.mark.medium
def test_targets_of_a_guide_need_the_drawn_images_only(tiny_backbone, adapters):
    config = replace(PAPER, meta=replace(EPISODES, guide_weight=0.5, steps=8))
    some, every = (recycle(adapters, base=tiny_backbone, config=config, images=i, quiet=True) for i in ("drawn", "all"))
    for site in some.sites:  # the targets' mean length is that of the images that are made
        torch.testing.assert_close(some.delta(site), every.delta(site), rtol=0.3, atol=2e-3)


def test_the_plan_says_how_much_is_made(tiny_backbone, adapters, monkeypatch):
    monkeypatch.setattr("lorarecycle.costs.flops_per_second", lambda *_: 1e9)  # which a busy machine measures as it may
    plan = make_plan(adapters, base=tiny_backbone, config=PAPER)
    whole = make_plan(adapters, base=tiny_backbone, config=PAPER, images="all")
    assert " drawn of 216 images of " in plan.describe()
    assert " of 12 adapters, 32 px" in plan.describe()
    assert "216 images of 12 adapters, 32 px" in whole.describe()
    assert plan.stages[0].seconds < whole.stages[0].seconds
    assert plan.stages[0].bytes < whole.stages[0].bytes
    one = make_plan(adapters, base=tiny_backbone, config=Config.weights(), meta={"steps": 1, "n_query": 1})
    assert "10 drawn of 400 pictures" in one.describe()
    with pytest.raises(ValueError, match="`images` must be 'drawn' or 'all', got 'some'"):
        make_plan(adapters, base=tiny_backbone, images="some")
