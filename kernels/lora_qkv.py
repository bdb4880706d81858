"""`lora_qkv`: a frozen linear layer plus a low-rank pair for each segment of its outputs, in one pass.

Opaque to `torch.compile`: Inductor could fuse nothing into the kernel's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import choose_backend, on_device_of

MAX_RANK = 64


@torch.library.custom_op("lorarecycle::lora_qkv", mutates_args=())
def _lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    from .lora_qkv_triton import lora_qkv_forward

    with on_device_of(x):
        return lora_qkv_forward(x, weight, bias, lora_A, lora_B, scaling)


@_lora_qkv.register_fake
def _(x, weight, bias, lora_A, lora_B, scaling):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("lorarecycle::lora_qkv_backward", mutates_args=())
def _lora_qkv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    need_x: bool,
    need_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .lora_qkv_backward_triton import lora_qkv_backward

    with on_device_of(x):
        dx, d_lora_A, d_lora_B = lora_qkv_backward(dy, x, weight, lora_A, lora_B, scaling, need_x, need_lora)
    # Outputs of an op must not share memory, the empty ones neither.
    return dx, d_lora_A if need_lora else x.new_empty(0), d_lora_B if need_lora else x.new_empty(0)


@_lora_qkv_backward.register_fake
def _(dy, x, weight, lora_A, lora_B, scaling, need_x, need_lora):
    return (
        x.new_empty(x.shape) if need_x else x.new_empty(0),
        lora_A.new_empty(lora_A.shape) if need_lora else x.new_empty(0),
        lora_B.new_empty(lora_B.shape) if need_lora else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_A, lora_B, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, lora_A, lora_B)


def _backward(ctx, dy: Tensor):
    x, weight, lora_A, lora_B = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
    dx = d_weight = d_bias = d_lora_A = d_lora_B = None
    if need_x or need_A or need_B:
        dx, d_lora_A, d_lora_B = _lora_qkv_backward(
            dy, x, weight, lora_A, lora_B, ctx.scaling, need_x, need_A or need_B
        )
    if need_weight:
        d_weight = dy.T @ x
    if need_bias:
        d_bias = dy.sum(0)
    return (
        dx if need_x else None,
        d_weight,
        d_bias,
        d_lora_A if need_A else None,
        d_lora_B if need_B else None,
        None,
    )


_lora_qkv.register_autograd(_backward, setup_context=_setup_context)


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
            they are cast to that of `x`.
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
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    if x.numel() == 0 or choose_backend(x, has_cpp=False) == "reference":
        return reference.lora_qkv(x, weight, bias, lora_A, lora_B, scaling)
    y = _lora_qkv(x.reshape(-1, x.shape[-1]), weight, bias, lora_A, lora_B, scaling)
    return y.view(*x.shape[:-1], -1)
