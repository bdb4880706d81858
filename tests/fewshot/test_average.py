"""LoRAs Avg: the exact mean of the updates."""

import pytest
import torch

from lorarecycle.fewshot.methods.average import average


def test_the_mean_of_the_products(tiny_backbone, make_adapter):
    a = make_adapter(tiny_backbone, seed=0, r=2)
    b = make_adapter(tiny_backbone, seed=1, r=3, sites=("attn.q", "attn.k"))
    mean = average([a, b])
    torch.testing.assert_close(
        mean.delta("blocks.1.attn.q"), (a.delta("blocks.1.attn.q") + b.delta("blocks.1.attn.q")) / 2
    )
    torch.testing.assert_close(mean.delta("blocks.1.attn.v"), a.delta("blocks.1.attn.v") / 2)
    torch.testing.assert_close(mean.delta("blocks.1.attn.k"), b.delta("blocks.1.attn.k") / 2)
    assert mean.head is None
    assert tiny_backbone.merge(mean)(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_bad_input(tiny_backbone, make_adapter, build_vit):
    from lorarecycle import Backbone

    with pytest.raises(ValueError, match="`adapters` must hold at least one"):
        average([])
    wide = make_adapter(Backbone(build_vit(embed_dim=48)))
    with pytest.raises(ValueError, match="must be for one base model, got different shapes at blocks.0.attn.q"):
        average([make_adapter(tiny_backbone), wide])
