"""Ablations are changes of settings: each is seen to change what it says, and nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lorarecycle.meta.episodes import EpisodeSampler
from lorarecycle.reproduce import learning
from lorarecycle.reproduce.costs import works
from lorarecycle.reproduce.experiment import load_experiment
from lorarecycle.reproduce.learning import everything, joint, learned, settle_meta
from lorarecycle.reproduce.losses import area
from lorarecycle.reproduce.settings import inversion_config, merge, meta_config
from lorarecycle.vit.features import normalized_batches

pytestmark = pytest.mark.medium


def cells(rehearse, name, column=0):
    """Row name -> (world, settings) of one column."""
    run = rehearse(name)
    chosen = run.experiment.columns[column].name
    return {c.row.name: (run.world, c.settings) for c in run.cells if c.column.name == chosen}


def differences(one, two, path=""):
    """Settings that differ."""
    keys = sorted(set(one) | set(two))
    found = set()
    for key in keys:
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{path}{key}.")
        elif a != b:
            found.add(f"{path}{key}")
    return found


def pair(name):
    """The settings of the first and the last row of a table, as the file says."""
    experiment = load_experiment(name)
    return [experiment.cell(experiment.rows[i], experiment.columns[0]) for i in (0, -1)]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("table7", {"meta.interpolation"}),
        ("table8", {"learn"}),
        ("table9", {"surrogates.images"}),
        ("table11", {"surrogates.mask"}),
        ("table15", {"adapters.ranks"}),
        ("table18", {"surrogates.inversion.prior_weight"}),
        ("table6", {"area"}),
        ("table5", {"method"}),
    ],
)
def test_an_ablation_changes_one_setting(name, changed, rehearse):
    one, two = pair(name)
    assert differences(one, two) == changed
    cells = rehearse(name).cells
    assert len({cell.key for cell in cells if cell.column.name == cells[0].column.name}) == len(
        {cell.row.name for cell in cells}
    )


def test_interpolation(rehearse):
    """Tab. 7: without it no episode crosses adapters."""
    shares = []
    for world, settings in cells(rehearse, "table7").values():
        surrogates, config = settle_meta(world, settings)
        sampler = EpisodeSampler(surrogates, replace(config, n_way=3), 0)
        shares.append(sum(sampler(step).cross_task for step in range(60)) / 60)
    assert shares[0] == 0 < 0.3 < shares[1] < 0.7


def test_joint_learning(rehearse):
    """Tab. 8: one classifier over the classes of all adapters, see `pool_classes`."""
    world, settings = cells(rehearse, "table8")["joint supervised learning"]
    adapter = joint(world, settings)
    assert adapter.head is None
    meta = learned(world, {**settings, "learn": "lora"}).adapter
    assert adapter.sites == meta.sites
    assert adapter.digest() != meta.digest()


def test_original_data(rehearse):
    """Tab. 9: the images are those that the adapters were tuned on."""
    found = cells(rehearse, "table9")
    world, settings = found["original training data"]
    for surrogate, images in zip(world.surrogates(settings), world.task_images(settings), strict=True):
        assert all((image == images.images).flatten(1).all(1).any() for image in surrogate.images)
    generated = world.surrogates(found["generated data"][1])
    assert not (generated[0].images[0] == images.images).flatten(1).all(1).any()


def test_what_is_meta_trained(rehearse, monkeypatch):
    """Tab. 10: all weights and no LoRA; LoRA in the blocks that the row names."""
    found = cells(rehearse, "table10")
    for row, blocks in (("LoRA (the first 6 layers)", range(6)), ("LoRA (the last 6 layers)", range(6, 12))):
        adapter = learned(*found[row]).adapter
        assert {int(site.split(".")[1]) for site in adapter.sites} == set(blocks)
    world, settings = found["Entire VFM"]
    model, adapter, _ = learned(world, {**settings, "meta": {**settings["meta"], "steps": 3}})
    assert adapter is None
    before, after = world.backbone(settings).state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"vit.patch_embed.proj.weight", "vit.blocks.0.mlp.fc1.weight", "vit.norm.weight"} <= changed
    again = everything(world, {**settings, "meta": {**settings["meta"], "steps": 3}}).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not any(p.requires_grad for p in model.parameters())
    seen = []
    loss = learning.episode_loss
    monkeypatch.setattr(learning, "episode_loss", lambda *a: seen.append(a[2].resampling is not None) or loss(*a))
    more = {**settings["meta"], "steps": 2, "episodes_per_step": 3, "resolutions": [16]}
    everything(world, {**settings, "meta": more})
    assert seen == [True] * 6, "each episode of a step, at lower resolutions"


def test_seconds_of_learning(rehearse, tmp_path, monkeypatch):
    """Meta-training is timed, images that rows share are not, and the seconds stay with the meta-LoRA."""
    world, settings = next(iter(cells(rehearse, "table7").values()))
    now, made, real = [0.0], world.surrogates(settings), learning.trained
    images = [100.0]  # seconds that they take, once

    def invert(*args):
        now[0] += images.pop() if images else 0
        return made

    def train(*args, **kwargs):
        now[0] += 3
        return real(*args, **kwargs)

    monkeypatch.setattr(learning, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(learning, "trained", train)
    monkeypatch.setattr(type(world), "surrogates", invert)
    monkeypatch.setattr(type(world), "folder", lambda self, kind, facts: tmp_path / kind / "one")
    assert learned(world, settings).seconds == 3
    assert not images
    monkeypatch.setattr(learning, "trained", None)
    assert learned(world, settings).seconds == 3
    (tmp_path / "meta-loras" / "one.json").unlink()
    assert learned(world, settings).seconds is None, "made by a version that kept none"


def test_masks(rehearse):
    """Tab. 11: patches by the attention of the first block, or of the last."""
    found = cells(rehearse, "table11")
    world, settings = found["first-layer attention weight"]
    surrogates, config = settle_meta(world, settings)
    assert config.sparsity is None
    teacher = world.backbone(settings).merge(world.adapters(settings)[0])
    (batch,) = normalized_batches(teacher, surrogates[0].images)
    expected = teacher.encode(batch, prune={0: 0.75}, class_token_only=True).kept
    assert torch.equal(surrogates[0].kept, expected)
    assert surrogates[0].kept.shape[1] == 4, "a quarter of 16"
    plain, config = settle_meta(*found["constructed mask"])
    assert config.sparsity == 0.75
    assert not torch.equal(plain[0].masked(0.75).kept, surrogates[0].kept)


def test_few_images_of_a_class(rehearse):
    """`adapters.per_class`: adapters are tuned on so many of each class at most, the same each time; the plan counts
    them, and they are other adapters than those of all images."""
    world, settings = next(iter(cells(rehearse, "table9").values()))
    few = merge(settings, {"adapters": {"per_class": 5}})
    every, some = next(world.task_images(settings)), next(world.task_images(few))
    assert some.counts == (5,) * 5
    assert min(every.counts) > 5
    assert all((image == every.images).flatten(1).all(1).any() for image in some.images)
    assert torch.equal(some.images, next(world.task_images(few)).images)
    many = merge(settings, {"adapters": {"per_class": 999}})
    assert torch.equal(next(world.task_images(many)).images, every.images)
    facts = [world.adapter_facts(one) for one in (settings, few)]
    assert facts[0] != facts[1]
    again = replace(world, work=world.work / "nothing")
    (cost,), (less,) = ([w for w in works(again, one, "") if w.stage == "tune adapters"] for one in (settings, few))
    assert less.flops / cost.flops == pytest.approx(25 / len(every), rel=0.01)


def test_mixed_ranks(rehearse):
    """Tab. 15."""
    found = cells(rehearse, "table15")
    ranks = [[set(a.ranks.values()) for a in world.adapters(s)] for world, s in found.values()]
    assert ranks == [[{4}] * 4, [{4}, {8}] * 2]
    assert set(learned(*found["50 %: 4 + 50 %: 8"]).adapter.ranks.values()) == {4}


def test_prior_weight(rehearse):
    """Tab. 18: other weights, other images, from equal noise."""
    found = cells(rehearse, "table18")
    images = [world.surrogates(settings)[0].images for world, settings in found.values()]
    assert not torch.equal(images[0], images[1])
    assert [inversion_config(s).prior_weight for _, s in found.values()] == [0.1, 0.01, 0.001]


def test_pruned_inversion(rehearse):
    """Tab. 4: patches left over, and the operations that pruning saves."""
    run = rehearse("table4")
    found = cells(rehearse, "table4")
    left = {row: world.surrogates(settings)[0].kept for row, (world, settings) in found.items()}
    assert left["{0: 0.0}"] is None
    assert left["{11: 0.75}"].shape[1] == left["{6: 0.75}"].shape[1] == 4
    run()
    flops = {c.row.name: r["gflops"] for c, r in run.results() if c.column.name == "GFLOPs"}
    assert flops["{6: 0.75}"] < flops["{8: 0.75}"] < flops["{11: 0.75}"]


def test_sparse_training(rehearse):
    """Tab. 5: fewer patches, fewer operations."""
    run = rehearse("table5")
    run()
    flops = [r["gflops"] for c, r in run.results() if c.column.name == "GFLOPs"]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] > 2 * flops[3]
    assert [meta_config(c.settings).sparsity for c in run.cells if c.column.name == "its/s"] == [None, 0.25, 0.5, 0.75]


def test_areas(rehearse):
    """Tab. 6: foreground and background share the patches out."""
    world, settings = cells(rehearse, "table6")["Inverted foregrounds"]
    surrogate = world.surrogates(settings)[0]
    front, back = (area(surrogate, name) for name in ("foreground", "background"))
    assert front.shape[1] == 4
    assert back.shape[1] == 12
    assert torch.equal(torch.cat([front, back], 1).sort(1).values, torch.arange(16).expand(len(front), -1))
    assert (surrogate.scores.gather(1, front).min(1).values >= surrogate.scores.gather(1, back).max(1).values).all()
