"""Adapter and Head: what they accept, what they derive."""

import copy
import math
import pickle

import pytest
import torch

from lorarecycle.adapters import value
from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors


def pair(r=2, out=6, width=6, scaling=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoRAFactors(torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), scaling)


def test_delta_is_scaling_times_B_times_A():
    lora_A, lora_B, scaling = pair()
    adapter = Adapter({"blocks.0.attn.q": LoRAFactors(lora_A, lora_B, scaling)})
    torch.testing.assert_close(adapter.delta("blocks.0.attn.q"), 0.5 * lora_B @ lora_A)


def test_sites_come_in_model_order_with_their_own_ranks():
    sites = ["blocks.10.attn.q", "blocks.2.mlp.fc2", "blocks.2.attn.v", "blocks.2.attn.q"]
    adapter = Adapter({site: pair(r=i + 1) for i, site in enumerate(sites)})
    assert adapter.sites == (*reversed(sites[1:]), sites[0])
    assert adapter.ranks["blocks.2.attn.v"] == 3


def test_half_precision_factors_are_kept_as_float32():
    lora_A, lora_B, scaling = pair()
    adapter = Adapter({"blocks.0.attn.q": LoRAFactors(lora_A.half(), lora_B.bfloat16(), scaling)})
    assert adapter.factors["blocks.0.attn.q"].lora_A.dtype == torch.float32


def small(head=True, site="blocks.0.attn.q", **changes):
    """An adapter of one site with a head of ones."""
    return Adapter({site: pair(**changes)}, Head(torch.ones(2, 6)) if head is True else head)


NAMED = Head(torch.ones(2, 6), None, ("cat", "dog"))
DIGESTS = pytest.mark.parametrize("digest", [Adapter.digest, Adapter.weights_digest], ids=["digest", "weights_digest"])


@DIGESTS
@pytest.mark.parametrize(
    "other",
    [
        small(site="blocks.0.attn.k"),
        small(seed=1),
        small(scaling=0.25),
        small(head=None),
        small(head=Head(torch.zeros(2, 6))),
        small(head=Head(torch.ones(2, 6), torch.ones(2))),
        small(head=Head(torch.ones(2, 6), pool="mean")),
    ],
    ids=["site", "factors", "scaling", "no head", "weight", "bias", "pool"],
)
def test_digests_follow_content(digest, other):
    assert digest(other) != digest(small())


@DIGESTS
def test_digests_do_not_follow_the_name(digest):
    renamed = Adapter(small().factors, Head(torch.ones(2, 6)), name="two", base_model="x")
    assert digest(renamed) == digest(small())


def test_class_names_are_in_one_digest_only():
    assert small(head=NAMED).digest() != small().digest()
    assert small(head=NAMED).weights_digest() == small().weights_digest()


@DIGESTS
def test_digests_are_computed_once(digest, monkeypatch):
    adapter, read, calls = small(), value._bytes, []
    monkeypatch.setattr(value, "_bytes", lambda tensor: calls.append(1) or read(tensor))
    assert digest(adapter) == digest(adapter)
    assert adapter.digest() != adapter.weights_digest()
    assert len(calls) == len(list(adapter._tensors())), "each tensor once, for both digests"


@DIGESTS
def test_a_tensor_written_to_is_seen(digest):
    """Factors in float32 share memory with what they were made of."""
    lora_A, lora_B, scaling = pair()
    adapter = Adapter({"blocks.0.attn.q": LoRAFactors(lora_A, lora_B, scaling)})
    before = digest(adapter)
    lora_A.add_(1)
    assert digest(adapter) != before


@DIGESTS
def test_digests_of_tensors_without_a_version_counter(digest):
    with torch.inference_mode():
        made = small()
        assert made.factors["blocks.0.attn.q"].lora_A.is_inference()
        assert digest(made) == digest(small())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_digests_of_copies(twin):
    adapter = small(head=NAMED)
    assert twin(adapter).digest() == adapter.digest() == twin(adapter).digest()


def test_another_head_makes_another_adapter():
    adapter = small(head=NAMED)
    digest = adapter.digest()
    assert isinstance(adapter.with_head(None), Adapter)
    assert adapter.with_head(None).digest() != digest == adapter.digest()


def test_head_defaults_and_logits():
    head = Head(torch.eye(3, 4), pool="token")
    assert head.class_names == ("0", "1", "2")
    torch.testing.assert_close(head(torch.arange(4.0).half()[None]), torch.tensor([[0.0, 1.0, 2.0]]))


def test_repr_tells_what_it_is():
    adapter = Adapter({"blocks.0.attn.q": pair()}, Head(torch.ones(2, 6)), "base", name="mine")
    assert repr(adapter) == "Adapter('mine', 1 sites, r=[2], 2 classes, base='base')"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, r"`factors` of 'x' must hold at least one site"),
        ({"blocks.0.attn.qkv": pair()}, r"must be keyed by sites .* got 'blocks.0.attn.qkv'"),
        (
            {"blocks.0.attn.q": LoRAFactors(torch.ones(2, 6), torch.ones(6, 3), 1.0)},
            r"of the same rank, got \[2, 6\]",
        ),
        (
            {"blocks.0.attn.q": LoRAFactors(torch.full((2, 6), math.nan), torch.ones(6, 2), 1.0)},
            r"lora_A at blocks.0.attn.q of 'x' must be finite, got 12 NaN or infinite",
        ),
        (
            {"blocks.0.attn.q": LoRAFactors(torch.ones(2, 6), torch.full((6, 2), math.inf), 1.0)},
            r"lora_B at blocks.0.attn.q of 'x' must be finite",
        ),
        ({"blocks.0.attn.q": pair(scaling=math.inf)}, r"scaling at blocks.0.attn.q of 'x' must be finite"),
    ],
    ids=["none", "unknown site", "two ranks", "A", "B", "scaling"],
)
def test_bad_factors_are_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        Adapter(factors, name="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"`weight` of a head must be \[classes, features\], got \[3\]"),
        (
            (torch.ones(3, 4), torch.ones(2)),
            r"`bias` of a head must have one value per class \(3\), got \[2\]",
        ),
        ((torch.ones(3, 4), None, ("a", "b")), r"`class_names` must name the head's 3 classes, got 2"),
        ((torch.ones(3, 4), None, (), "max"), r"`pool` must be one of .* got 'max'"),
        ((torch.full((3, 4), math.nan),), r"the head's `weight` must be finite"),
        ((torch.ones(3, 4), torch.full((3,), -math.inf)), r"the head's `bias` must be finite"),
    ],
    ids=["one axis", "bias", "names", "pool", "weight not finite", "bias not finite"],
)
def test_bad_heads_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Head(*arguments)
