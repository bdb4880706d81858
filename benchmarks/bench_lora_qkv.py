"""`lora_qkv` at qkv of a ViT: against the bare product, plain, compiled and folded PyTorch, PEFT.

On CUDA the time on the device, of calls in a CUDA graph; on a CPU the time that a call takes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lorarecycle.kernels import lora_qkv, reference

RANKS = (4, 16)


@pytest.fixture(params=RANKS, ids=lambda rank: f"rank{rank}")
def rank(request):
    return request.param


@pytest.fixture
def inputs(model, device, dtype, rank):
    generator = torch.Generator().manual_seed(0)
    D = model.width

    def random(*shape):
        return (torch.randn(shape, generator=generator) * D**-0.5).to(device, dtype)

    return (
        random(model.batch, model.tokens, D),
        random(3 * D, D),
        random(3 * D),
        random(3, rank, D).float(),
        random(3 * D, rank).float(),
    )


def _work(model, dtype, rank, passes=1):
    """Bytes and floating-point operations of the product, its low-rank part included."""
    M, D = model.batch * model.tokens, model.width
    return {
        "bytes": passes * dtype.itemsize * (4 * M * D + 3 * D * D),
        "flops": passes * 2 * M * D * (3 * D + 6 * rank),
    }


def _peft_layer(weight, bias, lora_A, lora_B):
    """PEFT's layer on q, k and v each, as it adapts a ViT whose projections are separate: three outputs."""
    from peft.tuners.lora import Linear

    layers, r = [], lora_A.shape[1]
    for i in range(3):
        rows = slice(i * weight.shape[1], (i + 1) * weight.shape[1])
        base = torch.nn.Linear(weight.shape[1], weight.shape[1], device=weight.device, dtype=weight.dtype)
        base.weight.data, base.bias.data = weight[rows].clone(), bias[rows].clone()
        base.requires_grad_(False)
        try:
            layer = Linear(base, "default", r=r, lora_alpha=r)
        except TypeError:  # newer versions take one configuration
            from peft import LoraConfig

            layer = Linear(base, "default", config=LoraConfig(r=r, lora_alpha=r), r=r, lora_alpha=r)
        layer.lora_A["default"].weight.data = lora_A[i].clone()
        layer.lora_B["default"].weight.data = lora_B[rows].clone()
        layers.append(layer.to(weight.device, weight.dtype))
    factors = [f for layer in layers for f in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    return (lambda x: [layer(x) for layer in layers]), factors


class _Folded(torch.autograd.Function):
    """The folded form in plain PyTorch: weights and dx as ours, the factors' gradients as products of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor
    ) -> torch.Tensor:
        S, R, K = lora_A.shape
        folded = torch.baddbmm(weight.view(S, -1, K).float(), lora_B.view(S, -1, R), lora_A).view(-1, K).to(x.dtype)
        ctx.save_for_backward(x, folded, lora_A, lora_B)
        return torch.nn.functional.linear(x, folded, bias)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, folded, lora_A, lora_B = ctx.saved_tensors
        S, R, K = lora_A.shape
        x_rows, dy_rows = x.reshape(-1, K), dy.reshape(-1, dy.shape[-1])
        by_segment = dy_rows.view(len(dy_rows), S, -1).transpose(0, 1)  # [S, M, N / S]
        h = (x_rows @ lora_A.to(x.dtype).view(S * R, K).T).view(-1, S, R).transpose(0, 1)
        dh = torch.bmm(by_segment, lora_B.to(x.dtype).view(S, -1, R)).transpose(0, 1).reshape(-1, S * R)
        d_lora_B = torch.bmm(by_segment.transpose(1, 2), h).reshape(lora_B.shape)
        d_lora_A = (dh.T @ x_rows).view(S, R, K)
        return (dy_rows @ folded).view_as(x), None, None, d_lora_A.to(lora_A.dtype), d_lora_B.to(lora_B.dtype)


def _eager(x, weight, bias, lora_A, lora_B):
    return reference.lora_qkv(x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype))


FORMS = ["ours", "bare", "eager", "compiled", "folded", "peft"]


def _form(form, inputs, compile_plain):
    """The callable of a form and its trainable factors."""
    x, weight, bias, lora_A, lora_B = inputs
    if form == "bare":
        return (lambda: torch.nn.functional.linear(x, weight, bias)), []
    if form == "peft":
        pytest.importorskip("peft")
        layer, factors = _peft_layer(weight, bias, lora_A, lora_B)
        return (lambda: layer(x)), factors
    op = {"ours": lora_qkv, "eager": _eager, "folded": _Folded.apply}.get(form) or compile_plain(_eager)
    return (lambda: op(x, weight, bias, lora_A, lora_B)), [lora_A, lora_B]


def _assert_right(form, inputs, compile_plain):
    """No time is worth anything where the result is wrong: output and gradients of one image against float64."""
    if form in ("bare", "peft"):
        return
    results = []
    for tensors, name in ((inputs, form), ([t.double() for t in inputs], "eager")):
        leaves = [t.detach().requires_grad_(i not in (1, 2)) for i, t in enumerate([tensors[0][:1], *tensors[1:]])]
        run, factors = _form(name, leaves, compile_plain)
        y = run()
        results.append([y, *torch.autograd.grad(y.double().square().sum(), [leaves[0], *factors])])
    for got, wanted in zip(*results, strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if inputs[0].dtype == torch.float32 else 2e-2), f"relative error {error:.1e}"


def _group(what, model, rank):
    return f"lora_qkv {what} {model.name}" + ("" if rank == RANKS[0] else f", rank {rank}")


@pytest.mark.parametrize("form", FORMS)
def bench_forward(form, model, rank, inputs, dtype, measure, benchmark, compile_plain):
    benchmark.group = _group("forward", model, rank)
    run, _ = _form(form, inputs, compile_plain)
    with torch.no_grad():
        measure(run, **_work(model, dtype, rank))


@pytest.mark.parametrize("form", FORMS)
def bench_forward_and_backward(form, model, rank, inputs, dtype, measure, benchmark, grad, compile_plain):
    benchmark.group = _group("forward and backward", model, rank)
    _assert_right(form, inputs, compile_plain)
    for tensor in (inputs[0], *inputs[3:]):
        tensor.requires_grad_()
    run, factors = _form(form, inputs, compile_plain)
    measure(grad(run, [inputs[0], *factors]), **_work(model, dtype, rank, passes=2))
