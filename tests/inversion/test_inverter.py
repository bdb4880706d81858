"""One adapter after another over the same buffers: nothing of an earlier one shows in a later one."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from lorarecycle import BatchNormPrior, InversionConfig, Surrogate, invert
from lorarecycle.inversion.invert import Inverter

CONFIG = InversionConfig(
    prior=None, init="noise", images_per_class=3, batch_size=6, steps=12, prune={1: 0.5}, schedule="cosine", lr=0.1
)


@pytest.mark.medium
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


def test_two_kinds_of_batches_stay_ready(tiny_backbone, make_adapter):
    """On a GPU each holds the memory of its graphs: an earlier kind goes at once, without the garbage collector."""
    make = Inverter(tiny_backbone, config=replace(CONFIG, steps=1))
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    gc.disable()
    try:
        for n_classes in (3, 4, 5):
            make(make_adapter(tiny_backbone, n_classes=n_classes), quiet=True)
            alive.update(make._optimisers.values())
        assert len(alive) == 2
        del make
        assert not len(alive)
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_change_nothing(tiny_backbone, make_adapter):
    backbone, adapter = tiny_backbone.clone().to("cuda"), make_adapter(tiny_backbone)
    config = InversionConfig(**{**vars(CONFIG), "steps": 20})
    images = [
        invert(backbone, adapter, config=config, compile=False, graphs=graphs, quiet=True).images
        for graphs in (False, True)
    ]
    assert (images[0].int() - images[1].int()).abs().float().mean() < 0.5


@pytest.mark.medium
def test_curves_tell_what_the_optimisation_went_through(tiny_backbone, make_adapter, tmp_path):
    torch.manual_seed(0)
    prior = BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
    config = InversionConfig(
        init="noise", images_per_class=3, batch_size=6, steps=150, patience=50, lr=0.1, roll=0, flip=False
    )
    made = invert(tiny_backbone, make_adapter(tiny_backbone), config=config, prior=prior, quiet=True)
    assert made.curves.shape == (9, 2, 75)  # every second step
    doubts, unnatural = made.curves.unbind(1)
    ended = doubts.isnan()
    assert torch.equal(ended, unnatural.isnan())
    assert not ended[:, 0].any()
    last = [row[~row.isnan()][-1] for row in doubts]
    assert torch.stack(last).mean() < doubts[:, 0].mean(), "the teacher doubts less at the end"
    assert torch.equal(unnatural[:1].nan_to_num().expand(6, -1), unnatural[:6].nan_to_num()), "one prior for a batch"
    assert torch.equal(
        Surrogate.load(made.save(tmp_path / "s.safetensors")).curves.nan_to_num(), made.curves.nan_to_num()
    )
    assert invert(tiny_backbone, make_adapter(tiny_backbone), config={"steps": 0}, quiet=True).curves is None
