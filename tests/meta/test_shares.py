"""What each process computes of a step: together it is the step, whatever their number."""

from dataclasses import replace

import pytest
import torch

from lorarecycle import MetaConfig, Surrogate, meta_train
from lorarecycle.meta.bank import fill_bank
from lorarecycle.meta.draws import Draws
from lorarecycle.meta.episodes import EpisodeSampler, ImageSampler
from lorarecycle.meta.shares import own_shares
from lorarecycle.meta.step import EpisodeStep
from lorarecycle.runtime.distributed import Group
from lorarecycle.runtime.graphs import adam
from lorarecycle.vit.lora import LoRA

EPISODES = MetaConfig(steps=3, n_way=3, n_query=2, guide_weight=0.5, episodes_per_step=3, resolutions=(8, 32))
GUIDE = replace(EPISODES, guide_weight=1.0, episodes_per_step=2)


@pytest.fixture
def made(tiny_data):
    g = torch.Generator().manual_seed(0)
    return [
        Surrogate(tiny_data.images, tiny_data.labels, torch.randn(48, 4, generator=g), tiny_data.class_names, 8)
        for _ in range(2)
    ]


def gradients(backbone, made, config, group, step):
    """The flat gradient and the loss of one process in a step."""
    sampler = (ImageSampler if config.guide_weight == 1 else EpisodeSampler)(made, config)
    draws = Draws.of(sampler, config, 0, first=0, device=backbone.device)
    lora = LoRA.random(backbone, generator=torch.Generator().manual_seed(0))
    for parameter in lora.lora_B.values():
        parameter.data.fill_(0.05)
    bank = fill_bank(backbone, made)
    targets = torch.randn(len(bank.images), 32, generator=torch.Generator().manual_seed(1))
    seen = torch.eye(32).expand(2, 32, 32)
    shares = own_shares(draws, config, group)
    taken = EpisodeStep(
        backbone,
        lora,
        bank._replace(targets=targets, resampling=seen),
        shares,
        torch.ones(3),
        config,
        optimizer=adam(lora.parameters(), backbone.device),
        losses=torch.zeros(3),
        done=step,
        group=Group(0, 2),  # its own part only; nothing is exchanged
    )
    taken._own_part()
    return taken._sum.clone(), shares


@pytest.mark.medium
@pytest.mark.parametrize("config", [EPISODES, GUIDE], ids=["episodes", "guide"])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_parts_add_up(tiny_backbone, made, config, size):
    for step in (0, 2):
        whole, shares = gradients(tiny_backbone, made, config, Group(), step)
        assert sum(share.weight for share in shares) == pytest.approx(1)
        parts, weights, images = torch.zeros_like(whole), 0.0, []
        for rank in range(size):
            part, shares = gradients(tiny_backbone, made, config, Group(rank, size), step)
            parts += part
            weights += sum(share.weight for share in shares)
            images += [row for share in shares for row in share.draws.rows[step].tolist()]
        assert weights == pytest.approx(1)
        assert len(images) == config.episodes_per_step * 9
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-6)
        assert whole[:-1].abs().max() > 1e-3, "else this could not fail"


def test_a_step_is_the_mean_of_its_episodes(tiny_backbone, made):
    """With a rate of next to nothing every step sees the same factors."""
    still = replace(EPISODES, lr=1e-12, lr_min=1e-12, init="random", resolutions=(), guide_weight=0.0)
    together = meta_train(tiny_backbone, made, config=still, quiet=True).losses
    alone = meta_train(tiny_backbone, made, config=replace(still, steps=9, episodes_per_step=1), quiet=True).losses
    torch.testing.assert_close(together, alone.view(3, 3).mean(dim=1), rtol=1e-4, atol=1e-5)


def test_images_are_dealt_out_evenly():
    ends = [Group(rank, 7).own(23) for rank in range(7)]
    assert [first for first, _ in ends][1:] == [last for _, last in ends][:-1]
    assert ends[0][0] == 0
    assert ends[-1][1] == 23
    assert {last - first for first, last in ends} == {3, 4}
