"""`lora_qkv`: Triton forward and gradients against the float32 reference, many adapters, errors."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import lora_qkv, reference, use_backend

# Relative to the largest value: float32 rounding over the width; roundings of a 16-bit result and factors.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = ("y", "dx", "d_lora_A", "d_lora_B", "d_weight", "d_bias")

# images, tokens, K, outputs of a segment, segments, rank
SIZES = [
    (1, 1, 40, 24, 3, 1),
    (2, 49, 72, 33, 3, 3),
    (1, 197, 64, 64, 3, 4),
    (1, 257, 96, 100, 1, 8),
    (2, 50, 80, 70, 1, 16),
    (1, 49, 48, 40, 3, 64),
]


def _inputs(size, dtype, device, num_adapters=None, seed=0):
    B, T, K, N, S, R = size
    generator = torch.Generator().manual_seed(seed)
    stack = () if num_adapters is None else (num_adapters,)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return [
        random(B, T, K),
        random(S * N, K, scale=K**-0.5),
        random(S * N),
        random(*stack, S, R, K, scale=K**-0.5),
        random(*stack, S * N, R),
    ]


def _run(op, inputs, scaling, ids, needed=(0, 3, 4)):
    """Output and the gradients of the inputs at `needed`, for a fixed output gradient."""
    inputs = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    y = op(*inputs, scaling, ids)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return [y, *torch.autograd.grad(y, [inputs[i] for i in needed], dy)]


def _wide(inputs):
    return [t.detach().float() for t in inputs]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(size, dtype, device, assert_close):
    if dtype == torch.float16 and size[1] > 50:
        pytest.skip("float16 follows the path of bfloat16")
    inputs = _inputs(size, dtype, device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 0.7, None)
    expected = _run(reference.lora_qkv, _wide(inputs), 0.7, None)
    for name, got, wanted in zip(NAMES, actual, expected, strict=False):
        assert got.dtype == dtype
        assert_close(got, wanted, TOLERANCES[dtype], name)


def test_gradients_of_frozen_weights_when_asked(device, assert_close):
    inputs = _inputs((2, 5, 24, 20, 3, 4), torch.float32, device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 1.5, None, needed=(0, 3, 4, 1, 2))
    expected = _run(reference.lora_qkv, inputs, 1.5, None, needed=(0, 3, 4, 1, 2))
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        assert_close(got, wanted, TOLERANCES[torch.float32], name)


@pytest.mark.parametrize("needed", [(0,), (3, 4), (3,), (4,)], ids=str)
def test_only_the_gradients_asked_for(needed, device, assert_close):
    inputs = _inputs((2, 5, 24, 20, 3, 4), torch.float32, device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 1.0, None, needed=needed)
    for got, wanted in zip(actual, _run(reference.lora_qkv, inputs, 1.0, None, needed=needed), strict=True):
        assert_close(got, wanted, TOLERANCES[torch.float32], str(needed))


@pytest.mark.parametrize("form", ["sliced", "transposed"])
def test_non_contiguous(form, device, assert_close):
    x, *rest = _inputs((3, 20, 36, 20, 3, 4), torch.float32, device)
    x = torch.stack([x, x], dim=-1)[..., 0] if form == "sliced" else x.transpose(0, 1)
    rest[0] = rest[0].T.contiguous().T
    rest[3] = rest[3].T.contiguous().T
    assert not x.is_contiguous()
    with use_backend("triton"):
        actual = _run(lora_qkv, [x, *rest], 1.0, None)
    expected = _run(reference.lora_qkv, [x, *rest], 1.0, None)
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
        weight, bias, lora_A, lora_B = rest
        stacked, ids = (weight, bias, lora_A[None], lora_B[None], 0.5), torch.zeros(4, dtype=torch.int64)
        assert_close(lora_qkv(x[:, 0], *stacked, ids), expected[:, 0], 3e-6, "ids of vectors")
        four = lora_qkv(x.view(2, 1, 6, 24), *stacked, ids[:2])
        assert_close(four.view(4, 3, 60), expected, 3e-6, "ids of four dimensions")


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


# images, tokens; adapter ids: runs, singles and none, within one tile of rows and across tiles
MANY = [
    ((5, 7), [1, -1, 0, 0, 1]),
    ((4, 50), [0, 0, 2, 1]),
    ((3, 49), [-1, -1, -1]),
    ((6, 1), [2, 1, 0, 2, -1, 2]),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("images", "ids"), MANY, ids=str)
def test_many_adapters_equal_one_by_one(images, ids, backend, device, assert_close):
    inputs = _inputs((*images, 40, 24, 3, 3), torch.float32, device, num_adapters=3)
    with use_backend(backend):
        actual = _run(lora_qkv, inputs, 0.7, torch.tensor(ids))
    x, weight, bias, lora_A, lora_B = (t.detach().requires_grad_() for t in inputs)
    one_by_one = [
        reference.lora_qkv(x[i : i + 1], weight, bias, lora_A[max(j, 0)], lora_B[max(j, 0)], 0.7 if j >= 0 else 0.0)
        for i, j in enumerate(ids)
    ]
    y = torch.cat(one_by_one)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    expected = [y, *torch.autograd.grad(y, (x, lora_A, lora_B), dy)]
    for name, got, wanted in zip(NAMES, actual, expected, strict=False):
        assert_close(got, wanted, TOLERANCES[torch.float32], name)


def test_many_adapters_bfloat16(device, assert_close):
    inputs = _inputs((4, 20, 48, 40, 3, 4), torch.bfloat16, device, num_adapters=2)
    ids = torch.tensor([1, 0, 0, 1], dtype=torch.int32, device=device)
    with use_backend("triton"):
        actual = _run(lora_qkv, inputs, 1.0, ids)
    for name, got, wanted in zip(NAMES, actual, _run(reference.lora_qkv, _wide(inputs), 1.0, ids), strict=False):
        assert_close(got, wanted, TOLERANCES[torch.bfloat16], name)


def test_float32_factors_of_a_bfloat16_model(device):
    x, weight, bias, lora_A, lora_B = _inputs((1, 5, 32, 16, 1, 4), torch.bfloat16, device)
    lora_A, lora_B = lora_A.float().requires_grad_(), lora_B.float().requires_grad_()
    with use_backend("triton"):
        y = lora_qkv(x, weight, bias, lora_A, lora_B)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert lora_A.grad is not None
    assert lora_A.grad.dtype == lora_B.grad.dtype == torch.float32


def test_same_result_every_time(device):
    inputs = _inputs((2, 80, 40, 24, 3, 4), torch.float32, device)
    with use_backend("triton"):
        first, second = (_run(lora_qkv, inputs, 1.0, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("ids", [None, [1, 0]], ids=str)
def test_opcheck(ids, device):
    inputs = _inputs((2, 3, 16, 8, 3, 2), torch.float32, device, num_adapters=2 if ids else 1)
    x, weight, bias, lora_A, lora_B = inputs
    ids = None if ids is None else torch.tensor(ids, device=device)
    args = [x.flatten(0, 1).requires_grad_(), weight, bias, lora_A.requires_grad_(), lora_B.requires_grad_()]
    torch.library.opcheck(torch.ops.lorarecycle.lora_qkv.default, (*args, 0.5, ids))


def test_gradcheck_of_the_reference():
    inputs = [t.double().requires_grad_() for t in _inputs((2, 3, 5, 4, 3, 2), torch.float32, "cpu")]
    assert torch.autograd.gradcheck(lambda *t: reference.lora_qkv(*t, 0.5), inputs)
    inputs = [t.double().requires_grad_() for t in _inputs((3, 2, 5, 4, 1, 2), torch.float32, "cpu", 2)]
    ids = torch.tensor([1, -1, 0])
    assert torch.autograd.gradcheck(lambda *t: reference.lora_qkv(*t, 0.5, ids), inputs)


def _replaced(**changes):
    x, weight, bias, lora_A, lora_B = _inputs((2, 3, 16, 8, 3, 4), torch.float32, "cpu")
    return {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B} | changes


_A, _B = torch.zeros(2, 3, 4, 16), torch.zeros(2, 24, 4)


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
        (
            {"lora_A": _A, "lora_B": _B, "adapter_ids": torch.tensor([0, 2])},
            r"`adapter_ids` must be from -1 \(none\) to 1, got 2",
        ),
        (
            {"lora_A": _A, "lora_B": _B, "adapter_ids": torch.tensor([0, -2])},
            r"`adapter_ids` must be from -1 \(none\) to 1, got -2",
        ),
        (
            {"lora_A": _A, "lora_B": _B, "adapter_ids": torch.tensor([0])},
            r"`adapter_ids` must hold one id per image of `x` \[2, 3, 16\], got shape \[1\]",
        ),
        (
            {"lora_A": _A, "lora_B": _B, "adapter_ids": torch.tensor([0.0, 1.0])},
            r"`adapter_ids` must be int32 or int64, got torch.float32",
        ),
        (
            {"lora_A": _A[:0], "lora_B": _B[:0], "adapter_ids": torch.tensor([-1, -1])},
            r"`lora_A` must hold at least one adapter, got shape \[0, 3, 4, 16\]",
        ),
        ({"adapter_ids": torch.tensor([0, 0])}, r"`lora_A` must be \[L, S, R, K\]"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_errors_name_argument_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        lora_qkv(**_replaced(**changes))
