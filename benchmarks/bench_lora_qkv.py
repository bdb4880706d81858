"""`lora_qkv` at qkv of a ViT, rank 4: against the bare product, plain and compiled PyTorch, PEFT."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import lora_qkv, reference

RANK = 4


@pytest.fixture
def inputs(model, device, dtype):
    generator = torch.Generator().manual_seed(0)
    D = model.width

    def random(*shape):
        return (torch.randn(shape, generator=generator) * D**-0.5).to(device, dtype)

    return (
        random(model.batch, model.tokens, D),
        random(3 * D, D),
        random(3 * D),
        random(3, RANK, D),
        random(3 * D, RANK),
    )


def _work(model, dtype, passes=1):
    """Bytes and floating-point operations of the product, its low-rank part included."""
    M, D = model.batch * model.tokens, model.width
    return {
        "bytes": passes * dtype.itemsize * (4 * M * D + 3 * D * D),
        "flops": passes * 2 * M * D * (3 * D + 6 * RANK),
    }


def _peft_layer(weight, bias, lora_A, lora_B):
    """PEFT's layer on q, k and v each, as it adapts a ViT whose projections are separate: three outputs."""
    from peft.tuners.lora import Linear

    layers = []
    for i in range(3):
        rows = slice(i * weight.shape[1], (i + 1) * weight.shape[1])
        base = torch.nn.Linear(weight.shape[1], weight.shape[1], device=weight.device, dtype=weight.dtype)
        base.weight.data, base.bias.data = weight[rows].clone(), bias[rows].clone()
        base.requires_grad_(False)
        try:
            layer = Linear(base, "default", r=RANK, lora_alpha=RANK)
        except TypeError:  # newer versions take one configuration
            from peft import LoraConfig

            layer = Linear(base, "default", config=LoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
        layer.lora_A["default"].weight.data = lora_A[i].clone()
        layer.lora_B["default"].weight.data = lora_B[rows].clone()
        layers.append(layer.to(weight.device, weight.dtype))
    factors = [f for layer in layers for f in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    return (lambda x: [layer(x) for layer in layers]), factors


FORMS = ["ours", "bare", "eager", "compiled", "peft"]


def _form(form, inputs, compile_plain):
    """The callable of a form and its trainable factors."""
    x, weight, bias, lora_A, lora_B = inputs
    if form == "bare":
        return (lambda: torch.nn.functional.linear(x, weight, bias)), []
    if form == "peft":
        pytest.importorskip("peft")
        layer, factors = _peft_layer(weight, bias, lora_A, lora_B)
        return (lambda: layer(x)), factors
    op = {"ours": lora_qkv, "eager": reference.lora_qkv}.get(form) or compile_plain(reference.lora_qkv)
    return (lambda: op(x, weight, bias, lora_A, lora_B)), [lora_A, lora_B]


@pytest.mark.parametrize("form", FORMS)
def bench_forward(form, model, inputs, dtype, measure, benchmark, compile_plain):
    benchmark.group = f"lora_qkv forward {model.name}"
    run, _ = _form(form, inputs, compile_plain)
    with torch.no_grad():
        measure(run, **_work(model, dtype))


@pytest.mark.parametrize("form", FORMS)
def bench_forward_and_backward(form, model, inputs, dtype, measure, benchmark, grad, compile_plain):
    benchmark.group = f"lora_qkv forward and backward {model.name}"
    for tensor in (inputs[0], *inputs[3:]):
        tensor.requires_grad_()
    run, factors = _form(form, inputs, compile_plain)
    measure(grad(run, [inputs[0], *factors]), **_work(model, dtype, passes=2))
