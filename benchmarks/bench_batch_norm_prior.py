"""`batch_norm_prior` at layers of a ResNet-50: against the permute-copy form and `var_mean`; with the layer itself:
against PyTorch's layer and the permute-copy form."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import batch_norm_prior, batch_norm_with_prior, reference

CUDA = torch.cuda.is_available()
LAYERS = {"layer1": (256, 56), "layer3": (1024, 14), "layer4": (2048, 7)}


def _permute_copy(x, running_mean, running_var):
    """As the published inversion codes compute it: a permuted copy of the map, then its variance by rows."""
    rows = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).float()
    mean, var = x.float().mean([0, 2, 3]), rows.var(1, unbiased=False)
    return (mean - running_mean).norm() + (var - running_var).norm()


FORMS = ["ours", "permute_copy", "var_mean", "permute_copy_compiled"]


@pytest.fixture
def op(form, compile_plain):
    forms = {"ours": batch_norm_prior, "permute_copy": _permute_copy, "var_mean": reference.batch_norm_prior}
    return forms.get(form) or compile_plain(_permute_copy)


@pytest.fixture(params=["nchw", "channels_last"])
def layout(request):
    return torch.channels_last if request.param == "channels_last" else torch.contiguous_format


@pytest.fixture(params=LAYERS)
def inputs(request, layout, device, dtype):
    channels, size = LAYERS[request.param]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((100 if CUDA else 8, channels, size, size), generator=generator)
    x = x.to(device, dtype).to(memory_format=layout)
    return x, torch.zeros(channels, device=device), torch.ones(channels, device=device)


@pytest.mark.parametrize("form", FORMS)
def bench_forward(form, op, inputs, measure, benchmark):
    benchmark.group = f"batch_norm_prior forward {list(inputs[0].shape)} {inputs[0].stride()[1] == 1}"
    with torch.no_grad():
        measure(lambda: op(*inputs), bytes=inputs[0].nbytes)


@pytest.mark.parametrize("form", FORMS)
def bench_forward_and_backward(form, op, inputs, measure, benchmark, grad):
    benchmark.group = f"batch_norm_prior forward and backward {list(inputs[0].shape)} {inputs[0].stride()[1] == 1}"
    x = inputs[0].requires_grad_()
    measure(grad(lambda: op(*inputs), [x]), bytes=3 * x.nbytes)


def _layer_and_permute_copy(x, running_mean, running_var):
    y = torch.nn.functional.batch_norm(x, running_mean, running_var)
    return y, _permute_copy(x, running_mean, running_var)


@pytest.mark.parametrize("form", ["ours", "permute_copy", "layer_and_op"])
def bench_with_layer(form, inputs, measure, benchmark):
    """The frozen layer and its prior, forward and backward; "layer_and_op" is PyTorch's layer beside our op."""
    benchmark.group = f"batch_norm_with_prior {list(inputs[0].shape)} {inputs[0].stride()[1] == 1}"
    x = inputs[0].requires_grad_()
    dy = torch.randn_like(x)
    forms = {
        "ours": batch_norm_with_prior,
        "permute_copy": _layer_and_permute_copy,
        "layer_and_op": lambda *args: (torch.nn.functional.batch_norm(*args), batch_norm_prior(*args)),
    }

    def step():
        y, loss = forms[form](*inputs)
        torch.autograd.backward([y, loss], [dy, torch.ones_like(loss)])
        x.grad = None

    measure(step, bytes=5 * x.nbytes)


def _plain_block(x, residual, running_mean, running_var):
    y, loss = _layer_and_permute_copy(x, running_mean, running_var)
    return torch.relu(y + residual), loss


def _fused_block(x, residual, running_mean, running_var):
    return batch_norm_with_prior(x, running_mean, running_var, activation="relu", residual=residual)


@pytest.mark.parametrize("form", ["ours", "eager", "compiled"])
def bench_end_of_a_block(form, inputs, measure, benchmark, compile_plain):
    """Layer, prior, residual and ReLU, forward and backward: at least 8 maps' worth of traffic."""
    benchmark.group = f"batch_norm_with_prior, residual, relu {list(inputs[0].shape)} {inputs[0].stride()[1] == 1}"
    x = inputs[0].requires_grad_()
    residual, dy = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    run = {"ours": _fused_block, "eager": _plain_block}.get(form) or compile_plain(_plain_block)

    def step():
        y, loss = run(x, residual, *inputs[1:])
        torch.autograd.backward([y, loss], [dy, torch.ones_like(loss)])
        x.grad = residual.grad = None

    measure(step, bytes=8 * x.nbytes)
