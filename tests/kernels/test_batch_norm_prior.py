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


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.medium
def test_triton(shape, layout, dtype, device, assert_close):
    _check("triton", device, shape, dtype, layout, assert_close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp(shape, layout, dtype, cpp_backend, assert_close):
    _check("cpp", "cpu", shape, dtype, layout, assert_close)


def _run_layer(op, x, residual, channels, **options):
    """Output, loss and the gradients of both together."""
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    if residual is not None:
        options["residual"] = inputs[1]
    y, loss = op(inputs[0], *channels, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)  # NCHW, whatever x is
    return y, loss, *torch.autograd.grad((y * dy).sum() + 1.3 * loss, inputs)


def _check_layer(
    backend,
    device,
    shape,
    dtype,
    layout,
    assert_close,
    affine=True,
    activation="none",
    residual=False,
    op=batch_norm_with_prior,
):
    x, *channels = (t.to(device) for t in _inputs(shape, dtype, FORMATS[layout]))
    if affine:
        channels += [channels[0] + 0.5, channels[0] * 2]
    added = torch.linspace(-9, 9, x.numel(), device=device).view(shape).to(x) if residual else None  # NCHW
    with use_backend(backend):
        got = _run_layer(op, x, added, channels, activation=activation)
    wide = x.double(), added if added is None else added.double(), [t.double() for t in channels]
    expected = _run_layer(reference.batch_norm_with_prior, *wide, activation=activation)
    if activation == "relu6":  # which side of 6 a value is on is lost where its 16-bit form is 6
        z = _run_layer(reference.batch_norm_with_prior, *wide)[0]
        clear = ((z - 6).abs() > 8 * torch.finfo(dtype).eps).double()
        got, expected = ([*both[:2], *(grad * clear.to(grad) for grad in both[2:])] for both in (got, expected))
    assert [t.dtype for t in got] == [dtype, torch.float32, *[dtype] * (1 + residual)]
    assert got[0].stride() == x.stride()
    loss_tolerance, tolerance = TOLERANCES[dtype]
    limits = (tolerance, loss_tolerance, tolerance, tolerance)
    for name, value, wanted, limit in zip(("y", "loss", "dx", "dresidual"), got, expected, limits, strict=False):
        assert_close(value, wanted, limit, name)


EPILOGUES = [("none", False), ("relu", False), ("relu6", False), ("none", True), ("relu", True), ("relu6", True)]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.medium
def test_layer_triton(shape, layout, dtype, device, assert_close):
    _check_layer("triton", device, shape, dtype, layout, assert_close)


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.medium
def test_epilogue_triton(layout, activation, residual, dtype, device, assert_close):
    _check_layer("triton", device, (5, 72, 3, 7), dtype, layout, assert_close, True, activation, residual)


def _without_compiler(x, *channels, activation="none", residual=None):
    channels += (None,) * (4 - len(channels))
    args = (x, *channels, residual, 1e-5, activation, True, "cpp")
    return torch.ops.lorarecycle.batch_norm_prior(*args)[:2]


@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
def test_epilogue_without_a_compiler(activation, residual, monkeypatch, assert_close):
    monkeypatch.setattr(cpp, "_loaded", False)
    shape, layout = (5, 6, 3, 7), "channels_last"
    options = (True, activation, residual, _without_compiler)
    _check_layer("auto", "cpu", shape, torch.float32, layout, assert_close, *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("activation", "residual"), EPILOGUES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 40, 40), (1, 130, 70, 30)], ids=str)
@pytest.mark.medium
def test_layer_cpp(shape, layout, activation, residual, dtype, cpp_backend, assert_close):
    _check_layer("cpp", "cpu", shape, dtype, layout, assert_close, True, activation, residual)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("backend", ["triton", "cpp", "reference"])
def test_a_mean_of_ten_thousand_deviations(backend, layout, request, assert_close):
    """Mean 1000, deviation 0.1. What float32 leaves of the input is the map; its statistics are exact to rounding."""
    request.getfixturevalue({"cpp": "cpp_backend", "triton": "device"}.get(backend, "request"))
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn((6, 40, 12, 12), generator=generator) * 0.1 + 1000).to(target).to(memory_format=FORMATS[layout])
    channels = torch.full((40,), 999.0, device=target), torch.full((40,), 0.02, device=target)
    with use_backend(backend):
        got = _run_layer(batch_norm_with_prior, x, None, channels, activation="relu")
    wide = [t.double() for t in channels]
    expected = _run_layer(reference.batch_norm_with_prior, x.double(), None, wide, activation="relu")
    # float32 holds a mean near 1000 to 3e-5, a 3000th of the deviation that the gradient multiplies
    for name, value, wanted, limit in zip(("y", "loss", "dx"), got, expected, (1e-4, 1e-5, 1e-3), strict=True):
        assert_close(value, wanted, limit, name)


@pytest.mark.medium
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_results_repeat_bit_by_bit(backend, layout, request):
    request.getfixturevalue({"triton": "device", "cpp": "cpp_backend"}[backend])
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x, *channels = (t.to(target) for t in _inputs((4, 40, 7, 9), torch.bfloat16, FORMATS[layout]))
    with use_backend(backend):
        once, again = (_run_layer(batch_norm_with_prior, x, x.flip(0), channels, activation="relu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.medium
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_compiled_as_one_graph(backend, request, assert_close):
    request.getfixturevalue({"triton": "device", "cpp": "cpp_backend"}[backend])
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x, *channels = (t.to(target) for t in _inputs((2, 6, 5, 7), torch.float32, FORMATS["channels_last"]))
    compiled = torch.compile(batch_norm_with_prior, backend="aot_eager", fullgraph=True)
    with use_backend(backend):
        got, wanted = (
            _run_layer(op, x, x.flip(0), channels, activation="relu6") for op in (compiled, batch_norm_with_prior)
        )
    for i, (value, expected) in enumerate(zip(got, wanted, strict=True)):
        assert_close(value, expected, 1e-6, f"result {i}")


def test_second_derivatives_are_refused(cpp_backend):
    x, *channels = _inputs((2, 6, 5, 7), torch.float32, FORMATS["nchw"])
    with use_backend("cpp"):
        loss = batch_norm_prior(x.requires_grad_(), *channels)
    with pytest.raises(NotImplementedError, match="batch_norm_prior has first derivatives only"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("backend", ["triton", "cpp", "plain", "reference"])
def test_layer_without_weight_and_bias(backend, request, monkeypatch, assert_close):
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    op = batch_norm_with_prior
    if backend == "plain":
        monkeypatch.setattr(cpp, "_loaded", False)
        backend, op = "auto", _without_compiler
    _check_layer(backend, target, (2, 6, 5, 7), torch.float32, "channels_last", assert_close, affine=False, op=op)


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
        return torch.ops.lorarecycle.batch_norm_prior(*inputs, None, None, None, 0.0, "none", False, "cpp")[1]

    with use_backend("reference" if backend == "plain" else backend):
        loss, dx = _run(plain if backend == "plain" else batch_norm_prior, x, running_mean, running_var)
    assert loss.isnan()
    assert dx.isnan().all()


def test_without_a_compiler_inside_a_compiled_function(monkeypatch, assert_close):
    """A traced op cannot choose again, so its CPU implementation has a plain form of its own."""
    monkeypatch.setattr(cpp, "_loaded", False)
    x, running_mean, running_var = _inputs((2, 6, 5, 7), torch.float32, FORMATS["nchw"])
    x.requires_grad_()
    args = (x, running_mean, running_var, None, None, None, 0.0, "none", False, "cpp")
    _, loss, _ = torch.ops.lorarecycle.batch_norm_prior(*args)
    (dx,) = torch.autograd.grad(1.3 * loss, x)
    for got, wanted in zip((loss, dx), _run(reference.batch_norm_prior, x, running_mean, running_var), strict=True):
        assert_close(got, wanted, 3e-6, "plain")


@pytest.mark.medium
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("form", ["statistics", "layer", "residual"])
@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_opcheck(backend, form, layout, request):
    request.getfixturevalue({"triton": "device", "cpp": "cpp_backend"}[backend])
    target = request.getfixturevalue("device") if backend == "triton" else "cpu"
    x, *channels = (t.to(target) for t in _inputs((2, 3, 4, 4), torch.float32, FORMATS[layout]))
    residual = x.flip(0).requires_grad_() if form == "residual" else None
    layer = form != "statistics"
    channels += [channels[1] + 1, channels[0]] if layer else [None, None]
    args = (x.requires_grad_(), *channels, residual, 1e-5, "relu" if layer else "none", layer, backend)
    torch.library.opcheck(torch.ops.lorarecycle.batch_norm_prior.default, args)


def test_gradcheck_of_the_references():
    x, running_mean, running_var = (t.double() for t in _inputs((2, 3, 2, 3), torch.float32, FORMATS["nchw"]))
    assert torch.autograd.gradcheck(
        lambda t, r: reference.batch_norm_with_prior(
            t, running_mean, running_var, running_var + 1, running_mean, activation="relu", residual=r
        ),
        (x.requires_grad_(), x.detach().flip(0).requires_grad_()),
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


def test_errors_of_the_layer_name_activation_and_residual():
    x, channels = torch.zeros(2, 3, 4, 4), torch.zeros(3)
    with pytest.raises(ValueError, match="`activation` must be one of none, relu, relu6, got 'silu'"):
        batch_norm_with_prior(x, channels, channels, activation="silu")
    with pytest.raises(ValueError, match=r"`residual` must have the shape of `x`, \[2, 3, 4, 4\], got \[2, 3, 4, 5\]"):
        batch_norm_with_prior(x, channels, channels, residual=torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"`residual` must have the dtype of `x`, torch.float32, got torch.float16"):
        batch_norm_with_prior(x, channels, channels, residual=x.half())
