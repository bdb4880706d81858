"""`lora_qkv`: folded forward and gradients against the float64 reference, compiled form, errors."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import lora_qkv, reference, use_backend

# Relative to the largest value: float32 rounding over the width; roundings of a 16-bit result, weight and factors.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = ("y", "dx", "d_lora_A", "d_lora_B", "d_weight", "d_bias")

# images, tokens, K, outputs of a segment, segments, rank
SIZES = [
    (1, 1, 40, 24, 3, 1),
    (2, 49, 73, 33, 3, 3),
    (1, 197, 64, 64, 2, 4),
    (1, 257, 96, 100, 1, 8),
    (2, 50, 80, 70, 1, 16),
    (1, 49, 48, 40, 3, 17),  # ranks of all segments in one tile, and in several
    pytest.param((1, 49, 136, 40, 3, 64), marks=pytest.mark.medium),
]


def _inputs(size, dtype, device, seed=0):
    B, T, K, N, S, R = size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return [
        random(B, T, K),
        random(S * N, K, scale=K**-0.5),
        random(S * N),
        random(S, R, K, scale=K**-0.5),
        random(S * N, R),
    ]


def _run(op, inputs, scaling, needed=(0, 3, 4)):
    """Output and the gradients of the inputs at `needed`, for a fixed output gradient."""
    inputs = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    y = op(*inputs, scaling)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return [y, *torch.autograd.grad(y, [inputs[i] for i in needed], dy)]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.float16, marks=pytest.mark.medium), torch.bfloat16],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.medium
def test_forward_and_gradients(size, dtype, device, assert_close):
    if dtype == torch.float16 and size[1] > 50:
        pytest.skip("float16 follows the path of bfloat16")
    inputs = _inputs(size, dtype, device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 0.7)
    expected = _run(reference.lora_qkv, [t.double() for t in inputs], 0.7)
    for name, got, wanted in zip(NAMES, actual, expected, strict=False):
        assert got.dtype == dtype
        assert_close(got, wanted, TOLERANCES[dtype], name)


def test_gradients_of_frozen_weights_when_asked(device, assert_close):
    inputs = _inputs((2, 5, 24, 20, 3, 4), torch.float32, device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 1.5, needed=(0, 3, 4, 1, 2))
    expected = _run(reference.lora_qkv, inputs, 1.5, needed=(0, 3, 4, 1, 2))
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        assert_close(got, wanted, TOLERANCES[torch.float32], name)


@pytest.mark.parametrize("needed", [(0,), (3, 4), (3,), (4,)], ids=str)
def test_only_the_gradients_asked_for(needed, device, assert_close):
    inputs = _inputs((2, 5, 24, 20, 3, 4), torch.float32, device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 1.0, needed=needed)
    for got, wanted in zip(actual, _run(reference.lora_qkv, inputs, 1.0, needed=needed), strict=True):
        assert_close(got, wanted, TOLERANCES[torch.float32], str(needed))


@pytest.mark.parametrize("form", ["sliced", "transposed"])
def test_non_contiguous(form, device, assert_close):
    x, *rest = _inputs((3, 20, 36, 20, 3, 4), torch.float32, device)
    x = torch.stack([x, x], dim=-1)[..., 0] if form == "sliced" else x.transpose(0, 1)
    rest[0] = rest[0].T.contiguous().T
    rest[3] = rest[3].T.contiguous().T
    assert not x.is_contiguous()
    with use_backend("triton"):
        actual = _run(lora_qkv, [x, *rest], 1.0)
    expected = _run(reference.lora_qkv, [x, *rest], 1.0)
    for name, got, wanted in zip(NAMES, actual, expected, strict=False):
        assert_close(got, wanted, TOLERANCES[torch.float32], name)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_any_number_of_leading_dimensions(backend, device, assert_close):
    x, *rest = _inputs((4, 3, 24, 20, 3, 4), torch.float32, device)
    with use_backend(backend):
        expected = lora_qkv(x, *rest, 0.5)
        assert_close(lora_qkv(x[1, 2], *rest, 0.5), expected[1, 2], 3e-6, "a vector")
        assert_close(lora_qkv(x[1], *rest, 0.5), expected[1], 3e-6, "a matrix")
        assert_close(lora_qkv(x.view(2, 2, 3, 24), *rest, 0.5).view(4, 3, 60), expected, 3e-6, "four dimensions")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_mixed_ranks_and_no_adapter_on_k(backend, device, assert_close):
    """Zero-padded ranks 4, 0 (none) and 2 give what the merged weights give."""
    x, weight, bias, lora_A, lora_B = _inputs((2, 7, 24, 20, 3, 4), torch.float32, device)
    lora_A[1] = 0
    lora_A[2, 2:] = 0
    lora_B[20:40] = 0
    lora_B[40:, 2:] = 0
    delta = torch.cat([lora_B[20 * i : 20 * i + 20] @ lora_A[i] for i in range(3)])
    with use_backend(backend):
        y = lora_qkv(x, weight, bias, lora_A, lora_B, 0.5)
    assert_close(y, torch.nn.functional.linear(x, weight + 0.5 * delta, bias), 3e-6, "y")
    assert_close(y[..., 20:40], torch.nn.functional.linear(x, weight, bias)[..., 20:40], 3e-6, "k")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors(dtype, device, assert_close):
    x, weight, bias, lora_A, lora_B = _inputs((1, 5, 32, 16, 1, 4), dtype, device)
    masters = [(t.float() * 1.001).requires_grad_() for t in (lora_A, lora_B)]  # on no 16-bit grid
    with use_backend("triton"):
        y = lora_qkv(x, weight, bias, *masters)
    folded = (weight.double() + masters[1].double() @ masters[0][0].double()).to(dtype)
    if device == "cuda" or dtype == torch.float16:  # Triton's interpreter cuts bfloat16 off where a GPU rounds
        assert torch.equal(y, torch.nn.functional.linear(x, folded, bias)), "summed in float32 and rounded once"
    assert_close(y, torch.nn.functional.linear(x, folded, bias), TOLERANCES[dtype], "y")
    y.sum().backward()  # an output gradient of stride 0
    wide = [t.detach().double().requires_grad_() for t in masters]
    reference.lora_qkv(*(t.double() for t in (x, weight, bias)), *wide).sum().backward()
    for master, wanted in zip(masters, wide, strict=True):
        assert master.grad.dtype == torch.float32
        assert_close(master.grad, wanted.grad, TOLERANCES[dtype], "a master's gradient")


def test_factors_of_two_dtypes(device, assert_close):
    x, weight, bias, lora_A, lora_B = _inputs((1, 5, 32, 16, 1, 4), torch.bfloat16, device)
    mixed = [x, weight, bias, lora_A.float(), lora_B]
    with use_backend("triton"):
        actual = _run(lora_qkv, mixed, 1.0)
    assert [got.dtype for got in actual[2:]] == [torch.float32, torch.bfloat16]
    for name, got, wanted in zip(
        NAMES, actual, _run(reference.lora_qkv, [t.double() for t in mixed], 1.0), strict=False
    ):
        assert_close(got, wanted, TOLERANCES[torch.bfloat16], name)


def test_autocast(device):
    x, weight, bias, lora_A, lora_B = _inputs((1, 5, 32, 16, 3, 4), torch.float32, device)
    lora_A.requires_grad_()
    with use_backend("triton"):
        with torch.autocast(device, torch.bfloat16):
            y = lora_qkv(x, weight, bias, lora_A, lora_B)
        expected = lora_qkv(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), lora_A, lora_B)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    assert lora_A.grad.dtype == torch.float32
    assert lora_A.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_rows(backend, device):
    x, *rest = _inputs((1, 5, 32, 16, 3, 4), torch.float32, device)
    x = x[:, :0].clone().requires_grad_()
    factors = [t.requires_grad_() for t in rest[2:]]
    with use_backend(backend):
        y = lora_qkv(x, *rest[:2], *factors)
    assert y.shape == (1, 0, 48)
    grads = torch.autograd.grad(y.sum(), [x, *factors])
    assert [grad.shape for grad in grads] == [t.shape for t in (x, *factors)]
    assert not any(grad.any() for grad in grads)


@pytest.mark.medium
def test_same_result_every_time(device):
    """Rows enough for the sum over them to be split."""
    inputs = _inputs((3, 130, 24, 20, 1, 4), torch.float32, device)
    with use_backend("triton"):
        first, second = (_run(lora_qkv, inputs, 1.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_no_gradient_needs_is_not_kept(device):
    inputs = _inputs((2, 5, 24, 20, 3, 4), torch.float32, device)
    kept = []

    def pack(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    for needed, expected in (((), []), ((0,), [(60, 24)]), ((3,), [(2, 5, 24), (3, 4, 24), (60, 4)])):
        kept.clear()
        arguments = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lora_qkv(*arguments)
        assert kept == expected, needed


def test_a_second_derivative_is_refused_not_wrong(device):
    inputs = [t.requires_grad_() for t in _inputs((2, 5, 24, 20, 3, 4), torch.float32, device)]
    with use_backend("triton"):
        y = lora_qkv(*inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.medium
def test_opcheck(device):
    x, weight, _, lora_A, lora_B = _inputs((2, 3, 16, 8, 3, 2), torch.bfloat16, device)
    ops, factors = torch.ops.lorarecycle, (lora_A.float(), lora_B.float())
    torch.library.opcheck(ops.lora_qkv_fold.default, (weight, *factors, 0.5))
    dy = torch.ones(6, 24, dtype=x.dtype, device=device)
    torch.library.opcheck(ops.lora_qkv_factor_grads.default, (dy, x.flatten(0, 1), *factors, 0.5))
    torch.library.opcheck(ops.lora_qkv_factor_grads.default, (dy, x.flatten(0, 1), lora_A, factors[1], 0.5))


@pytest.mark.medium
@pytest.mark.parametrize("needed", [(0, 3, 4), (3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_compiles_to_one_graph(needed, device, assert_close):
    """Twice in one function, as in a network; the products are in the graph, two operators of ours beside them."""
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(_inputs((2, 5, 24, 8, 3, 4), torch.float32, device))]

    def twice(x, weight, *rest):
        return lora_qkv(lora_qkv(x, weight, *rest, 0.5), weight, *rest, 0.5).square().sum()

    with use_backend("triton"):
        results = []
        for run in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True, dynamic=False)):
            loss = run(*inputs)
            results.append((loss, *torch.autograd.grad(loss, [inputs[i] for i in needed])))
    for name, eager, compiled in zip(("loss", *(f"gradient {i}" for i in needed)), *results, strict=True):
        assert_close(compiled, eager, 1e-5, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph():
    inputs = [t.requires_grad_(i != 1) for i, t in enumerate(_inputs((4, 50, 192, 192, 3, 4), torch.bfloat16, "cuda"))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = _run(lora_qkv, inputs, 0.5)
    torch.cuda.synchronize()
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    dy = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(9)).to(expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_qkv(*leaves, 0.5)
        grads = torch.autograd.grad(y, [leaves[i] for i in (0, 3, 4)], dy)
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip([y, *grads], expected, strict=True))


def test_gradcheck_of_the_reference():
    inputs = [t.double().requires_grad_() for t in _inputs((2, 3, 5, 4, 3, 2), torch.float32, "cpu")]
    assert torch.autograd.gradcheck(lambda *t: reference.lora_qkv(*t, 0.5), inputs)


def _replaced(**changes):
    x, weight, bias, lora_A, lora_B = _inputs((2, 3, 16, 8, 3, 4), torch.float32, "cpu")
    return {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(24)}, r"`weight` must be \[N, K\], got shape \[24\]"),
        ({"x": torch.zeros(2, 3, 15)}, r"`x` must be \[..., 16\].*got shape \[2, 3, 15\]"),
        ({"bias": torch.zeros(23)}, r"`bias` must be \[24\].*got shape \[23\]"),
        (
            {"lora_A": torch.zeros(3, 4, 15)},
            r"`lora_A` must be \[S, R, K\] with K = 16, got shape \[3, 4, 15\]",
        ),
        (
            {"lora_A": torch.zeros(2, 3, 4, 16)},
            r"`lora_A` must be \[S, R, K\] with K = 16, got shape \[2, 3, 4, 16\]",
        ),
        ({"lora_A": torch.zeros(3, 65, 16)}, r"`lora_A` must have a rank from 1 to 64, got rank 65"),
        ({"lora_A": torch.zeros(3, 0, 16)}, r"`lora_A` must have a rank from 1 to 64, got rank 0"),
        (
            {"lora_A": torch.zeros(5, 4, 16)},
            r"`lora_A` must have a number of segments that divides N = 24, got 5",
        ),
        ({"lora_B": torch.zeros(24, 3)}, r"`lora_B` must be \[24, 4\].*got shape \[24, 3\]"),
        ({"weight": torch.zeros(24, 16).half()}, r"`weight` must have the dtype of `x`, torch.float32, got"),
        (
            {"lora_B": torch.zeros(24, 4).int()},
            r"`lora_B` must have the dtype of `x`, torch.float32, got torch.int32",
        ),
        (
            {"lora_A": torch.zeros(3, 4, 16, device="meta")},
            r"`lora_A` must be on the device of `x`, cpu, got meta",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_errors_name_argument_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        lora_qkv(**_replaced(**changes))
