"""`split_heads`: queries, keys and values of one product, as views whose gradients are put together in one pass.

PyTorch by itself stacks the three gradients, then copies the stack into the product's order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import choose_backend, on_device_of
from .registration import is_traced, refuse_second_derivative


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        return _views(qkv, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        refuse_second_derivative("split_heads")
        from .split_heads_triton import merge_heads

        with on_device_of(grads[0]):
            return merge_heads(*grads), None


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of a fused projection, head by head.

    Args:
        qkv: [B, M, 3 D], any float dtype: queries of all heads side by side, then keys, then values.
        num_heads: H; divides D.

    Returns:
        Three views of `qkv`, [B, H, M, D / H] each. Under Triton their gradients become that of `qkv` in one pass; it
        cannot be differentiated again.

    Raises:
        ValueError: `qkv` has no three parts of `num_heads` heads.
        NotImplementedError: a second derivative under Triton.
    """
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"`qkv` must be [B, M, 3 D] with {num_heads} dividing D, got shape {list(qkv.shape)}.")
    wanted = torch.is_grad_enabled() and qkv.requires_grad
    if not wanted or is_traced(qkv) or choose_backend(qkv, has_cpp=False) != "triton":  # compilers merge by themselves
        return _views(qkv, num_heads)
    return _SplitHeads.apply(qkv, num_heads)  # type: ignore[no-any-return]


def _views(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
