"""Compiled steps: one graph each, no recompilation within a phase, the same results."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from lorarecycle import BatchNormPrior, InversionConfig, MetaConfig, Surrogate, invert, meta_train
from lorarecycle.meta.loss import query_loss
from lorarecycle.runtime.steps import compiled
from lorarecycle.vit.lora import LoRA

pytestmark = pytest.mark.medium

INVERSION = InversionConfig(init="noise", images_per_class=2, batch_size=6, steps=8, prune={1: 0.5}, image_size=32)
META = MetaConfig(steps=6, n_way=3, n_shot=1, n_query=2, sparsity=0.75, init="random", guide_weight=0.0)


@pytest.fixture(autouse=True)
def _fresh_counters() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled since the test began; none of them may come from a break."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def small_prior() -> BatchNormPrior:
    torch.manual_seed(0)
    return BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))


def test_inversion_has_one_graph_before_pruning_and_one_after(tiny_backbone, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=seed) for seed in range(3)]
    for adapter in adapters:
        surrogate = invert(tiny_backbone, adapter, config=INVERSION, prior=small_prior(), compile=True, quiet=True)
        assert graphs() == 2, "another adapter of the same shape needs no other graph"
    eager = invert(tiny_backbone, adapters[-1], config=INVERSION, prior=small_prior(), compile=False, quiet=True)
    assert graphs() == 2
    difference = (surrogate.images.int() - eager.images.int()).abs().float()
    assert difference.mean() < 1, "in steps of 1/255; Adam turns rounding errors of small gradients into whole steps"
    assert torch.equal(surrogate.labels, eager.labels)


def surrogates(data) -> list[Surrogate]:
    generator = torch.Generator().manual_seed(0)
    pools = []
    for i in range(2):
        logits = torch.randn(len(data), len(data.class_names), generator=generator)
        scores = torch.rand(len(data), 16, generator=generator)
        pools.append(
            Surrogate(data.images, data.labels, logits, data.class_names, 8, None, scores, f"a{i}", f"digest{i}")
        )
    return pools


def test_meta_training_has_one_graph(tiny_backbone, tiny_data):
    pools = surrogates(tiny_data)
    compiled_run = meta_train(tiny_backbone, pools, config=META, compile=True, quiet=True)
    assert graphs() == 1, "episodes within an adapter and across adapters share it"
    again = meta_train(tiny_backbone, pools, config=META, seed=1, compile=True, quiet=True)
    assert graphs() == 1, "so does another meta-LoRA"
    assert not torch.equal(again.losses, compiled_run.losses)
    eager_run = meta_train(tiny_backbone, pools, config=META, compile=False, quiet=True)
    torch.testing.assert_close(compiled_run.losses, eager_run.losses, rtol=1e-3, atol=1e-4)


def test_gradients_of_the_compiled_step(tiny_backbone):
    generator = torch.Generator().manual_seed(0)
    lora = LoRA.random(tiny_backbone, generator=generator)
    images = torch.randn(9, 3, 32, 32, generator=generator)
    targets = torch.eye(3).repeat_interleave(2, 0)
    gradients = []
    for mode in (False, True):
        lora.zero_grad()
        step = compiled(query_loss, mode, torch.device("cpu"))
        step(tiny_backbone, lora, images, None, targets, META).backward()
        gradients.append([p.grad.clone() for p in lora.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_off_on_the_cpu_unless_asked():
    cpu = torch.device("cpu")
    assert compiled(query_loss, None, cpu) is query_loss
    assert compiled(query_loss, False, torch.device("cuda")) is query_loss
    assert compiled(query_loss, None, torch.device("cuda")) is compiled(query_loss, True, cpu) is not query_loss
    with pytest.raises(ValueError, match="`compile` must be True, False, None or one of .*, got 'fast'"):
        compiled(query_loss, "fast", cpu)


def test_more_forms_than_dynamo_keeps_by_default(monkeypatch):
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: original(f, backend="eager", fullgraph=True, dynamic=False)
    )
    step = compiled(lambda x: x * 2, True, torch.device("cpu"))
    for n in range(2, 14):
        assert step(torch.ones(n)).sum() == 2 * n
    assert graphs() == 12
