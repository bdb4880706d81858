"""Attention kinds agree, and xformers' absence is said."""

import importlib.util
import sys
import types

import pytest
import torch

from lorarecycle import Backbone
from lorarecycle.vit import attention
from lorarecycle.vit.attention import attend


def heads(device: str = "cpu", dtype: torch.dtype = torch.float32, d: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, d, generator=generator).to(device, dtype) for n in (5, 7, 7)]


def test_sdpa_is_softmax_attention():
    q, k, v = heads()
    expected = (q @ k.transpose(-2, -1) / 32**0.5).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, "sdpa"), expected.transpose(1, 2).flatten(2))


def test_written_out_in_bfloat16_it_is_the_same(monkeypatch):
    exact = [x.requires_grad_() for x in heads(dtype=torch.float64)]
    y = attend(*exact, "sdpa")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    expected = y, *torch.autograd.grad(y, exact, dy.double())
    fused = []
    for stored in (0, 2 * 3 * 5 * 7):
        monkeypatch.setattr(attention, "MAX_STORED", stored)
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        with torch.profiler.profile() as profile:
            y = attend(*inputs, "sdpa")
        fused.append(any("flash_attention" in event.name for event in profile.events()))
        for ours, wanted in zip((y, *torch.autograd.grad(y, inputs, dy.bfloat16())), expected, strict=True):
            torch.testing.assert_close(ours.double(), wanted, rtol=3e-2, atol=3e-2)
    assert fused == [True, False]


def test_xformers_gets_its_own_order_of_axes(monkeypatch):
    seen = []

    def stand_in(q, k, v):  # as xformers documents it: [B, M, H, d] in and out
        seen.append(q.shape)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    ops = types.SimpleNamespace(memory_efficient_attention=stand_in)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = heads()
    with pytest.raises(ValueError, match="`attention` must be 'sdpa' on cpu, got 'xformers'"):
        attend(q, k, v, "xformers")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(attend(q, k, v, "xformers"), attend(q, k, v, "sdpa"))
    assert seen == [(2, 5, 3, 32)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers runs on CUDA devices only")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xformers_equals_sdpa(dtype):
    pytest.importorskip("xformers")
    q, k, v = heads("cuda", dtype)
    torch.testing.assert_close(attend(q, k, v, "xformers"), attend(q, k, v, "sdpa"), rtol=2e-2, atol=2e-2)


def test_bad_kinds(tiny_vit, monkeypatch):
    with pytest.raises(ValueError, match="`attention` must be 'sdpa' or 'xformers', got 'flash'"):
        Backbone(tiny_vit, attention="flash")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'xformers', which is missing; `pip install 'lorarecycle\[xformers\]'`"):
        Backbone(tiny_vit, attention="xformers")
