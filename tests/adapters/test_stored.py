"""Adapters that stay in their files: the same values, and little in memory."""

import gc
import weakref

import pytest
import torch

from lorarecycle import Adapter, recycle, warm_start
from lorarecycle.adapters import stored
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.adapters.facts import facts_of
from lorarecycle.adapters.load_many import load_all
from lorarecycle.adapters.stored import StoredAdapter, head_of, is_dead, shapes_of, signature_of
from lorarecycle.meta.sums import sum_updates

FAST = {"inversion": {"pictures": 12}, "meta": {"steps": 2}, "quiet": True}


@pytest.fixture
def folder(tiny_backbone, make_adapter, tmp_path):
    for i in range(5):
        make_adapter(tiny_backbone, seed=i, r=1 + i, head=i != 3).save(tmp_path / "many" / f"a{i}")
    return tmp_path / "many"


def test_it_is_the_adapter_that_was_read(folder):
    for one, other in zip(load_all(folder).adapters, load_all(folder, stored=True).adapters, strict=True):
        assert isinstance(other, StoredAdapter)
        assert isinstance(other, Adapter)
        assert (one.digest(), one.weights_digest()) == (other.digest(), other.weights_digest())
        assert (one.sites, one.ranks, one.name, one.base_model) == (
            other.sites,
            other.ranks,
            other.name,
            other.base_model,
        )
        assert torch.equal(one.delta("blocks.1.attn.v"), other.delta("blocks.1.attn.v"))
        assert (one.head is None) == (other.head is None)
        assert other.facts == facts_of(one)
        for ask in (head_of, is_dead, shapes_of, signature_of):
            assert ask(one) == ask(other)
        assert other.with_head(None).head is None


def test_few_stay_in_memory(folder):
    adapters = load_all(folder, stored=True).adapters
    alive = [weakref.ref(adapter.whole().factors["blocks.0.attn.q"].lora_A) for adapter in adapters]
    gc.collect()
    assert sum(ref() is not None for ref in alive) == stored.KEPT
    reads = []
    object.__setattr__(adapters[-1], "_read", lambda: reads.append(1))
    assert adapters[-1].factors
    assert not reads, "it was used just now"


def test_facts_need_no_reading(folder, tiny_backbone):
    adapters = load_all(folder, stored=True).adapters
    for adapter in adapters:
        object.__setattr__(adapter, "_read", lambda: pytest.fail("read again"))
        tiny_backbone.check(adapter)
        assert not is_dead(adapter)
        assert (head_of(adapter) is None) == (adapter.name == "adapter-3")
        assert signature_of(adapter)
        assert adapter.ranks
        assert "StoredAdapter" in repr(adapter)


def test_files_that_change_meanwhile_are_an_error(folder, tiny_backbone, make_adapter):
    adapters = load_all(folder, stored=True).adapters
    make_adapter(tiny_backbone, seed=99).save(folder / "a0")
    with pytest.raises(ValueError, match="files of adapter 'adapter-0' must stay as they are while they are used"):
        _ = adapters[0].factors


@pytest.mark.medium
def test_the_result_is_the_same_in_memory_and_from_files(folder, tiny_backbone):
    read = load_all(folder).adapters
    one, other = (recycle(source, base=tiny_backbone, **FAST) for source in (read, folder))
    assert one.digest() == other.digest()
    assert warm_start(read, base=tiny_backbone).digest() == warm_start(folder, base=tiny_backbone).digest()


def test_a_factor_of_a_qkv_layer_keeps_no_more_than_itself(folder):
    for lora_A, lora_B, _ in load_all(folder).adapters[4].factors.values():
        for tensor in (lora_A, lora_B):
            assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_adapters_on_a_gpu(tiny_backbone, make_adapter):
    here = make_adapter(tiny_backbone)
    moved = {site: LoRAFactors(A.cuda(), B.cuda(), scaling) for site, (A, B, scaling) in here.factors.items()}
    there = Adapter(moved, here.head.to(torch.device("cuda")))
    assert signature_of(there) == pytest.approx(signature_of(here), rel=1e-9)
    assert there.digest() == here.digest()
    both = [sum_updates(one, {here.sites[0]: (32, 32)}).sites[here.sites[0]] for one in ([here, here], [here, there])]
    assert torch.equal(both[0].dense(), both[1].dense())
