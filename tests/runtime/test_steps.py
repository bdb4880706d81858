"""Compiled blocks: a few graphs for all layers and adapters, no break, no recompilation, the same results."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from lorarecycle import BatchNormPrior, InversionConfig, MetaConfig, Surrogate, invert, meta_train
from lorarecycle.inversion.invert import Inverter
from lorarecycle.meta.loss import query_loss
from lorarecycle.runtime import steps
from lorarecycle.runtime.steps import check_compile, compiling, repeated
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


def test_inversion_compiles_two_halves_of_a_block(tiny_backbone, make_adapter):
    adapters = [make_adapter(tiny_backbone, seed=seed) for seed in range(3)]
    invert_them = Inverter(tiny_backbone, config=INVERSION, prior=small_prior(), compile=True)
    counts = []
    for adapter in adapters:
        surrogate = invert_them(adapter, quiet=True)
        counts.append(graphs())
    # halves in training and, for the answers, in inference; pruned and whole; the last block's class token alone
    assert counts[0] < 12
    assert counts == counts[:1] * 3, "another adapter of the same shape needs no other graph"
    eager = invert(tiny_backbone, adapters[-1], config=INVERSION, prior=small_prior(), compile=False, quiet=True)
    assert graphs() == counts[0]
    difference = (surrogate.images.int() - eager.images.int()).abs().float()
    assert difference.mean() < 1, "in steps of 1/255; Adam turns rounding errors of small gradients into whole steps"
    assert torch.equal(surrogate.labels, eager.labels)


def test_a_deeper_model_needs_no_more_graphs(tiny_backbone):
    images, counts = torch.randn(2, 3, 32, 32), []
    for depth in (2, 3):
        model = tiny_backbone.clone()
        model.vit.blocks, model.num_blocks = model.vit.blocks[:depth], depth
        torch._dynamo.reset()
        counters.clear()
        with compiling(True, model.device), torch.no_grad():
            model(images)
        counts.append(graphs())
    assert counts[0] == counts[1] > 0


def surrogates(data) -> list[Surrogate]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(2):
        logits = torch.randn(len(data), len(data.class_names), generator=generator)
        scores = torch.rand(len(data), 16, generator=generator)
        made.append(
            Surrogate(data.images, data.labels, logits, data.class_names, 8, None, scores, f"a{i}", f"digest{i}")
        )
    return made


def test_meta_training_compiles_no_more_than_it_needs(tiny_backbone, tiny_data):
    made = surrogates(tiny_data)
    compiled_run = meta_train(tiny_backbone, made, config=META, compile=True, quiet=True)
    first = graphs()
    assert first < 8, "episodes within an adapter and across adapters share them"
    again = meta_train(tiny_backbone, made, config=META, seed=1, compile=True, quiet=True)
    assert graphs() == first, "so does another meta-LoRA"
    assert not torch.equal(again.losses, compiled_run.losses)
    eager_run = meta_train(tiny_backbone, made, config=META, compile=False, quiet=True)
    torch.testing.assert_close(compiled_run.losses, eager_run.losses, rtol=1e-3, atol=1e-4)


def test_gradients_through_compiled_blocks(tiny_backbone):
    generator = torch.Generator().manual_seed(0)
    lora = LoRA.random(tiny_backbone, generator=generator)
    images = torch.randn(9, 3, 32, 32, generator=generator)
    targets = torch.eye(3).repeat_interleave(2, 0)
    gradients = []
    for mode in (False, True):
        lora.zero_grad()
        with compiling(mode, torch.device("cpu")):
            query_loss(tiny_backbone, lora, images, None, targets, META).backward()
        gradients.append([p.grad.clone() for p in lora.parameters()])
    assert graphs() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_off_on_the_cpu_and_for_few_steps_unless_asked():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [check_compile(c, cpu) for c in (None, False, True)] == [False, False, True]
    assert [check_compile(c, gpu) for c in (None, False, True)] == [True, False, True]
    assert [check_compile(c, gpu, steps=100) for c in (None, False, True)] == [False, False, True]
    assert check_compile(None, gpu, steps=100_000)
    with pytest.raises(ValueError, match="`compile` must be True, False or None, got 3"):
        check_compile(3, cpu)
    with pytest.warns(DeprecationWarning, match="`compile='reduce-overhead'` is called `compile=True`"):
        assert check_compile("reduce-overhead", cpu)


def test_more_forms_than_dynamo_keeps_by_default(monkeypatch):
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: original(f, backend="eager", fullgraph=True, dynamic=False)
    )
    steps._compiled.cache_clear()
    double = repeated(lambda x: x * 2)
    with compiling(True, torch.device("cpu")):
        for n in range(2, 14):
            assert double(torch.ones(n)).sum() == 2 * n
    assert graphs() == 12
    steps._compiled.cache_clear()
