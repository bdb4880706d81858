"""Meta-training: the losses of Eq. 3 and 4, sparse tokens, schedule, and resuming to the bit."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lorarecycle import MetaConfig, Surrogate, meta_train
from lorarecycle.data.images import normalize
from lorarecycle.inversion.stored import StoredSurrogate
from lorarecycle.meta import step
from lorarecycle.meta import train as module
from lorarecycle.meta.bank import content_digest, fill_bank
from lorarecycle.meta.draws import Draws
from lorarecycle.meta.episodes import EpisodeSampler
from lorarecycle.meta.factors import random_factors
from lorarecycle.meta.loss import episode_loss
from lorarecycle.meta.train import default_lr, learning_rate
from lorarecycle.vit.lora import LoRA

CONFIG = MetaConfig(steps=12, n_way=3, n_shot=2, n_query=4, flip=False, init="random", guide_weight=0.0)


def surrogates(data, n_adapters=2, kept=None) -> list[Surrogate]:
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(n_adapters):
        n, C = len(data), len(data.class_names)
        logits = 4 * F.one_hot(data.labels, C) + torch.randn(n, C, generator=g)
        scores = torch.rand(n, 16, generator=g)
        made.append(
            Surrogate(data.images, data.labels, logits, data.class_names, 8, None, scores, f"a{i}", f"digest{i}")
        )
    return made if kept is None else [s.masked(kept) for s in made]


@pytest.mark.parametrize("cross_task", [False, True])
def test_losses_are_those_of_the_paper(tiny_backbone, tiny_data, cross_task):
    config = MetaConfig(**{**vars(CONFIG), "steps": 1, "interpolation": float(cross_task)})
    pools = surrogates(tiny_data)
    lora = LoRA.random(tiny_backbone, generator=torch.Generator().manual_seed(0))
    episode = EpisodeSampler(pools, config)(0)
    bank = fill_bank(tiny_backbone, pools)
    draws = Draws.of(EpisodeSampler(pools, config), config, 0, first=0, device=tiny_backbone.device)
    loss = episode_loss(tiny_backbone, lora, bank, draws.at(torch.tensor([0])), config)

    images = torch.cat([s.images for s in pools])[episode.images]
    features = tiny_backbone(normalize(images, tiny_backbone.mean, tiny_backbone.std))
    support, query, labels = features[:6], features[6:], episode.labels[6:]
    centres = torch.stack([support[episode.labels[:6] == c].mean(0) for c in range(3)])
    distances = (query[:, None] - centres).norm(dim=-1)
    p = torch.exp(-distances) / torch.exp(-distances).sum(1, keepdim=True)
    if cross_task:
        expected = -p[torch.arange(12), labels].log().mean()
    else:
        teacher = torch.cat([s.teacher_logits for s in pools])[episode.images[6:]][:, episode.teacher_classes].softmax(
            1
        )
        expected = (teacher * (teacher.log() - p.log())).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_only_the_meta_lora_changes(tiny_backbone, make_data):
    before = {k: v.clone() for k, v in tiny_backbone.state_dict().items()}
    changes = {"steps": 60, "lr": 1e-2, "sites": ("q", "v", "fc1"), "layers": (1, 2), "flip": True}
    config = MetaConfig(**{**vars(CONFIG), **changes})
    result = meta_train(tiny_backbone, surrogates(make_data(noise=120.0)), config=config, quiet=True)
    assert result.losses[-15:].mean() < 0.7 * result.losses[:15].mean()
    assert result.meta_lora.head is None
    assert result.meta_lora.sites[:3] == ("blocks.1.attn.q", "blocks.1.attn.v", "blocks.1.mlp.fc1")
    assert len(result.meta_lora.sites) == 6
    for name, value in tiny_backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_sparse_tokens(tiny_backbone, tiny_data):
    pools = surrogates(tiny_data)
    dense = meta_train(tiny_backbone, pools, config=CONFIG, quiet=True)
    everything = meta_train(tiny_backbone, [s.masked(0.0) for s in pools], config=CONFIG, quiet=True)
    torch.testing.assert_close(dense.losses, everything.losses, rtol=1e-3, atol=1e-4)
    sparse = meta_train(tiny_backbone, surrogates(tiny_data, kept=0.75), config=CONFIG, quiet=True)
    asked = meta_train(tiny_backbone, pools, config=MetaConfig(**{**vars(CONFIG), "sparsity": 0.75}), quiet=True)
    assert torch.equal(sparse.losses, asked.losses)
    assert not torch.equal(sparse.losses, dense.losses)


def test_sparse_training_leaves_a_guide_of_its_own_size_alone(tiny_backbone, tiny_data, make_adapter):
    """The targets differ from the first features in length alone: the guide reads the same patches."""
    adapter = make_adapter(tiny_backbone, head=False)
    config = MetaConfig(**{**vars(CONFIG), "guide_weight": 1.0, "init": "adapters", "sparsity": 0.5, "flip": False})
    config = replace(config, steps=1, sites=("q", "v"), layers=None)
    sparse = meta_train(tiny_backbone, surrogates(tiny_data), config=config, adapters=[adapter], quiet=True)
    model, kept = tiny_backbone.merge(adapter), surrogates(tiny_data)[0].masked(0.5).kept
    features = model(normalize(tiny_data.images, model.mean, model.std), kept=kept)
    lengths = features.norm(dim=-1)
    assert sparse.losses.item() <= (lengths - lengths.mean()).square().max() / features.shape[1] + 1e-5
    whole = model(normalize(tiny_data.images, model.mean, model.std))
    assert (features - whole).square().mean() > 10 * sparse.losses.item(), "else this could not fail"


def test_learning_rate_cycles():
    rates = [learning_rate(step, MetaConfig(), 1e-3) for step in range(200)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[25] == pytest.approx(1e-3) == max(rates)
    assert rates[12] == pytest.approx(1e-5 + (1e-3 - 1e-5) * 12 / 25)
    assert rates[62] == pytest.approx((1e-3 + 1e-5) / 2, rel=0.05)
    assert rates[:100] == rates[100:]
    short = [learning_rate(step, MetaConfig(steps=20), 1e-3) for step in range(20)]
    assert short[5] == pytest.approx(1e-3)
    assert short[19] < 3e-5


def test_the_default_learning_rate_falls_with_the_width(tiny_backbone, tiny_data, monkeypatch):
    assert [default_lr(width) for width in (32, 192, 768)] == [5e-3, 5e-3, 1.25e-3]
    highest = []
    monkeypatch.setattr(module, "learning_rate", lambda step, config, lr: highest.append(lr) or lr)
    for config in (replace(CONFIG, steps=1), replace(CONFIG, steps=1, lr=0.1)):
        meta_train(tiny_backbone, surrogates(tiny_data), config=config, quiet=True)
    assert highest == [5e-3, 0.1]


def test_resuming_ends_with_the_same_bits(tiny_backbone, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 5)
    pools, path = surrogates(tiny_data), tmp_path / "checkpoint.safetensors"
    whole = meta_train(tiny_backbone, pools, config=CONFIG, quiet=True)

    calls = 0
    original = step.episode_loss

    def stopped(*args):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(step, "episode_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        meta_train(tiny_backbone, pools, config=CONFIG, checkpoint=path, quiet=True)
    calls = 100
    resumed = meta_train(tiny_backbone, pools, config=CONFIG, checkpoint=path, quiet=True)
    assert calls == 100 + 7, "only the steps after the checkpoint at 5 were repeated"
    assert torch.equal(whole.losses, resumed.losses)
    assert whole.meta_lora.digest() == resumed.meta_lora.digest()
    with pytest.raises(ValueError, match=r"must be of this training, got one that differs in seed \(0 there, 1 here\)"):
        meta_train(tiny_backbone, pools, config=CONFIG, seed=1, checkpoint=path, quiet=True)
    others = [replace(pools[0], images=255 - pools[0].images), pools[1]]
    with pytest.raises(ValueError, match="must be of this training, got one that differs in surrogates"):
        meta_train(tiny_backbone, others, config=CONFIG, checkpoint=path, quiet=True)
    lower = tiny_backbone.clone().to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be of this training, got one that differs in backbone, dtype"):
        meta_train(lower, pools, config=CONFIG, checkpoint=path, quiet=True)


def test_a_surrogate_in_a_file_is_the_one_in_memory(tiny_data, tmp_path):
    whole = surrogates(tiny_data)[0]
    for one in (whole, replace(whole, kept=torch.arange(4).expand(len(whole.images), 4).clone())):
        stored = StoredSurrogate(one.save(tmp_path / "s.safetensors"))
        assert content_digest(stored) == content_digest(one)
        for change in ({"labels": one.labels.flip(0)}, {"teacher_logits": one.teacher_logits + 1}):
            assert content_digest(replace(one, **change)) != content_digest(one)


def test_surrogates_must_go_together(tiny_backbone, tiny_data):
    a, b = surrogates(tiny_data)
    with pytest.raises(ValueError, match="`surrogates` must share one number of kept tokens"):
        meta_train(tiny_backbone, [a, b.masked(0.5)], config=CONFIG, quiet=True)
    small = surrogates(tiny_data.resize(16))[0]
    with pytest.raises(ValueError, match="`surrogates` must share one image size"):
        meta_train(tiny_backbone, [a, small], config=CONFIG, quiet=True)


def test_training_starts_from_the_adapters(tiny_backbone, tiny_data, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=i, head=False) for i in range(2)]
    for gain, used in ((2.0, 2.0), (None, 1.0)):  # the factors are large: `common_gain` is 1
        config = MetaConfig(**{**vars(CONFIG), "steps": 0, "init": "adapters", "r": 8, "warm_start_gain": gain})
        untrained = meta_train(tiny_backbone, [], config=config, adapters=adapters).meta_lora
        for site in adapters[0].sites:
            mean = (adapters[0].delta(site) + adapters[1].delta(site)) / 2
            torch.testing.assert_close(untrained.delta(site), used * mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`adapters` must be given to start from them, got none"):
        meta_train(tiny_backbone, surrogates(tiny_data), config=config, quiet=True)


def test_features_follow_the_guide(tiny_backbone, tiny_data, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=i, size=0.15) for i in range(2)]
    settings = {"steps": 60, "init": "adapters", "r": 8, "lr": 5e-3, "guide_size": 48, "guide_weight": 1.0}
    pools = surrogates(tiny_data)
    config = {**vars(CONFIG), **settings}
    result = meta_train(tiny_backbone, pools, config=config, adapters=adapters, quiet=True)
    assert result.losses[-10:].mean() < 0.6 * result.losses[:10].mean()


def test_the_two_losses_mix(tiny_backbone, tiny_data):
    pools = surrogates(tiny_data)
    lora = LoRA.random(tiny_backbone, generator=torch.Generator().manual_seed(0))
    bank = fill_bank(tiny_backbone, pools)
    bank = bank._replace(targets=torch.randn(len(bank.images), 32, generator=torch.Generator().manual_seed(1)))
    losses = []
    for share in (0.0, 0.25, 1.0):
        config = MetaConfig(**{**vars(CONFIG), "guide_weight": share})
        draws = Draws.of(EpisodeSampler(pools, config), config, 0, first=0, device=tiny_backbone.device)
        losses.append(episode_loss(tiny_backbone, lora, bank, draws.at(torch.tensor([0])), config).item())
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-5)
    rows = draws.rows[0]
    features = tiny_backbone(normalize(bank.images[rows], tiny_backbone.mean, tiny_backbone.std))
    assert losses[2] == pytest.approx(F.mse_loss(features, bank.targets[rows]).item(), rel=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_change_nothing(tiny_backbone, tiny_data):
    backbone = tiny_backbone.clone().to("cuda")
    config = replace(CONFIG, steps=20, flip=True, interpolation=0.5)
    losses = [
        meta_train(backbone, surrogates(tiny_data), config=config, compile=False, graphs=graphs, quiet=True).losses
        for graphs in (False, True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_the_student_sees_lower_resolutions_and_the_guide_the_whole(tiny_backbone, tiny_data):
    settings = {"steps": 1, "guide_weight": 1.0, "guide_shift": False, "resolutions": (8,)}
    config = MetaConfig(**{**vars(CONFIG), **settings})
    pools = surrogates(tiny_data)
    result = meta_train(tiny_backbone, pools, config=config, quiet=True)

    lora = random_factors(tiny_backbone, config, 0)  # an update of zero before the first step
    whole = torch.cat([s.images for s in pools])
    rows = module.ImageSampler(pools, config, 0)(0).images
    less = F.interpolate(whole[rows].float(), size=(8, 8), mode="bicubic", antialias=True)
    seen = F.interpolate(less, size=(32, 32), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
    targets = module.feature_targets(tiny_backbone, None, whole, flip=False, shift=False)[rows]
    features = tiny_backbone(normalize(seen, tiny_backbone.mean, tiny_backbone.std), lora=lora)
    torch.testing.assert_close(result.losses[0], F.mse_loss(features, targets), rtol=1e-3, atol=1e-5)


def test_resolutions_are_drawn_image_by_image(tiny_backbone, tiny_data):
    config = MetaConfig(**{**vars(CONFIG), "resolutions": (8, 16, 32)})
    draws = Draws.of(EpisodeSampler(surrogates(tiny_data), config), config, 0, first=0, device=tiny_backbone.device)
    assert draws.resolution.unique().tolist() == [0, 1, 2]
    assert len(draws.resolution[0].unique()) > 1
