"""Host time of one call of each op, on tensors so small that the work is nothing: what a call costs before it works.

"ours" is the public function, "op" the same operation through PyTorch's dispatcher, as compiled graphs call it,
"reference" the plain form. On CUDA nothing waits for the device between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lorarecycle.kernels import batch_norm_with_prior, cls_topk_gather, reference, select_tokens

CUDA = torch.cuda.is_available()
BACKEND = "triton" if CUDA else "cpp"


def _batch_norm_with_prior(form: str, grad: bool, device: str) -> tuple[Callable[[], Any], torch.Tensor]:
    x = torch.randn(2, 64, 4, 4, device=device).to(memory_format=torch.channels_last).requires_grad_(grad)
    channels = [torch.ones(64, device=device) for _ in range(4)]
    if form == "op":
        op = torch.ops.lorarecycle.batch_norm_prior
        return lambda: op(x, *channels, None, 1e-5, "relu", True, BACKEND)[:2], x
    function = batch_norm_with_prior if form == "ours" else reference.batch_norm_with_prior
    return lambda: function(x, *channels, activation="relu"), x


def _cls_topk_gather(form: str, grad: bool, device: str) -> tuple[Callable[[], Any], torch.Tensor]:
    q, k = torch.randn(2, 2, 2, 17, 16, device=device)
    x = torch.randn(2, 17, 32, device=device).requires_grad_(grad)
    if form == "op":
        return lambda: torch.ops.lorarecycle.cls_topk_gather(q, k, x, 4, 1, BACKEND)[:1], x
    function = cls_topk_gather if form == "ours" else reference.cls_topk_gather
    return lambda: function(q, k, x, 4)[:1], x


def _select_tokens(form: str, grad: bool, device: str) -> tuple[Callable[[], Any], torch.Tensor]:
    images = torch.randn(2, 3, 32, 32, device=device).requires_grad_(grad)
    kept = torch.tensor([[0, 3], [1, 2]], device=device)
    weight, bias = torch.randn(32, 3, 16, 16, device=device), torch.randn(32, device=device)
    args = (images, kept, weight, bias, torch.randn(4, 32, device=device), torch.randn(1, 32, device=device))
    if form == "op" and not CUDA:
        pytest.skip("on a CPU `select_tokens` is its reference")
    functions = {"op": torch.ops.lorarecycle.select_tokens, "ours": select_tokens}
    function = functions.get(form, reference.select_tokens)
    return lambda: (function(*args),), images


OPS = {
    "batch_norm_with_prior": _batch_norm_with_prior,
    "cls_topk_gather": _cls_topk_gather,
    "select_tokens": _select_tokens,
}


def _time(benchmark, run: Callable[[], Any], calls: int = 50) -> None:
    def many() -> None:
        for _ in range(calls):
            run()

    many()
    benchmark.extra_info["calls"] = calls  # first: of a run that is stopped, too, a round is so many calls
    benchmark.pedantic(many, rounds=30, iterations=1, setup=torch.cuda.synchronize if CUDA else None)
    if benchmark.stats:
        print(f"{benchmark.group}: {benchmark.name}: {benchmark.stats.stats.median / calls * 1e6:.2f} us a call")


@pytest.mark.parametrize("form", ["ours", "op", "reference"])
@pytest.mark.parametrize("name", OPS)
def bench_without_gradient(name, form, device, benchmark):
    benchmark.group = f"{name}, host, no gradient"
    run, _ = OPS[name](form, False, device)
    with torch.no_grad():
        _time(benchmark, run)


@pytest.mark.parametrize("form", ["ours", "op", "reference"])
@pytest.mark.parametrize("name", OPS)
def bench_forward_for_a_gradient(name, form, device, benchmark):
    benchmark.group = f"{name}, host, forward for a gradient"
    run, _ = OPS[name](form, True, device)
    _time(benchmark, run)


@pytest.mark.parametrize("form", ["ours", "op", "reference"])
@pytest.mark.parametrize("name", OPS)
def bench_forward_and_backward(name, form, device, benchmark):
    benchmark.group = f"{name}, host, forward and backward"
    run, leaf = OPS[name](form, True, device)
    grads = [torch.ones_like(part) for part in run()]
    _time(benchmark, lambda: torch.autograd.grad(run(), leaf, grads))
