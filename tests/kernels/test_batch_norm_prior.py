"""`batch_norm_prior`, alone and with its layer: Triton and C++ against the float64 reference in both memory formats."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import batch_norm_prior, batch_norm_with_prior, cpp, reference, use_backend

# Relative to the largest value, loss and gradient: statistics are float32 whatever the map is.
TOLERANCES = {torch.float32: (1e-6, 3e-6), torch.float16: (1e-6, 2e-3), torch.bfloat16: (1e-6, 1e-2)}
SHAPES = [(2, 3, 5, 7), (3, 70, 9, 9), (1, 32, 1, 1), (2, 3, 41, 53), (4, 33, 1, 3)]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def _inputs(shape, dtype, memory_format, shift=3.0):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 2 + shift).to(dtype).to(memory_format=memory_format)
    return x, torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator)


def _run(op, x, running_mean, running_var):
    x = x.detach().requires_grad_()
    loss = op(x, running_mean, running_var)
    return loss, torch.autograd.grad(1.3 * loss, x)[0]


def _check(backend, device, shape, dtype, layout, assert_close, shift=3.0, tolerances=None):
    x, running_mean, running_var = (t.to(device) for t in _inputs(shape, dtype, FORMATS[layout], shift))
    with use_backend(backend):
        loss, dx = _run(batch_norm_prior, x, running_mean, running_var)
    expected = _run(reference.batch_norm_prior, x.double(), running_mean, running_var)
    assert loss.dtype == torch.float32
    assert dx.dtype == dtype
    assert dx.stride() == x.stride()
    for name, got, wanted, tolerance in zip(
        ("loss", "dx"), (loss, dx), expected, tolerances or TOLERANCES[dtype], strict=True
    ):
        assert_close(got, wanted, tolerance, name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape, layout, dtype, device, assert_close):
    _check("triton", device, shape, dtype, layout, assert_close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp(shape, layout, dtype, cpp_backend, assert_close):
    _check("cpp", "cpu", shape, dtype, layout, assert_close)


def _run_layer(op, x, running_mean, running_var, *affine):
    """Output, loss and the gradient of both together."""
    x = x.detach().requires_grad_()
    y, loss = op(x, running_mean, running_var, *affine)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)  # NCHW, whatever x is
    return y, loss, torch.autograd.grad((y * dy).sum() + 1.3 * loss, x)[0]


def _check_layer(backend, device, shape, dtype, layout, assert_close, affine=True):
    x, running_mean, running_var = (t.to(device) for t in _inputs(shape, dtype, FORMATS[layout]))
    weight_bias = (running_mean + 0.5, running_mean * 2) if affine else ()
    with use_backend(backend):
        got = _run_layer(batch_norm_with_prior, x, running_mean, running_var, *weight_bias)
    expected = _run_layer(reference.batch_norm_with_prior, x.double(), running_mean, running_var, *weight_bias)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype]
    assert got[0].stride() == got[2].stride() == x.stride()
    loss_tolerance, tolerance = TOLERANCES[dtype]
    for name, value, wanted, limit in zip(
        ("y", "loss", "dx"), got, expected, (tolerance, loss_tolerance, tolerance), strict=True
    ):
        assert_close(value, wanted, limit, name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_triton(shape, layout, dtype, device, assert_close):
    _check_layer("triton", device, shape, dtype, layout, assert_close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 40, 40), (1, 130, 70, 30)], ids=str)
def test_layer_cpp(shape, layout, dtype, cpp_backend, assert_close):
    _check_layer("cpp", "cpu", shape, dtype, layout, assert_close)


@pytest.mark.parametrize("backend", ["triton", "cpp", "plain", "reference"])
def test_layer_without_weight_and_bias(backend, request, monkeypatch, assert_close):
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    if backend == "plain":
        monkeypatch.setattr(cpp, "_loaded", False)
    backend = "cpp" if backend == "plain" else backend
    _check_layer(backend, target, (2, 6, 5, 7), torch.float32, "channels_last", assert_close, affine=False)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_layer_of_which_only_the_output_or_only_the_loss_is_used(backend, request, assert_close):
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x, running_mean, running_var = (t.to(target) for t in _inputs((2, 6, 5, 7), torch.float32, FORMATS["nchw"]))
    x.requires_grad_()
    for part in (0, 1):
        with use_backend(backend):
            out = batch_norm_with_prior(x, running_mean, running_var, eps=0.1)[part]
        wanted = reference.batch_norm_with_prior(x.double(), running_mean, running_var, eps=0.1)[part]
        assert_close(
            torch.autograd.grad(out.square().sum(), x)[0], torch.autograd.grad(wanted.square().sum(), x)[0], 1e-5, "dx"
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_does_not_matter(threads, cpp_backend):
    x, running_mean, running_var = _inputs((5, 64, 30, 30), torch.float32, FORMATS["channels_last"])
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            with use_backend("cpp"):
                found.append(_run(batch_norm_prior, x, running_mean, running_var))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_a_mean_far_from_zero_does_not_cancel(backend, layout, request, assert_close):
    """A mean of 300 standard deviations: the naive E[x^2] - E[x]^2 loses the variance in float32."""
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    request.getfixturevalue("cpp_backend" if backend == "cpp" else "device")
    _check(backend, target, (3, 40, 12, 12), torch.float32, layout, assert_close, 600.0, (1e-6, 1e-4))


@pytest.mark.parametrize("backend", ["triton", "cpp", "reference"])
def test_non_contiguous(backend, request, assert_close):
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x, running_mean, running_var = (t.to(target) for t in _inputs((2, 6, 5, 7), torch.float32, FORMATS["nchw"]))
    x = x.transpose(2, 3)[..., ::2]
    with use_backend(backend):
        actual = _run(batch_norm_prior, x, running_mean, running_var)
    for got, wanted in zip(actual, _run(reference.batch_norm_prior, x, running_mean, running_var), strict=True):
        assert_close(got, wanted, 3e-6, backend)


@pytest.mark.parametrize("backend", ["triton", "cpp", "reference"])
def test_statistics_that_agree_have_no_gradient(backend, request):
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x = torch.ones((2, 3, 4, 4), device=target)
    with use_backend(backend):
        loss, dx = _run(batch_norm_prior, x, torch.ones(3, device=target), torch.zeros(3, device=target))
    assert loss == 0
    assert not dx.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("backend", ["triton", "cpp", "plain", "reference"])
def test_a_map_that_holds_no_numbers_is_not_hidden(backend, layout, bad, request, monkeypatch):
    """Loss and gradient are NaN, as in plain PyTorch, not a number that an optimiser would follow."""
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    if backend == "plain":
        monkeypatch.setattr(cpp, "_loaded", False)
    x, running_mean, running_var = (t.to(target) for t in _inputs((2, 40, 3, 3), torch.float32, FORMATS[layout]))
    x[1, 1, 2, 0] = bad

    def plain(*inputs):
        return torch.ops.lorarecycle.batch_norm_prior(*inputs, None, None, "cpp")[1]

    with use_backend("reference" if backend == "plain" else backend):
        loss, dx = _run(plain if backend == "plain" else batch_norm_prior, x, running_mean, running_var)
    assert loss.isnan()
    assert dx.isnan().all()


def test_without_a_compiler_inside_a_compiled_function(monkeypatch, assert_close):
    """A traced op cannot choose again, so its CPU implementation has a plain form of its own."""
    monkeypatch.setattr(cpp, "_loaded", False)
    x, running_mean, running_var = _inputs((2, 6, 5, 7), torch.float32, FORMATS["nchw"])
    x.requires_grad_()
    _, loss, _, _ = torch.ops.lorarecycle.batch_norm_prior(x, running_mean, running_var, None, None, "cpp")
    (dx,) = torch.autograd.grad(1.3 * loss, x)
    for got, wanted in zip((loss, dx), _run(reference.batch_norm_prior, x, running_mean, running_var), strict=True):
        assert_close(got, wanted, 3e-6, "plain")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_opcheck(backend, affine, layout, request):
    request.getfixturevalue({"triton": "device", "cpp": "cpp_backend"}[backend])
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x, running_mean, running_var = (t.to(target) for t in _inputs((2, 3, 4, 4), torch.float32, FORMATS[layout]))
    scale, shift = (running_var + 1, running_mean) if affine else (None, None)
    args = (x.requires_grad_(), running_mean, running_var, scale, shift, backend)
    torch.library.opcheck(torch.ops.lorarecycle.batch_norm_prior.default, args)


def test_gradcheck_of_the_references():
    x, running_mean, running_var = (t.double() for t in _inputs((2, 3, 2, 3), torch.float32, FORMATS["nchw"]))
    assert torch.autograd.gradcheck(
        lambda t: reference.batch_norm_with_prior(t, running_mean, running_var, running_var + 1, running_mean),
        x.requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda t: reference.batch_norm_prior(t, running_mean, running_var), x.requires_grad_()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"`x` must be \[B, C, H, W\] and not empty, got shape \[2, 3, 4\]"),
        (
            {"x": torch.zeros(0, 3, 4, 4)},
            r"`x` must be \[B, C, H, W\] and not empty, got shape \[0, 3, 4, 4\]",
        ),
        ({"x": torch.zeros(2, 3, 4, 4).int()}, r"`x` must have a floating-point dtype, got torch.int32"),
        ({"running_mean": torch.zeros(4)}, r"`running_mean` must be \[3\] to fit `x`, got shape \[4\]"),
        (
            {"running_var": torch.zeros(3, device="meta")},
            r"`running_var` must be on the device of `x`, cpu, got meta",
        ),
        (
            {"running_var": torch.zeros(3).int()},
            r"`running_var` must have a floating-point dtype, got torch.int32",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_errors_name_argument_rule_and_value(changes, message):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "running_mean": torch.zeros(3), "running_var": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        batch_norm_prior(**(arguments | changes))


def test_errors_of_the_layer_name_weight_and_bias():
    x, channels = torch.zeros(2, 3, 4, 4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"`weight` must be \[3\] to fit `x`, got shape \[2\]"):
        batch_norm_with_prior(x, channels, channels, torch.ones(2))
    with pytest.raises(ValueError, match=r"`bias` must have a floating-point dtype, got torch.int64"):
        batch_norm_with_prior(x, channels, channels, torch.ones(3), torch.ones(3).long())
