"""One adapter after another over the same buffers: nothing of an earlier one shows in a later one."""

import pytest
import torch

from lorarecycle import InversionConfig, invert
from lorarecycle.inversion.invert import Inverter

CONFIG = InversionConfig(
    prior=None, init="noise", images_per_class=3, batch_size=6, steps=12, prune={1: 0.5}, schedule="cosine", lr=0.1
)


def test_a_later_adapter_is_as_if_it_were_the_first(tiny_backbone, make_adapter):
    others = ({"sites": ("attn.k",)}, {"n_classes": 4}, {})
    adapters = [make_adapter(tiny_backbone, seed=i, **other) for i, other in enumerate(({}, *others))]
    before = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    make = Inverter(tiny_backbone, config=CONFIG)
    for i, adapter in enumerate(adapters):
        one, alone = (
            make(adapter, seed=i, quiet=True),
            invert(tiny_backbone, adapter, config=CONFIG, seed=i, quiet=True),
        )
        for name in ("images", "labels", "teacher_logits", "scores", "kept"):
            assert torch.equal(getattr(one, name), getattr(alone, name)), name
        assert one.class_names == adapter.head.class_names
    for name, value in tiny_backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_change_nothing(tiny_backbone, make_adapter):
    backbone, adapter = tiny_backbone.clone().to("cuda"), make_adapter(tiny_backbone)
    config = InversionConfig(**{**vars(CONFIG), "steps": 20})
    images = [
        invert(backbone, adapter, config=config, compile=False, graphs=graphs, quiet=True).images
        for graphs in (False, True)
    ]
    assert (images[0].int() - images[1].int()).abs().float().mean() < 0.5
