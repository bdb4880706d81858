"""Sums of many updates in bounded memory, against sums in float64."""

import pytest
import torch

from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.meta import sums
from lorarecycle.meta.sums import UpdateSum, held_bytes, in_parts
from lorarecycle.meta.warm_start import common_gain, start_factors
from lorarecycle.vit.lora import LoRA


def parts(n: int, out: int, width: int, r: int = 4) -> list[LoRAFactors]:
    g = torch.Generator().manual_seed(0)
    return [
        LoRAFactors(torch.randn(r, width, generator=g), torch.randn(out, r, generator=g), 0.5 + i % 3) for i in range(n)
    ]


@pytest.mark.parametrize("n", [1, 5, 12, 300])
@pytest.mark.parametrize(("out", "width"), [(48, 48), (96, 48), (48, 64)])
def test_a_sum_is_what_products_in_float64_give(n, out, width):
    added = parts(n, out, width)
    whole = sum(p.scaling * (p.lora_B.double() @ p.lora_A.double()) for p in added)
    found = UpdateSum(out, width)
    for part in added:
        found.add(part)
    assert (found.matrix is not None) == (4 * n > 48)
    assert len(found._parts) * 4 <= 256 + 48, "what waits is bounded"
    values = torch.linalg.svdvals(whole)
    U, S, Vh = found.top(7)
    k = len(S)
    assert k == min(7, 4 * n)
    assert (S.double() - values[:k]).abs().max() < 1e-5 * values[0]
    near, right = whole @ Vh.double().T, torch.randn(width, 3)
    assert (near - U.double() * S.double()).norm() < 1e-4 * values[0]
    torch.testing.assert_close(found.times(right), whole @ right.double(), rtol=1e-4, atol=1e-3)
    assert found.squared_length() == pytest.approx(whole.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(found.dense().double(), whole, rtol=1e-4, atol=1e-3)


@pytest.mark.medium
def test_the_tolerance_stated_at_width_768():
    added = parts(2500, 768, 768)
    found, whole = UpdateSum(768, 768), torch.zeros(768, 768, dtype=torch.float64)
    for part in added:
        found.add(part)
        whole += part.scaling * (part.lora_B.double() @ part.lora_A.double())
    _, S, _ = found.top(16)
    values = torch.linalg.svdvals(whole)
    worst = float((S.double() - values[:16]).abs().max() / values[0])
    assert worst < 1e-5


def test_sites_in_parts(monkeypatch):
    monkeypatch.setattr(sums, "TOGETHER", 1)
    monkeypatch.setattr(sums, "AT_ONCE", 4 * 150)
    shapes = {"a": (5, 10), "b": (5, 10), "c": (20, 20), "d": (1, 1)}
    assert [list(part) for part in in_parts(shapes)] == [["a", "b"], ["c"], ["d"]]
    assert in_parts({}) == []


@pytest.mark.parametrize(("out", "width"), [(48, 48), (96, 48), (600, 300)])
def test_what_is_held_is_what_is_stated(out, width):
    """Also of updates that are parts of larger tensors."""
    found, most = UpdateSum(out, width), 0
    for i in range(200):
        wide = torch.zeros(3 * out, 4)
        found.add(LoRAFactors(torch.zeros(4, width), wide[out : 2 * out], 1.0))
        held = [tensor for part in found._parts for tensor in (part.lora_A, part.lora_B)]
        held += [] if found.matrix is None else [found.matrix]
        most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in held))
        if i == 0:
            assert most == 16 * (out + width)
    assert 0.8 * held_bytes(out, width) < most <= held_bytes(out, width) + 16 * (out + width)


def test_parts_change_nothing(tiny_backbone, make_adapter, monkeypatch):
    adapters = [make_adapter(tiny_backbone, seed=i, r=1 + i % 3, size=0.1) for i in range(30)]
    like = LoRA.random(tiny_backbone, r=8, sites=("q", "k", "v"), generator=torch.Generator().manual_seed(0))
    whole, gain = start_factors(adapters, like, tiny_backbone), common_gain(adapters, like, tiny_backbone)
    monkeypatch.setattr(sums, "AT_ONCE", 1)
    apart = start_factors(adapters, like, tiny_backbone)
    assert common_gain(adapters, like, tiny_backbone) == pytest.approx(gain, rel=1e-9)
    mean = sum(adapter.delta("blocks.1.attn.q") for adapter in adapters) / 30
    U, S, Vh = torch.linalg.svd(gain * mean)
    for site in whole.scalings:
        one, other = (lora.to_adapter(name="x", like=tiny_backbone).delta(site) for lora in (whole, apart))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    found = whole.to_adapter(name="x", like=tiny_backbone).delta("blocks.1.attn.q")
    torch.testing.assert_close(found, (U[:, :8] * S[:8]) @ Vh[:8], rtol=1e-3, atol=1e-4)
