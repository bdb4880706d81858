"""Trainable factors: the same result merged and un-merged, at every site, for every mix of ranks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorarecycle.adapters.adapter import Adapter, LoRAFactors
from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.lora import LoRA

ALL = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "sites", [*[(site,) for site in ALL], ("attn.q", "attn.v"), ("attn.k", "mlp.fc2"), ALL], ids=",".join
)
@pytest.mark.parametrize("r", [1, (2, 5, 3)], ids=["r=1", "mixed"])
def test_merged_and_worn_agree(
    tiny_backbone: Backbone,
    make_adapter: Callable[..., Adapter],
    images: Tensor,
    sites: tuple[str, ...],
    r: int | tuple[int, ...],
) -> None:
    adapter = make_adapter(tiny_backbone, r=r, sites=sites)
    worn = tiny_backbone(images, lora=LoRA.from_adapter(adapter))
    merged = tiny_backbone.merge(adapter)(images)
    torch.testing.assert_close(worn, merged, rtol=1e-4, atol=1e-4)
    assert (worn - tiny_backbone(images)).abs().max() > 0.01


def test_sites_and_ranks_that_differ_between_blocks(tiny_backbone: Backbone, images: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)

    def factors(out: int, width: int, r: int) -> LoRAFactors:
        lora_A, lora_B = (torch.randn(*s, generator=generator) * 0.3 for s in ((r, width), (out, r)))
        return LoRAFactors(lora_A, lora_B, 1 / r)

    adapter = Adapter(
        {
            "blocks.0.attn.k": factors(32, 32, 7),
            "blocks.1.attn.q": factors(32, 32, 1),
            "blocks.1.attn.v": factors(32, 32, 4),
            "blocks.1.mlp.fc2": factors(32, 128, 2),
            "blocks.2.attn.proj": factors(32, 32, 3),
        }
    )
    worn = tiny_backbone(images, lora=LoRA.from_adapter(adapter))
    torch.testing.assert_close(worn, tiny_backbone.merge(adapter)(images), rtol=1e-4, atol=1e-4)


def test_pools_prune_and_scores_with_lora(
    tiny_backbone: Backbone, make_adapter: Callable[..., Adapter], images: Tensor
) -> None:
    adapter = make_adapter(tiny_backbone, sites=ALL)
    lora, merged = LoRA.from_adapter(adapter), tiny_backbone.merge(adapter)
    for pool in ("token", "token+mean", "mean"):
        options = {"prune": {0: 0.25, 2: 0.5}, "pool": pool}
        torch.testing.assert_close(
            tiny_backbone(images, lora=lora, **options), merged(images, **options), rtol=1e-4, atol=1e-4
        )
    worn, plain = (m.encode(images, lora=x, scores=True) for m, x in ((tiny_backbone, lora), (merged, None)))
    torch.testing.assert_close(worn.scores, plain.scores, rtol=1e-4, atol=1e-4)


def test_fresh_factors_change_nothing_and_follow_the_generator(tiny_backbone: Backbone, images: Tensor) -> None:
    def fresh(seed: int) -> LoRA:
        generator = torch.Generator().manual_seed(seed)
        return LoRA.random(tiny_backbone, r=3, sites=("q", "fc2"), layers=(0, 2), generator=generator)

    lora = fresh(0)
    assert set(lora.scalings) == {f"blocks.{i}.{s}" for i in (0, 2) for s in ("attn.q", "mlp.fc2")}
    assert set(lora.scalings.values()) == {4 / 3}
    torch.testing.assert_close(tiny_backbone(images, lora=lora), tiny_backbone(images), rtol=1e-5, atol=1e-5)
    adapter = lora.to_adapter(name="fresh", like=tiny_backbone)
    for site, (lora_A, lora_B, _) in adapter.factors.items():
        bound = tiny_backbone.site_shape(site)[1] ** -0.5
        assert 0.5 * bound < lora_A.abs().max() <= bound
        assert lora_B.abs().max() == 0
    assert fresh(0).to_adapter(name="x", like=tiny_backbone).digest() == adapter.digest()
    assert fresh(1).to_adapter(name="x", like=tiny_backbone).digest() != adapter.digest()


def test_only_the_factors_train(tiny_backbone: Backbone, make_adapter: Callable[..., Adapter], images: Tensor) -> None:
    lora = LoRA.from_adapter(make_adapter(tiny_backbone, sites=ALL))
    tiny_backbone(images, lora=lora).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
    assert all(p.grad is None and not p.requires_grad for p in tiny_backbone.parameters())


def test_gradients_against_finite_differences(
    tiny_vit: torch.nn.Module, make_adapter: Callable[..., Adapter], images: Tensor
) -> None:
    backbone = Backbone(tiny_vit).double()
    lora = LoRA.from_adapter(make_adapter(backbone, r=(1, 2), sites=("attn.q", "attn.v", "mlp.fc1"))).double()
    loss = lambda: backbone(images[:1], lora=lora).square().sum()  # noqa: E731
    loss().backward()
    for name in ("blocks_0_attn_q", "blocks_1_attn_v", "blocks_2_mlp_fc1"):
        for factor in (lora.lora_A[name], lora.lora_B[name]):
            step = 1e-6
            with torch.no_grad():
                factor[0, 0] += step
                high = loss()
                factor[0, 0] -= 2 * step
                low = loss()
                factor[0, 0] += step
            torch.testing.assert_close((high - low) / (2 * step), factor.grad[0, 0], rtol=1e-4, atol=1e-6)


def test_round_trip_copies(tiny_backbone: Backbone, make_adapter: Callable[..., Adapter]) -> None:
    adapter = make_adapter(tiny_backbone, r=(1, 3), sites=ALL)
    digest = adapter.digest()
    lora = LoRA.from_adapter(adapter)
    back = lora.to_adapter(name="back", like=tiny_backbone, head=adapter.head)
    assert back.digest() == digest
    assert (back.base_model, back.mean, back.std) == ("tiny", tiny_backbone.mean, tiny_backbone.std)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(1)
    assert adapter.digest() == digest
    assert back.digest() == digest


def test_layers_that_the_backbone_lacks(tiny_backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"blocks\.3"):
        LoRA.random(tiny_backbone, layers=(3,), generator=torch.Generator())
