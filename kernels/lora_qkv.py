"""`lora_qkv`: a frozen linear layer plus a low-rank pair for each segment of its outputs.

On a GPU the pairs are folded into the weight, `W' = W + s B A`, and the product with W' is the vendor's, forward and
for dx. Only the fold and the gradients of the factors are kernels of our own. These two are opaque to `torch.compile`;
the products are not, so that Inductor may join what follows with them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .backend import choose_backend, on_device_of

MAX_RANK = 64


def _fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    from .lora_qkv_triton import lora_qkv_fold

    with on_device_of(weight):
        return lora_qkv_fold(weight, lora_A, lora_B, scaling)


def _factor_grads(dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    from .lora_qkv_backward_triton import lora_qkv_factor_grads

    with on_device_of(x):
        return lora_qkv_factor_grads(dy, x, lora_A, lora_B, scaling)


# Bare operators: `torch.library.custom_op` adds 19 us of Python to a call, its `register_autograd` 50 more.
_library = torch.library.Library("lorarecycle", "FRAGMENT")
for _schema, _function in (
    ("lora_qkv_fold(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor", _fold),
    (
        "lora_qkv_factor_grads(Tensor dy, Tensor x, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor",
        _factor_grads,
    ),
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_schema.partition("(")[0], _function, "CompositeExplicitAutograd")


@torch.library.register_fake("lorarecycle::lora_qkv_fold", lib=_library)
def _(weight, lora_A, lora_B, scaling):
    return weight.new_empty(weight.shape)


@torch.library.register_fake("lorarecycle::lora_qkv_factor_grads", lib=_library)
def _(dy, x, lora_A, lora_B, scaling):
    dtype = torch.promote_types(lora_A.dtype, lora_B.dtype)
    return x.new_empty(lora_A.numel() + lora_B.numel(), dtype=dtype)


class _LoRAQKV(torch.autograd.Function):
    """The folded form. Saves W', 3.5 MB for a qkv of ViT-B/16 in bfloat16, rather than fold once more for dx."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        folded = torch.ops.lorarecycle.lora_qkv_fold.default(weight, lora_A, lora_B, scaling)
        need_x, need_weight, _, need_A, need_B, _ = ctx.needs_input_grad
        need_lora = need_A or need_B
        ctx.save_for_backward(
            x if need_lora or need_weight else None,
            folded if need_x else None,
            lora_A if need_lora else None,
            lora_B if need_lora else None,
        )
        ctx.scaling = scaling
        return F.linear(x, folded, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, folded, lora_A, lora_B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        dx = d_weight = d_bias = d_lora_A = d_lora_B = None
        dy_rows = dy.reshape(-1, dy.shape[-1])
        if need_x:
            dx = (dy_rows @ folded).view(*dy.shape[:-1], folded.shape[1])
        if need_A or need_B:
            x_rows = x.reshape(-1, x.shape[-1])
            flat = torch.ops.lorarecycle.lora_qkv_factor_grads.default(dy_rows, x_rows, lora_A, lora_B, ctx.scaling)
            if need_A:
                d_lora_A = flat[: lora_A.numel()].view(lora_A.shape).to(lora_A.dtype)
            if need_B:
                d_lora_B = flat[lora_A.numel() :].view(lora_B.shape).to(lora_B.dtype)
        if need_weight:
            d_weight = dy_rows.T @ x.reshape(-1, x.shape[-1])
        if need_bias:
            d_bias = dy_rows.sum(0)
        return dx, d_weight, d_bias, d_lora_A, d_lora_B, None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raise ValueError, naming argument, rule and value, where the arguments do not fit together."""
    if weight.ndim != 2:
        raise ValueError(f"`weight` must be [N, K], got shape {list(weight.shape)}.")
    N, K = weight.shape
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"`x` must be [..., {K}] to fit `weight` [N, K], got shape {list(x.shape)}.")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"`bias` must be [{N}] to fit `weight` [N, K], got shape {list(bias.shape)}.")
    if lora_A.ndim != 3 or lora_A.shape[-1] != K:
        raise ValueError(f"`lora_A` must be [S, R, K] with K = {K}, got shape {list(lora_A.shape)}.")
    S, R, _ = lora_A.shape
    if not 1 <= R <= MAX_RANK:
        raise ValueError(f"`lora_A` must have a rank from 1 to {MAX_RANK}, got rank {R}.")
    if S < 1 or N % S:
        raise ValueError(f"`lora_A` must have a number of segments that divides N = {N}, got {S} segments.")
    if lora_B.shape != (N, R):
        raise ValueError(f"`lora_B` must be [{N}, {R}] to fit `weight` and `lora_A`, got shape {list(lora_B.shape)}.")
    named = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"`{name}` must be on the device of `x`, {x.device}, got {tensor.device}.")
        if tensor.dtype != x.dtype and (name in ("weight", "bias") or not tensor.dtype.is_floating_point):
            raise ValueError(f"`{name}` must have the dtype of `x`, {x.dtype}, got {tensor.dtype}.")
    if not x.dtype.is_floating_point:
        raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """Linear layer with one low-rank pair per output segment: `y = x W^T + b + s (x A_i^T) B_i^T`.

    A fused qkv has S = 3 segments of N / 3 outputs; proj, fc1 and fc2 have one. A segment without an adapter
    has zero factors; smaller ranks are padded with zeros. LoRA (Hu et al. 2022), Sec. 4.1. Gradients: `x`,
    `lora_A`, `lora_B`, and `weight` and `bias` where they require one. Under autocast all inputs are cast to
    its dtype.

    Args:
        x: input, [..., K].
        weight: frozen weight, [N, K], in the dtype of `x`.
        bias: [N] or None.
        lora_A: [S, R, K]; rank R from 1 to 64. Factors may have another floating-point dtype (float32 masters);
            the plain form casts them to that of `x`, the folded form adds them up in float32.
        lora_B: [N, R]; rows of segment i belong to `lora_A[i]`.
        scaling: factor of the low-rank product.

    Returns:
        [..., N], in the dtype of `x`.

    Raises:
        ValueError: shapes, dtypes, devices or the rank break the rules above.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, bias, lora_A, lora_B)
    if x.numel() == 0 or choose_backend(x, has_cpp=False) == "reference":
        return reference.lora_qkv(x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling)
    return _LoRAQKV.apply(x, weight, bias, lora_A, lora_B, scaling)
