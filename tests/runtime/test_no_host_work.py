"""Steps that a CUDA graph is to hold: no value is read by the host, no tensor is made of Python numbers.

Both show on a CPU too, as operations: reading is `_local_scalar_dense` (or `nonzero`, whose size is a value), a tensor
made of Python numbers is `lift_fresh`. The optimiser's own step is left out: on a CPU it reads its counter.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lorarecycle.kernels import use_backend
from torch.utils._python_dispatch import TorchDispatchMode

from lorarecycle import BatchNormPrior, InversionConfig, MetaConfig, Surrogate, invert, meta_train, tune
from lorarecycle.runtime import graphs

FORBIDDEN = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Watch(TorchDispatchMode):
    """Counts what operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def every_step_watched(monkeypatch) -> Iterator[Watch]:
    watch = Watch()
    original = graphs.Step.__call__

    def watched(self) -> None:
        with watch:
            original(self)

    monkeypatch.setattr(graphs.Step, "__call__", watched)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    op = importlib.import_module("lorarecycle.kernels.select_tokens")
    monkeypatch.setattr(op, "_check", lambda *args: None)  # on a GPU it does not wait for positions to be checked
    yield watch
    assert watch.seen["convolution"] + watch.seen["addmm"] + watch.seen["mm"] > 0, "nothing was watched"


def small_prior() -> BatchNormPrior:
    torch.manual_seed(0)
    return BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("latent_size", [None, 16])
def test_inversion(tiny_backbone, make_adapter, monkeypatch, latent_size, backend):
    config = InversionConfig(
        init="noise", images_per_class=2, batch_size=6, steps=4, prune={1: 0.5}, latent_size=latent_size
    )
    with every_step_watched(monkeypatch) as watch, use_backend(backend):
        invert(tiny_backbone, make_adapter(tiny_backbone), config=config, prior=small_prior(), quiet=True)
    assert not watch.seen.keys() & FORBIDDEN


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5}, {"guide_weight": 0.5}, {"distance": "cosine"}])
def test_meta_training(tiny_backbone, tiny_data, monkeypatch, settings):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(tiny_data), len(tiny_data.class_names), generator=generator)
    scores = torch.rand(len(tiny_data), 16, generator=generator)
    made = [
        Surrogate(tiny_data.images, tiny_data.labels, logits, tiny_data.class_names, 8, None, scores, f"a{i}", f"d{i}")
        for i in range(2)
    ]
    config = MetaConfig(
        **{"steps": 4, "n_way": 3, "n_shot": 1, "n_query": 2, "init": "random", "guide_weight": 0.0} | settings
    )
    with every_step_watched(monkeypatch) as watch:
        meta_train(tiny_backbone, made, config=config, quiet=True)
    assert not watch.seen.keys() & FORBIDDEN


def test_tuning(tiny_backbone, tiny_data, monkeypatch):
    with every_step_watched(monkeypatch) as watch:
        tune(tiny_backbone, tiny_data, config={"epochs": 1, "batch_size": 7}, quiet=True)
    assert not watch.seen.keys() & FORBIDDEN


def test_the_watch_sees_what_it_is_for():
    with Watch() as watch:
        x = torch.tensor([1.0, 2.0])
        x[x > 1].sum().item()
    assert {"lift_fresh", "_local_scalar_dense"} <= watch.seen.keys()
    assert watch.seen.keys() & {"nonzero", "index"}
