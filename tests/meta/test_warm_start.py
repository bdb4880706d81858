"""The warm start: the sum of the updates, cut to the meta-LoRA's rank, its scale and what it leaves alone."""

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter, LoRAFactors
from lorarecycle.meta.warm_start import common_gain, start_factors, warm_start
from lorarecycle.vit.lora import LoRA


def fresh(backbone, **options) -> LoRA:
    return LoRA.random(backbone, generator=torch.Generator().manual_seed(7), **options)


def update(lora: LoRA, site: str) -> torch.Tensor:
    lora_A, lora_B, scaling = lora.factors()[site]
    return scaling * lora_B @ lora_A


def cut(matrix: torch.Tensor, r: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


@pytest.mark.parametrize("n", [1, 2, 20, 100])
def test_the_mean_is_amplified_by_the_gain(tiny_backbone, make_adapter, n):
    adapters = [make_adapter(tiny_backbone, seed=i, r=2) for i in range(n)]
    warm = start_factors(adapters, fresh(tiny_backbone, r=4, lora_alpha=6.0), tiny_backbone, gain=4.5)
    for site in adapters[0].sites:
        expected = cut(sum(a.delta(site) for a in adapters) * 4.5 / n, 4)
        torch.testing.assert_close(update(warm, site), expected, rtol=1e-4, atol=1e-5)


def with_common_part(share: float, n: int, length: float) -> list[Adapter]:
    """Updates of one length, orthogonal to one another but for a common part of squared length `share` in each."""
    adapters = []
    for i in range(n):
        lora_A = torch.zeros(2, 32)
        lora_A[0, 0], lora_A[1, i + 1] = share**0.5, (1 - share) ** 0.5
        adapters.append(Adapter({"blocks.0.attn.v": LoRAFactors(lora_A, torch.eye(32)[:, :2], length)}))
    return adapters


@pytest.mark.parametrize(
    ("share", "n", "length", "gain"),
    [
        (0.2, 10, 1e-3, 4.5),  # the usual one
        (0.01, 20, 1e-3, 5.0),  # little in common: more
        (0.01, 3, 1e-3, 3.0),  # at most the sum
        (0.006, 20, 1e-3, 1.0),  # hardly more than chance: the mean
        (0.0, 6, 1e-3, 1.0),
        (0.2, 10, 0.02, 0.04 / 0.02 / (0.2 + 0.08) ** 0.5),  # the mean may become 4 % of the weights' length
        (0.5, 8, 1.0, 1.0),  # and is left as it is where it is more
        (0.3, 1, 1e-3, 1.0),
    ],
)
def test_common_gain(tiny_backbone, share, n, length, gain):
    like = fresh(tiny_backbone, r=32, sites=("v",), layers=(0,))
    weight = tiny_backbone.site_weight("blocks.0.attn.v").norm().item()
    adapters = with_common_part(share, n, length * weight)
    assert common_gain(adapters, like, tiny_backbone) == pytest.approx(gain, rel=1e-4)


def test_empty_ranks_do_not_change_the_gain(tiny_backbone):
    like, weight = fresh(tiny_backbone, r=32, sites=("v",), layers=(0,)), tiny_backbone.site_weight("blocks.0.attn.v")
    for share, gain in ((0.01, 5.0), (0.006, 1.0)):
        adapters = with_common_part(share, 20, 1e-3 * weight.norm().item())
        for padding in (16, 64):
            padded = []
            for adapter in adapters:
                lora_A, lora_B, scaling = adapter.factors["blocks.0.attn.v"]
                lora_A = torch.cat([lora_A, torch.zeros(padding, 32)])
                lora_B = torch.cat([lora_B, torch.zeros(32, padding)], dim=1)
                padded.append(Adapter({"blocks.0.attn.v": LoRAFactors(lora_A, lora_B, scaling)}))
            assert common_gain(padded, like, tiny_backbone) == pytest.approx(gain, rel=1e-4)


def test_ranks_and_sites_may_differ(tiny_backbone, make_adapter):
    one = make_adapter(tiny_backbone, seed=1, r=(1, 3), sites=("attn.q", "attn.v"))
    two = make_adapter(tiny_backbone, seed=2, r=4, sites=("attn.v", "mlp.fc1"), head=False)
    like = fresh(tiny_backbone, r=16, sites=("q", "v", "fc1", "fc2"))
    before = like.factors()
    warm = start_factors([one, two], like, tiny_backbone, gain=2.0)
    torch.testing.assert_close(update(warm, "blocks.1.attn.q"), one.delta("blocks.1.attn.q"), rtol=1e-4, atol=1e-5)
    both = one.delta("blocks.1.attn.v") + two.delta("blocks.1.attn.v")
    torch.testing.assert_close(update(warm, "blocks.1.attn.v"), both, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(update(warm, "blocks.2.mlp.fc1"), two.delta("blocks.2.mlp.fc1"), rtol=1e-4, atol=1e-5)
    # what no adapter says is left as it was: whole sites, and ranks beyond the sum of the adapters'
    for site in ("blocks.0.mlp.fc2", "blocks.2.mlp.fc2"):
        assert all(torch.equal(a, b) for a, b in zip(warm.factors()[site][:2], before[site][:2], strict=True))
    rank = one.ranks["blocks.1.attn.q"]
    assert torch.equal(warm.factors()["blocks.1.attn.q"].lora_A[rank:], before["blocks.1.attn.q"].lora_A[rank:])
    assert all(torch.equal(a, b) for s in before for a, b in zip(like.factors()[s][:2], before[s][:2], strict=True))


def test_factors_are_balanced(tiny_backbone, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=i) for i in range(3)]
    warm = start_factors(adapters, fresh(tiny_backbone, r=4, lora_alpha=4), tiny_backbone, gain=2.0)
    lora_A, lora_B, _ = warm.factors()["blocks.0.attn.v"]
    torch.testing.assert_close(lora_A.norm(dim=1), lora_B.norm(dim=0), rtol=1e-4, atol=1e-5)


def test_shared_knowledge_outgrows_what_is_private(tiny_backbone):
    """Adapters = one shared update seen through random subspaces; the more of them, the closer the sum comes."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(32, 2, generator=g) @ torch.randn(2, 32, generator=g)
    site, likeness = "blocks.0.attn.v", []
    for n in (4, 16, 64):
        adapters = []
        for _ in range(n):
            lora_A = torch.randn(4, 32, generator=g) / 32**0.5
            adapters.append(Adapter({site: LoRAFactors(lora_A, shared @ lora_A.T, 1.0)}))
        like = fresh(tiny_backbone, r=2, sites=("v",), layers=(0,))
        found = update(start_factors(adapters, like, tiny_backbone, gain=4.5), site)
        likeness.append(torch.cosine_similarity(found.flatten(), shared.flatten(), dim=0).item())
    assert likeness[0] < likeness[1] < likeness[2]
    assert likeness[2] > 0.9


@pytest.mark.parametrize(
    ("pool", "gain", "message"),
    [
        ([], 4.5, "`adapters` must hold at least one"),
        (None, 0.0, "`gain` must be positive and finite, got 0.0"),
        (None, torch.inf, "got inf"),
    ],
)
def test_bad_arguments(tiny_backbone, make_adapter, pool, gain, message):
    pool = [make_adapter(tiny_backbone)] if pool is None else pool
    with pytest.raises(ValueError, match=message):
        start_factors(pool, fresh(tiny_backbone), tiny_backbone, gain=gain)


def test_adapters_of_another_width(tiny_backbone):
    other = Adapter({"blocks.0.attn.q": LoRAFactors(torch.ones(2, 16), torch.ones(16, 2), 1.0)})
    with pytest.raises(ValueError, match=r"`adapters` must fit the model.*\(16, 16\).*\[32, 32\]"):
        start_factors([other], fresh(tiny_backbone), tiny_backbone, gain=1.0)


def test_one_adapter_from_many_without_images(tiny_backbone, make_adapter, tmp_path):
    adapters = [make_adapter(tiny_backbone, seed=i, head=False) for i in range(3)]
    for adapter in adapters:
        adapter.save(tmp_path / adapter.name)
    made = warm_start(tmp_path, base=tiny_backbone, r=8, lora_alpha=2.0, gain=2.0, layers=(0, 2), name="mine")
    assert (made.name, made.head, made.base_model) == ("mine", None, "tiny")
    assert {site.split(".")[1] for site in made.sites} == {"0", "2"}
    for site in made.sites:
        mean = sum(a.delta(site) for a in adapters) / 3
        torch.testing.assert_close(made.delta(site), 2.0 * mean, rtol=1e-4, atol=1e-5)
    again = warm_start(adapters[::-1], base=tiny_backbone, r=8, gain=2.0, layers=(0, 2))
    for site in made.sites:
        torch.testing.assert_close(again.delta(site), made.delta(site), rtol=1e-4, atol=1e-5)


def test_the_base_of_a_warm_start(tiny_backbone, make_adapter, build_vit):
    from lorarecycle import Backbone

    adapter = make_adapter(tiny_backbone)
    wide = Backbone(build_vit(embed_dim=48), name="wide")
    with pytest.raises(ValueError, match="must fit backbone 'wide'"):
        warm_start(adapter, base=wide)
    with pytest.raises(ValueError, match="`base` must be given"):
        warm_start(Adapter(adapter.factors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` must be at least 1, got 0"),
        ({"lora_alpha": -1.0}, "`lora_alpha` must be positive and finite, got -1.0"),
        ({"sites": ("query",)}, r"`sites` must name some of .*, got \('query',\)"),
        ({"layers": ()}, "`layers` must name at least one block"),
        ({"layers": (0, 9)}, r"`layers` must be some of 0 to 2, got \(0, 9\)"),
        ({"gain": -2.0}, "`gain` must be positive and finite, got -2.0"),
    ],
)
def test_bad_settings(tiny_backbone, make_adapter, options, message):
    with pytest.raises(ValueError, match=message):
        warm_start(make_adapter(tiny_backbone), base=tiny_backbone, **options)


def test_adapters_that_do_not_fit_are_left_out_where_that_is_asked_for(tiny_backbone, make_adapter, caplog):
    fitting = [make_adapter(tiny_backbone, seed=i) for i in range(2)]
    other = Adapter({"blocks.0.attn.q": LoRAFactors(torch.ones(2, 16), torch.ones(16, 2), 1.0)}, name="narrow")
    for strict in (None, True):
        with pytest.raises(ValueError, match="narrow"):
            warm_start([*fitting, other], base=tiny_backbone, strict=strict)
    made = warm_start([*fitting, other], base=tiny_backbone, strict=False)
    assert "left out, as it does not fit" in caplog.text
    assert made.digest() == warm_start(fitting, base=tiny_backbone).digest()
    with pytest.raises(ValueError, match="must hold one that fits 'tiny', got none"):
        warm_start([other], base=tiny_backbone, strict=False)
