"""Triton backward kernel of `batch_norm_prior`, one pass over map and gradient, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_prior_triton import layer_of, place_of, tile_of
from .launch import launch


@triton.jit
def _batch_norm_prior_bwd_kernel(
    dy_ptr,  # [G, C, P], with HAS_DY
    dloss_ptr,  # scalar
    x_ptr,  # [G, C, P]
    y_ptr,  # like x, with MASK_FROM_Y
    running_mean_ptr,  # [C], as all of the layer
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,  # [2 C + 2]: means, variances, the two norms
    dx_ptr,  # like x
    dresidual_ptr,  # like x, with HAS_DRESIDUAL
    C,
    P,
    steps,
    num_steps,
    num_values,  # of one channel
    eps,
    HAS_DY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASK_FROM_Y: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    if CHANNELS_LAST:
        C = C // VECTOR * VECTOR
    else:
        P = P // VECTOR * VECTOR
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first_p, n, pixels, base, stride = place_of(tl.program_id(1), steps, num_steps, P, C, CHANNELS_LAST, BLOCK_P)
    offs_p = tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        within = offs_p[None, :] * C + offs_c[:, None]
    else:
        within = offs_c[:, None] * P + (first_p + offs_p)[None, :]

    running_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    running_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    var = tl.load(stats_ptr + C + offs_c, mask=mask_c, other=0.0)
    mean_norm = tl.load(stats_ptr + 2 * C)
    var_norm = tl.load(stats_ptr + 2 * C + 1)
    dloss = tl.load(dloss_ptr).to(tl.float32) / num_values
    # A norm of zero has gradient zero, as in PyTorch.
    slope = 2.0 * dloss * (var - running_var) / tl.where(var_norm == 0.0, float("inf"), var_norm)
    offset = dloss * (mean - running_mean) / tl.where(mean_norm == 0.0, float("inf"), mean_norm)
    if HAS_DY:
        scale, shift = layer_of(
            running_mean, running_var, weight_ptr, bias_ptr, eps, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS
        )

    for i in tl.range(0, n, num_stages=NUM_STAGES):
        mask = mask_c[:, None] & (first_p + i * pixels + offs_p < P)[None, :]
        first = base + i * stride
        x = tl.load(x_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
        dx = offset[:, None] + slope[:, None] * (x - mean[:, None])
        if HAS_DY:
            dz = tl.load(dy_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION != "none":
                if MASK_FROM_Y:
                    z = tl.load(y_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
                else:
                    z = x * scale[:, None] + shift[:, None]
                passes = z > 0.0
                if ACTIVATION == "relu6":
                    passes = passes & (z < 6.0)
                dz = tl.where(passes, dz, 0.0)
            if HAS_DRESIDUAL:
                tl.store(dresidual_ptr + first + within, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
            dx += scale[:, None] * dz
        tl.store(dx_ptr + first + within, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def batch_norm_prior_backward(
    dy: Tensor | None,
    dloss: Tensor,
    x: Tensor,
    y: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the residual, laid out like `x`; the latter is empty unless the activation masks it.

    `dy` and `y` are laid out like `x`; `y` is there where there was a residual under an activation.
    """
    channel_blocks, splits, tile = tile_of(x, 6)
    dx = torch.empty_like(x)
    masked = y is not None and dy is not None
    dresidual = torch.empty_like(x) if masked else x.new_empty(0)
    launch(
        _batch_norm_prior_bwd_kernel, (channel_blocks, splits, 1),
        x if dy is None else dy, dloss, x, x if y is None else y, running_mean, running_var,
        running_mean if weight is None else weight, running_mean if bias is None else bias, stats, dx, dresidual,
        num_values=x.numel() // x.shape[1], eps=eps, HAS_DY=dy is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, MASK_FROM_Y=masked, HAS_DRESIDUAL=masked, ACTIVATION=activation, **tile,
    )  # fmt: skip
    return dx, dresidual
