"""`cls_topk_gather`: Triton and C++ against the reference, ties, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import cls_topk_gather, reference, use_backend
from lorarecycle.kernels.cls_topk_gather import MAX_TOKENS

# images, heads, tokens, head width, width of the stream, patches kept, prefix tokens
SIZES = [
    (2, 3, 49, 64, 192, 12, 1),
    (1, 2, 197, 80, 100, 49, 5),
    (1, 1, 257, 24, 30, 256, 1),
    (3, 2, 2, 8, 3, 1, 1),
]


def _inputs(size, dtype, seed=0):
    B, H, M, d, D, _, _ = size
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn((2, B, H, M, d), generator=generator).to(dtype)
    return q, k, torch.randn((B, M, D), generator=generator).to(dtype)


def _run(op, q, k, x, num_keep, num_prefix):
    x = x.detach().requires_grad_()
    out, index = op(q, k, x, num_keep, num_prefix)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return out, index, torch.autograd.grad(out, x, dout)[0]


def _same(actual, expected):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.medium
def test_triton(size, dtype, device):
    q, k, x = (t.to(device) for t in _inputs(size, dtype))
    with use_backend("triton"):
        actual = _run(cls_topk_gather, q, k, x, *size[5:])
    assert _same(actual, _run(reference.cls_topk_gather, q, k, x, *size[5:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cpp(size, dtype, cpp_backend):
    q, k, x = _inputs(size, dtype)
    with use_backend("cpp"):
        actual = _run(cls_topk_gather, q, k, x, *size[5:])
    assert _same(actual, _run(reference.cls_topk_gather, q, k, x, *size[5:]))


@pytest.fixture(params=["triton", "cpp", "reference"])
def backend(request):
    """Every backend that can run here; the Triton one on its device."""
    request.getfixturevalue({"triton": "device", "cpp": "cpp_backend"}.get(request.param, "request"))
    target = request.getfixturevalue("device") if request.param == "triton" else "cpu"
    with use_backend(request.param):
        yield target


def test_ties_go_to_the_lower_index(backend):
    q, k, x = (t.to(backend) for t in _inputs((2, 2, 40, 8, 6, 10, 1), torch.float32))
    k = k[:, :, :1].expand(-1, -1, 40, -1)  # every token has the same score
    _, index = cls_topk_gather(q, k, x, 10)
    assert torch.equal(index.cpu(), torch.arange(10).expand(2, -1))


def test_partial_ties(backend):
    """Scores 2 levels: all of the upper level are kept and the first of the lower one."""
    q = torch.ones(1, 1, 9, 4)
    k = torch.zeros(1, 1, 9, 4)
    k[0, 0, [3, 6, 8]] = 1.0
    _, index = cls_topk_gather(q.to(backend), k.to(backend), torch.zeros(1, 9, 2, device=backend), 5)
    assert index.tolist() == [[0, 1, 2, 5, 7]]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf], ids=str)
def test_scores_that_are_not_numbers_tie(bad, backend):
    """A key that is no number makes all scores of its image NaN: the first patches are kept, none is made up."""
    q, k, x = (t.to(backend) for t in _inputs((3, 2, 20, 8, 6, 5, 1), torch.float32))
    k[1, 0, 7, 3] = bad
    actual = _run(cls_topk_gather, q, k, x, 5, 1)
    assert actual[1][1].tolist() == [0, 1, 2, 3, 4]
    assert _same(actual, _run(reference.cls_topk_gather, q, k, x, 5, 1))


def test_more_tokens_than_one_program_holds(device, monkeypatch):
    from lorarecycle.kernels import cls_topk_gather_triton

    def launched(*args):
        raise AssertionError("the kernel was launched")

    q, k, x = (t.to(device) for t in _inputs((1, 1, MAX_TOKENS + 1, 4, 3, 9, 1), torch.float32))
    monkeypatch.setattr(cls_topk_gather_triton, "cls_topk_gather_forward", launched)
    with use_backend("triton"):
        assert _same(cls_topk_gather(q, k, x, 9), reference.cls_topk_gather(q, k, x, 9))
        with pytest.raises(AssertionError, match="was launched"):
            cls_topk_gather(q[:, :, :-1], k[:, :, :-1], x[:, :-1], 9)


def test_non_contiguous(backend):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn((2, 20, 3, 2, 8), generator=generator).to(backend).permute(2, 0, 3, 1, 4)
    x = torch.randn((2, 16, 20), generator=generator).to(backend).transpose(1, 2)
    assert not qkv[0].is_contiguous()
    assert not x.is_contiguous()
    actual = _run(cls_topk_gather, qkv[0], qkv[1], x, 6, 2)
    assert _same(actual, _run(reference.cls_topk_gather, qkv[0], qkv[1], x, 6, 2))


def test_no_gradient_through_the_scores(backend):
    q, k, x = (t.to(backend).requires_grad_() for t in _inputs((1, 2, 9, 8, 6, 4, 1), torch.float32))
    out, index = cls_topk_gather(q, k, x, 4)
    assert not index.requires_grad
    out.sum().backward()
    assert q.grad is None
    assert k.grad is None
    assert x.grad is not None
    assert torch.equal(x.grad.sum(1).cpu(), torch.full((1, 6), 5.0))


@pytest.mark.medium
@pytest.mark.parametrize("backend_name", ["triton", "cpp"])
def test_opcheck(backend_name, request):
    request.getfixturevalue({"triton": "device", "cpp": "cpp_backend"}[backend_name])
    q, k, x = _inputs((2, 2, 6, 8, 4, 3, 1), torch.float32)
    if backend_name == "triton":
        q, k, x = (t.to(request.getfixturevalue("device")) for t in (q, k, x))
    args = (q, k, x.requires_grad_(), 3, 1, backend_name)
    torch.library.opcheck(torch.ops.lorarecycle.cls_topk_gather.default, args)


def test_gradcheck_of_the_reference():
    q, k, x = (t.double() for t in _inputs((2, 2, 7, 4, 3, 3, 1), torch.float32))
    assert torch.autograd.gradcheck(lambda t: reference.cls_topk_gather(q, k, t, 3)[0], x.requires_grad_())


def test_scatter_is_the_gradient_of_gather():
    _, _, x = _inputs((2, 2, 7, 4, 3, 3, 2), torch.float32)
    index = torch.tensor([[0, 2, 4], [1, 2, 3]])
    out = reference.gather_tokens(x.requires_grad_(), index, 2)
    (expected,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(reference.scatter_tokens(out.detach(), index, 7, 2), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 9, 8)}, r"`q` must be \[B, H, M, d\], got shape \[2, 9, 8\]"),
        (
            {"k": torch.zeros(2, 2, 8, 8)},
            r"`k` must have the shape of `q`, \[2, 2, 9, 8\], got \[2, 2, 8, 8\]",
        ),
        ({"x": torch.zeros(2, 8, 6)}, r"`x` must be \[B, M, D\] with B = 2, M = 9, got shape \[2, 8, 6\]"),
        (
            {"k": torch.zeros(2, 2, 9, 8).half()},
            r"`k` must have the dtype of `q`, torch.float32, got torch.float16",
        ),
        ({"x": torch.zeros(2, 9, 6).int()}, r"`x` must have a floating-point dtype, got torch.int32"),
        ({"x": torch.zeros(2, 9, 6, device="meta")}, r"`q` must be on the device of `x`, meta, got cpu"),
        ({"num_keep": 9}, r"`num_keep` must be from 1 to the 8 patch tokens there are, got 9"),
        ({"num_keep": 0}, r"`num_keep` must be from 1 to the 8 patch tokens there are, got 0"),
        ({"num_prefix": 0}, r"`num_prefix` must be from 1 \(the class token\) to 8 for 9 tokens, got 0"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_errors_name_argument_rule_and_value(changes, message):
    q, k, x = _inputs((2, 2, 9, 8, 6, 4, 1), torch.float32)
    with pytest.raises(ValueError, match=message):
        cls_topk_gather(**({"q": q, "k": k, "x": x, "num_keep": 4, "num_prefix": 1} | changes))
