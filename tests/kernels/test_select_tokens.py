"""`select_tokens`: Triton and the sparse reference against embedding everything and gathering; errors."""

from __future__ import annotations

import pytest
import torch
from lorarecycle.kernels import reference, select_tokens, use_backend

# Relative to the largest value: float32 rounding over a patch; one rounding of the 16-bit result.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = ("tokens", "d_images", "d_weight", "d_bias", "d_pos_embed", "d_prefix")

# images, height, width, patch size, D, patches kept, prefix tokens
SIZES = [
    (2, 32, 48, 16, 72, 3, 1),
    (1, 42, 28, 14, 100, 5, 0),
    (2, 28, 28, 7, 66, 9, 5),
    (1, 8, 8, 4, 5, 1, 1),
]


def _inputs(size, dtype, device, seed=0):
    B, H, W, p, D, num_keep, P = size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    N = (H // p) * (W // p)
    kept = torch.stack([torch.randperm(N, generator=generator)[:num_keep] for _ in range(B)]).to(device)
    images, weight = random(B, 3, H, W), random(D, 3, p, p, scale=(3 * p * p) ** -0.5)
    return kept, [images, weight, random(D), random(N, D), random(P, D)]


def _run(op, kept, inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    tokens = op(inputs[0], kept, *inputs[1:])
    dtokens = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9)).to(tokens)
    return [tokens, *torch.autograd.grad(tokens, inputs, dtokens)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(size, dtype, device, assert_close):
    kept, inputs = _inputs(size, dtype, device)
    with use_backend("triton"):
        actual = _run(select_tokens, kept, inputs)
    expected = _run(reference.select_tokens_dense, kept, [t.float() for t in inputs])
    for name, got, wanted in zip(NAMES, actual, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, wanted, TOLERANCES[dtype], name)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sparse_reference_equals_dense(size, assert_close):
    kept, inputs = _inputs(size, torch.float32, "cpu")
    expected = _run(reference.select_tokens_dense, kept, inputs)
    for name, got, wanted in zip(NAMES, _run(reference.select_tokens, kept, inputs), expected, strict=True):
        assert_close(got, wanted, TOLERANCES[torch.float32], name)


def test_channels_last_and_sliced_images_without_bias(device, assert_close):
    kept, (images, weight, _, pos_embed, prefix) = _inputs(SIZES[0], torch.float32, device)
    rest = (kept, weight, None, pos_embed, prefix)
    expected = reference.select_tokens_dense(images, *rest)
    sliced = torch.stack([images, images], dim=-1)[..., 1]
    with use_backend("triton"):
        for form in (images.to(memory_format=torch.channels_last), sliced):
            assert_close(select_tokens(form, *rest), expected, TOLERANCES[torch.float32], "tokens")


@pytest.mark.medium
def test_positions_that_are_none_read_and_write_nothing(device, assert_close):
    """On a GPU nobody looks at positions before the kernels do."""
    from lorarecycle.kernels.select_tokens_triton import select_tokens_backward, select_tokens_forward

    kept, (images, weight, bias, pos_embed, prefix) = _inputs(SIZES[0], torch.float32, device)
    wrong = kept.clone()
    wrong[0, 1], wrong[1, 0] = 6, -(2**40)
    tokens = select_tokens_forward(images, wrong, weight, bias, pos_embed, prefix)
    lost = tokens.isnan().all(-1)
    assert lost.nonzero().tolist() == [[0, 2], [1, 1]]
    expected = reference.select_tokens(images, kept, weight, bias, pos_embed, prefix)
    assert_close(tokens[~lost], expected[~lost], TOLERANCES[torch.float32], "tokens")
    got = select_tokens_backward(torch.ones_like(tokens), wrong, weight, *images.shape[2:])
    wanted = select_tokens_backward(torch.ones_like(tokens), kept, weight, *images.shape[2:])
    still = reference.cut_patches(got, 16).abs().sum((3, 4, 5)).flatten(1) > 0
    assert still.sum() == kept.numel() - 2
    assert ((got == wanted) | (got == 0)).all()


@pytest.mark.medium
def test_opcheck(device):
    kept, (images, *rest) = _inputs((2, 8, 8, 4, 5, 2, 1), torch.float32, device)
    args = (images.requires_grad_(), kept, *(t.requires_grad_() for t in rest))
    torch.library.opcheck(torch.ops.lorarecycle.select_tokens.default, args)


def test_gradcheck_of_the_reference():
    kept, inputs = _inputs((2, 4, 4, 2, 3, 2, 1), torch.float32, "cpu")
    inputs = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda images, *rest: reference.select_tokens(images, kept, *rest), inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.zeros(72, 3, 16, 8)},
            r"`weight` must be \[D, C, p, p\], got shape \[72, 3, 16, 8\]",
        ),
        (
            {"images": torch.zeros(2, 3, 30, 48)},
            r"`images` must be \[B, 3, H, W\].*16, got shape \[2, 3, 30, 48\]",
        ),
        ({"kept": torch.zeros(3, 3).long()}, r"`kept` must be \[B, k\] with B = 2, got shape \[3, 3\]"),
        ({"kept": torch.zeros(2, 7).long()}, r"`kept` must hold 1 to 6 patches an image, got 7"),
        ({"kept": torch.zeros(2, 3)}, r"`kept` must be int64, got torch.float32"),
        ({"kept": torch.full((2, 3), 6)}, r"`kept` must hold positions from 0 to 5, got 6"),
        ({"kept": torch.full((2, 3), -1)}, r"`kept` must hold positions from 0 to 5, got -1"),
        ({"bias": torch.zeros(71)}, r"`bias` must be \[72\].*got shape \[71\]"),
        ({"pos_embed": torch.zeros(7, 72)}, r"`pos_embed` must be \[6, 72\].*got shape \[7, 72\]"),
        ({"prefix": torch.zeros(1, 71)}, r"`prefix` must be \[P, 72\], got shape \[1, 71\]"),
        (
            {"bias": torch.zeros(72).half()},
            r"`bias` must have the dtype of `images`, torch.float32, got torch.float16",
        ),
        (
            {"bias": torch.zeros(72, device="meta")},
            r"`bias` must be on the device of `images`, cpu, got meta",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_errors_name_argument_rule_and_value(changes, message):
    kept, (images, weight, bias, pos_embed, prefix) = _inputs(SIZES[0], torch.float32, "cpu")
    arguments = {"images": images, "kept": kept, "weight": weight}
    arguments |= {"bias": bias, "pos_embed": pos_embed, "prefix": prefix}
    with pytest.raises(ValueError, match=message):
        select_tokens(**(arguments | changes))
