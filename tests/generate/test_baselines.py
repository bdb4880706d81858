"""Soup, nearest task vector and COND P-DIFF, in the interface of the generator."""

import json

import pytest
import torch

from lorarecycle.generate import CondPDiff, ModelSoup, NearestTask, load_generator
from lorarecycle.generate.cond_pdiff import schedule
from lorarecycle.runtime.files import load_tensors, save_tensors

pytestmark = pytest.mark.medium

DIFFUSION = {"epochs": 120, "batch_size": 3, "conv_layers": 6, "latent": 16, "lr": 3e-3}
DIFFUSION |= {"diffusion_epochs": 500, "diffusion_steps": 50, "hidden": 64}


def flat(generator, adapters):
    return torch.stack([generator.layout.flatten(adapter) for adapter in adapters])


def reloaded(generator, tmp_path):
    return load_generator(generator.save(tmp_path / "generator.safetensors"))


def test_soup_of_everything_and_of_a_task(pool, vectors, tmp_path):
    soup = reloaded(ModelSoup.fit(pool, vectors), tmp_path)
    every = flat(soup, pool)
    for vector in (vectors[0], vectors[5]):
        torch.testing.assert_close(flat(soup, soup.sample(vector, 2)), every.mean(dim=0).expand(2, -1))
    soup = reloaded(ModelSoup.fit(pool, vectors, config={"scope": "task"}), tmp_path)
    torch.testing.assert_close(flat(soup, soup.sample(vectors[0]))[0], every[:3].mean(dim=0))
    torch.testing.assert_close(flat(soup, [soup.reconstruct(pool[5], vectors[5])])[0], every[3:].mean(dim=0))
    assert soup.sample(vectors[5])[0].head.class_names == pool[5].head.class_names


def test_greedy_soup_takes_what_does_not_hurt(pool, vectors, tmp_path):
    wanted = flat(ModelSoup.fit(pool, vectors), pool)[[1, 2]].mean(dim=0)

    def score(adapter, vector):
        return -(soup_layout.flatten(adapter) - wanted).norm().item()

    soup_layout = ModelSoup.fit(pool, vectors).layout
    soup = reloaded(ModelSoup.fit(pool, vectors, config={"recipe": "greedy"}, score=score), tmp_path)
    torch.testing.assert_close(flat(soup, soup.sample(vectors[0]))[0], wanted)
    with pytest.raises(ValueError, match="`score` must be given with recipe='greedy'"):
        ModelSoup.fit(pool, vectors, config={"recipe": "greedy"})
    with pytest.raises(ValueError, match="`score` must be given with recipe='greedy'"):
        ModelSoup.fit(pool, vectors, score=score)


def test_nearest_hands_out_the_last_checkpoints_first(pool, vectors, tmp_path):
    nearest = reloaded(NearestTask.fit(pool, vectors), tmp_path)
    found = flat(nearest, nearest.sample(vectors[5] + 0.01, 2))
    assert torch.equal(found, flat(nearest, [pool[5], pool[4]]))
    assert torch.equal(flat(nearest, [nearest.reconstruct(pool[1], vectors[0])]), flat(nearest, [pool[1]]))
    assert nearest.sample(vectors[5])[0].digest() == pool[5].digest()
    with pytest.raises(ValueError, match="`n` must be at most 3"):
        nearest.sample(vectors[0], 4)


@pytest.mark.slow
def test_diffusion_learns_the_tasks_and_repeats(pool, vectors, tmp_path):
    made = CondPDiff.fit(pool, vectors, config=DIFFUSION, device="cpu", quiet=True)
    assert made.losses["reconstruction"][-10:].mean() < 0.1 * made.losses["reconstruction"][:5].mean()
    assert made.losses["denoising"][-50:].mean() < 0.7 * made.losses["denoising"][:10].mean()
    every = flat(made, pool)
    for own, other in ((0, 3), (3, 0)):
        sample = flat(made, made.sample(vectors[own]))[0]
        assert (sample - every[own]).norm() < 0.6 * every[own].norm()
        assert (sample - every[own]).norm() < 0.5 * (sample - every[other]).norm()
    loaded = reloaded(made, tmp_path)
    assert torch.equal(
        flat(loaded, loaded.sample(vectors[0], 2, seed=3)), flat(made, made.sample(vectors[0], 2, seed=3))
    )
    assert torch.equal(
        flat(loaded, [loaded.reconstruct(pool[1], vectors[1])]), flat(made, [made.reconstruct(pool[1], vectors[1])])
    )


def test_a_diffusion_of_another_autoencoder_is_refused(pool, vectors, quick, tmp_path, monkeypatch):
    """Whose length may hang on the machine."""
    quick |= {"diffusion_epochs": 4, "diffusion_steps": 5, "hidden": 8}
    checkpoint = tmp_path / "checkpoint.safetensors"
    CondPDiff.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)
    checkpoint.unlink()
    fit = CondPDiff._fit_autoencoder

    def longer(self, examples, machine):
        fit(self, examples, machine)
        for weight in self.model.parameters():
            weight.data.mul_(1.01)

    monkeypatch.setattr(CondPDiff, "_fit_autoencoder", longer)
    with pytest.raises(ValueError, match="differs in autoencoder"):
        CondPDiff.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)


def test_a_stopped_diffusion_goes_on_to_the_same_bits(pool, vectors, quick, tmp_path, monkeypatch):
    quick |= {"diffusion_epochs": 4, "diffusion_steps": 5, "hidden": 8}
    whole = CondPDiff.fit(pool, vectors, config=quick, device="cpu", quiet=True)
    checkpoint = tmp_path / "checkpoint.safetensors"
    CondPDiff.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)
    second = checkpoint.with_name(checkpoint.name + ".diffusion")
    assert second.exists()
    second.unlink()  # as if stopped between the two
    resumed = CondPDiff.fit(pool, vectors, config=quick, device="cpu", checkpoint=checkpoint, quiet=True)
    assert torch.equal(flat(whole, whole.sample(vectors[0])), flat(resumed, resumed.sample(vectors[0])))


@pytest.mark.parametrize(
    "cut", [pytest.param(lambda t: t[:1], id="rows"), pytest.param(lambda t: t[:, :3], id="columns")]
)
@pytest.mark.parametrize(("method", "tensor"), [(ModelSoup, "soups"), (NearestTask, "vectors")])
def test_a_file_that_does_not_fit_itself(pool, vectors, method, tensor, cut, tmp_path):
    path = method.fit(pool, vectors).save(tmp_path / "g.safetensors")
    tensors, strings = load_tensors(path)
    metadata = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    save_tensors(path, {**tensors, tensor: cut(tensors[tensor]).contiguous()}, metadata)
    with pytest.raises(ValueError, match=rf"g.safetensors must hold all .*{tensor} is \["):
        load_generator(path)


def test_the_noise_schedule():
    assert schedule(1000)[0].item() == pytest.approx(1 - 1e-4)
    assert schedule(1000)[-1].item() == pytest.approx(1 - 0.02)


@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_the_noise_schedule_ends_in_noise(steps):
    kept = schedule(steps).cumprod(dim=0)
    assert (kept > 0).all()
    assert kept[-1] < 0.01
