"""Leave-one-out in weight space, against updates that are multiplied out."""

import pytest
import torch

from lorarecycle.meta.influence import leave_one_out


def flat(adapter, sites):
    return torch.cat([adapter.delta(s).double().flatten() for s in sites])


def test_it_is_what_multiplied_out_updates_give(tiny_backbone, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=i, r=1 + i) for i in range(4)]
    meta = make_adapter(tiny_backbone, seed=9, r=3, head=False)
    updates = torch.stack([flat(a, meta.sites) for a in adapters])
    mean, target = updates.mean(0), flat(meta, meta.sites)
    for i, found in enumerate(leave_one_out(adapters, meta)):
        without = updates[[j for j in range(4) if j != i]].mean(0)
        assert found.moves_mean == pytest.approx(float((without - mean).norm() / mean.norm()), rel=1e-6)
        assert found.likeness == pytest.approx(float(torch.cosine_similarity(updates[i], target, dim=0)), abs=1e-6)


def test_an_adapter_without_a_site_counts_as_zero_there(tiny_backbone, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=0), make_adapter(tiny_backbone, seed=1, sites=("attn.k",))]
    found = leave_one_out(adapters, make_adapter(tiny_backbone, seed=2))
    assert found[1].likeness == 0
    assert found[0].moves_mean == pytest.approx(1) == found[1].moves_mean


def test_one_alone_and_none(tiny_backbone, make_adapter):
    adapter = make_adapter(tiny_backbone)
    (found,) = leave_one_out([adapter], adapter)
    assert found.moves_mean is None
    assert found.likeness == pytest.approx(1)
    with pytest.raises(ValueError, match="`adapters` must hold at least one adapter, got none"):
        leave_one_out([], adapter)
