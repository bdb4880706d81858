"""ICM-LoRA's generator: it learns, repeats to the bit, resumes, and refuses what it cannot learn from."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorarecycle import Adapter, recycle
from lorarecycle.adapters.adapter import Head, LoRAFactors
from lorarecycle.generate import GenerateConfig, LoRAGenerator, load_generator
from lorarecycle.generate.icm_lora import seeded
from lorarecycle.generate.training import TIMED, train
from lorarecycle.runtime.files import load_tensors, save_tensors

pytestmark = pytest.mark.medium

LEARN = {"epochs": 240, "batch_size": 6, "conv_layers": 6, "latent": 16, "lr": 3e-3, "kl_weight": 0.05}


def distance(generator, one, two):
    """Relative to the length of the second."""
    one, two = generator.layout.flatten(one), generator.layout.flatten(two)
    return ((one - two).norm() / two.norm()).item()


def same(one, two):
    return one.digest() == two.digest()


def test_it_learns(pool, vectors):
    generator = LoRAGenerator.fit(pool, vectors, config=LEARN, device="cpu", quiet=True)
    reconstruction, kl = generator.losses["reconstruction"], generator.losses["kl"]
    assert len(reconstruction) == len(kl) == 240
    assert reconstruction[-20:].mean() < 0.1 * reconstruction[:5].mean()
    assert torch.isfinite(kl).all()
    assert (kl >= -1e-6).all()
    for last, other, vector in ((pool[2], pool[5], vectors[2]), (pool[5], pool[2], vectors[5])):
        made = generator.sample(vector, seed=3)[0]
        assert distance(generator, made, last) < 0.35
        assert distance(generator, made, other) > 1.0
        assert made.head.class_names == last.head.class_names
        assert (made.base_model, made.mean, made.std) == (last.base_model, last.mean, last.std)
        assert distance(generator, generator.reconstruct(last, vector), last) < 0.35


def test_save_load_and_sample_give_the_same_bits(pool, vectors, quick, tmp_path):
    generator = LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", quiet=True)
    again = LoRAGenerator.fit(pool, vectors, config=GenerateConfig(**quick), device="cpu", quiet=True)
    loaded = load_generator(generator.save(tmp_path / "generator.safetensors"))
    assert isinstance(loaded, LoRAGenerator)
    assert loaded.config == generator.config
    torch.manual_seed(99)  # no global randomness
    samples = generator.sample(vectors[0], 2, seed=5)
    for other in (loaded, again):
        assert all(map(same, other.sample(vectors[0], 2, seed=5), samples))
        assert same(other.reconstruct(pool[1], vectors[1]), generator.reconstruct(pool[1], vectors[1]))
    assert same(generator.sample(vectors[0], seed=5)[0], samples[0])
    assert not same(samples[0], samples[1])
    assert not same(generator.sample(vectors[0], seed=6)[0], samples[0])
    assert all(torch.equal(loaded.losses[key], value) for key, value in generator.losses.items())


def test_a_stopped_fit_goes_on_to_the_same_bits(pool, vectors, quick, tmp_path, monkeypatch):
    quick |= {"epochs": 6}
    whole = LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", quiet=True)
    monkeypatch.setattr("lorarecycle.generate.training.CHECKPOINT_EVERY", 5)
    checkpoint = tmp_path / "checkpoint.safetensors"
    wanted = save_tensors

    def stop_late(path, tensors, metadata):
        wanted(path, tensors, metadata)
        if metadata["step"] == 15:  # of 18, batch norm has settled
            raise KeyboardInterrupt

    monkeypatch.setattr("lorarecycle.runtime.checkpoint.save_tensors", stop_late)
    with pytest.raises(KeyboardInterrupt):
        LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)
    assert json.loads(load_tensors(checkpoint)[1]["step"]) == 15
    monkeypatch.setattr("lorarecycle.runtime.checkpoint.save_tensors", wanted)
    resumed = LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)
    assert same(resumed.sample(vectors[0])[0], whole.sample(vectors[0])[0])
    assert all(torch.equal(resumed.losses[key], value) for key, value in whole.losses.items())
    with pytest.raises(ValueError, match=r"must be of this training, got one that differs in config.seed \(0 there, 1"):
        LoRAGenerator.fit(pool, vectors, config=quick, seed=1, device="cpu", checkpoint=checkpoint, quiet=True)
    with pytest.raises(ValueError, match="must be of this training, got one that differs in examples; take"):
        LoRAGenerator.fit(pool[1:], vectors[1:], config=quick, device="cpu", checkpoint=checkpoint, quiet=True)
    tensors, strings = load_tensors(checkpoint)
    del tensors["module.to_mean.weight"]
    save_file(tensors, checkpoint, strings)
    with pytest.raises(ValueError, match="must be whole, got one with module.to_mean.weight missing or added"):
        LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)


@pytest.mark.parametrize("normalisation", ["adapter", "tensor"])
def test_generated_statistics_are_those_of_the_nearest_task(pool, vectors, quick, normalisation):
    quick["normalisation"] = normalisation
    generator = LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", quiet=True)
    near = vectors[5] + 0.01
    assert generator.nearest(near) == generator.nearest(vectors[5])
    parts = 1 if normalisation == "adapter" else len(generator.layout.shapes)
    assert generator.statistics.shape == (2, parts, 2)
    flat = torch.stack([generator.layout.flatten(adapter) for adapter in pool[3:]])
    if normalisation == "adapter":
        expected = torch.stack([flat.mean(dim=1).mean(), flat.std(dim=1, correction=0).mean()])
        torch.testing.assert_close(generator.statistics[generator.nearest(near), 0], expected)
    made = generator.sample(near)[0]
    assert made.head.class_names == ("0", "1", "2")  # no task of this vector is known


def test_ranks_and_scalings_that_differ(tiny_backbone, make_adapter, quick):
    small, large = make_adapter(tiny_backbone, r=1, seed=1), make_adapter(tiny_backbone, r=3, seed=2)
    doubled = {site: f._replace(scaling=2 * f.scaling) for site, f in large.factors.items()}
    large = Adapter(doubled, large.head, large.base_model, name="large")
    generator = LoRAGenerator.fit([small, large], torch.eye(2), config=quick, device="cpu", quiet=True)
    assert set(generator.sample([1.0, 0.0])[0].ranks.values()) == {3}
    for adapter in (small, large):
        flat = generator.layout.flatten(adapter)
        back = generator.layout.unflatten(flat, name="back", class_names=adapter.head.class_names)
        for site in adapter.sites:
            torch.testing.assert_close(back.delta(site), adapter.delta(site), rtol=0, atol=1e-6)
        assert torch.equal(back.head.weight, adapter.head.weight)


def test_a_first_adapter_without_effect(tiny_backbone, make_adapter, quick):
    idle, active = make_adapter(tiny_backbone, seed=1), make_adapter(tiny_backbone, seed=2)
    idle = Adapter({site: f._replace(scaling=0.0) for site, f in idle.factors.items()}, idle.head, idle.base_model)
    generator = LoRAGenerator.fit([idle, active], torch.eye(2), config=quick, device="cpu", quiet=True)
    for adapter in (idle, active):
        back = generator.layout.unflatten(generator.layout.flatten(adapter), name="back")
        for site in adapter.sites:
            torch.testing.assert_close(back.delta(site), adapter.delta(site))


def test_first_weights_leave_global_randomness_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
    before = torch.get_rng_state()
    one, two = (seeded(lambda: torch.nn.Linear(3, 3), 1).weight for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_can_be_left_out(pool, vectors, quick):
    mixed = [pool[0].with_head(None), *pool[1:]]
    with pytest.raises(ValueError, match="both have a head or none"):
        LoRAGenerator.fit(mixed, vectors, config=quick, device="cpu", quiet=True)
    generator = LoRAGenerator.fit(mixed, vectors, config={**quick, "heads": False}, device="cpu", quiet=True)
    assert generator.sample(vectors[0])[0].head is None
    assert generator.reconstruct(pool[1], vectors[1]).head is None  # a head that is shown does not matter
    assert generator.layout.size == sum(f.lora_A.numel() + f.lora_B.numel() for f in pool[0].factors.values())


@pytest.mark.slow
def test_bfloat16_learns_too(pool, vectors):
    generator = LoRAGenerator.fit(pool, vectors, config=LEARN, device="cpu", dtype="bfloat16", quiet=True)
    assert generator.losses["reconstruction"][-20:].mean() < 0.15 * generator.losses["reconstruction"][:5].mean()
    assert distance(generator, generator.sample(vectors[0])[0], pool[0]) < 0.4


def test_a_generated_adapter_loads_in_peft(pool, vectors, quick, tiny_vit, tmp_path):
    peft = pytest.importorskip("peft")
    generator = LoRAGenerator.fit(pool, vectors, config={**quick, "heads": False}, device="cpu", quiet=True)
    made = generator.sample(vectors[0])[0]
    made.save(tmp_path / "made")
    tuned = peft.PeftModel.from_pretrained(tiny_vit, tmp_path / "made")
    saved = load_tensors(tmp_path / "made" / "adapter_model.safetensors")[0]
    loaded = peft.get_peft_model_state_dict(tuned)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)
    back = Adapter.load(tmp_path / "made")
    for site in made.sites:
        torch.testing.assert_close(back.delta(site), made.delta(site))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"batch_size": 1}, "`batch_size` must be at least 2"),
        ({"conv_layers": 40}, "`conv_layers` must be between 1 and 20"),
        ({"settle": 1.5}, "`settle` must be between 0 and 1"),
        ({"kernel": 4}, "`kernel` must be odd"),
        ({"channels": (8, 16)}, "one positive number for each of 12 layers"),
        ({"kl_weight": -1.0}, "`kl_weight` must be at least 0"),
        ({"normalisation": "none"}, "`normalisation` must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)


def test_every_example_is_seen_in_every_epoch():
    module, seen = torch.nn.Linear(1, 1), []

    def terms(index, generator):
        seen.append(index.tolist())
        return {"loss": module(torch.ones(1, 1)).sum()}

    train(module, terms, 5, epochs=3, batch_size=2, lr=0.1, seed=0, name="t", quiet=True)
    seen = seen[1 + TIMED :]  # the first say how long a step takes
    assert [len(batch) for batch in seen] == [2] * 9
    for epoch in range(3):
        assert {i for batch in seen[3 * epoch : 3 * epoch + 3] for i in batch} == set(range(5))


def test_batch_norm_settles():
    """In the last steps a small batch sees the statistics that a sample sees."""
    module, modes = torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1), torch.nn.BatchNorm1d(1)), []

    def terms(index, generator):
        modes.append((module.training, module[1].training))
        return {"loss": module(torch.randn(len(index), 1, 4, generator=generator)).square().mean()}

    train(module, terms, 4, epochs=4, batch_size=2, lr=0.1, seed=0, name="t", settle=0.25, quiet=True)
    assert modes[1 + TIMED :] == [(True, True)] * 6 + [(True, False)] * 2
    assert module[1].num_batches_tracked == 6
    assert not module.training


def test_adapters_without_head_of_one_site():
    def make(seed):
        lora_A, lora_B = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(seed))
        return Adapter({"blocks.0.attn.q": LoRAFactors(lora_A, lora_B.T.contiguous(), 1.0)}, name=str(seed))

    generator = LoRAGenerator.fit(
        [make(0), make(1)], torch.eye(2), config={"epochs": 1, "conv_layers": 3}, device="cpu", quiet=True
    )
    assert generator.padded == generator.layout.size == 16
    assert isinstance(generator.sample([0.0, 1.0])[0], Adapter)
    assert generator.sample([0.0, 1.0])[0].head is None
    with pytest.raises(ValueError, match="both have a head or none, got head.bias in one"):
        LoRAGenerator.fit([make(0), make(1).with_head(Head(torch.zeros(2, 8)))], torch.eye(2), device="cpu")


def test_generated_adapters_feed_recycle(pool, vectors, quick, tiny_backbone):
    generator = LoRAGenerator.fit(pool, vectors, config=quick, device="cpu", quiet=True)
    meta_lora = recycle(
        [*generator.sample(vectors[0], 2), *generator.sample(vectors[5])],
        base=tiny_backbone,
        inversion={"steps": 1, "images_per_class": 3, "prior": None},
        meta={"steps": 2, "n_way": 2, "n_query": 2},
        device="cpu",
        dtype="float32",
        quiet=True,
    )
    assert meta_lora.head is None
    assert meta_lora.sites == pool[0].sites
