"""Triton kernels of `batch_norm_prior` and their launchers; imported on first use.

A feature map is seen as [G, C, P] through its strides: G images of P pixels where it is NCHW, one group of
all pixels where it is channels_last. Neither form is copied. Statistics are merged from tiles by Chan's
formula (centred in each tile, so nothing cancels); a fixed number of splits is merged in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import arch, cdiv, next_power_of_2


@triton.jit
def _batch_norm_prior_stats_kernel(
    x_ptr,  # [G, C, P]
    partial_ptr,  # [splits, 3, C]: count, mean, sum of squared distances from that mean
    scale_ptr,  # [C], with AFFINE
    shift_ptr,  # [C], with AFFINE
    y_ptr,  # [G, C, P] = scale * x + shift, with AFFINE
    C,
    P,
    num_tiles,  # tiles of pixels of all groups
    num_splits,
    stride_xg,
    stride_xc,
    stride_xp,
    AFFINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.arange(0, BLOCK_P)
    mask_c = offs_c < C
    if AFFINE:
        scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
        shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    tiles_p = tl.cdiv(P, BLOCK_P)
    count = tl.zeros((BLOCK_C,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for tile in range(split, num_tiles, num_splits):
        first_p = (tile % tiles_p) * BLOCK_P
        p = first_p + offs_p
        mask = mask_c[:, None] & (p < P)[None, :]
        first = (tile // tiles_p).to(tl.int64) * stride_xg + first_p.to(tl.int64) * stride_xp
        within = offs_c[:, None] * stride_xc + offs_p[None, :] * stride_xp
        x = tl.load(x_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
        if AFFINE:
            y = x * scale[:, None] + shift[:, None]
            tl.store(y_ptr + first + within, y.to(y_ptr.dtype.element_ty), mask=mask)
        tile_count = tl.minimum(P - first_p, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(x, axis=1) / tile_count
        centred = tl.where(mask, x - tile_mean[:, None], 0.0)
        total = count + tile_count
        delta = tile_mean - mean
        squares += tl.sum(centred * centred, axis=1) + delta * delta * count * (tile_count / total)
        mean += delta * (tile_count / total)
        count = total
    partial_ptrs = partial_ptr + split * 3 * C + offs_c
    tl.store(partial_ptrs, count, mask=mask_c)
    tl.store(partial_ptrs + C, mean, mask=mask_c)
    tl.store(partial_ptrs + 2 * C, squares, mask=mask_c)


@triton.jit
def _batch_norm_prior_loss_kernel(
    partial_ptr,  # [splits, 3, C]
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    stats_ptr,  # [2, C]: mean, variance
    norms_ptr,  # [2]
    loss_ptr,  # scalar
    C,
    num_splits,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    splits = tl.arange(0, BLOCK_S)
    mean_sum = 0.0
    var_sum = 0.0
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = (splits < num_splits)[:, None] & mask_c[None, :]
        ptrs = partial_ptr + splits[:, None] * 3 * C + offs_c[None, :]
        count = tl.load(ptrs, mask=mask, other=0.0)
        means = tl.load(ptrs + C, mask=mask, other=0.0)
        squares = tl.load(ptrs + 2 * C, mask=mask, other=0.0)
        total = tl.maximum(tl.sum(count, axis=0), 1.0)
        mean = tl.sum(count * means, axis=0) / total
        shift = means - mean[None, :]
        var = tl.sum(squares + count * shift * shift, axis=0) / total
        tl.store(stats_ptr + offs_c, mean, mask=mask_c)
        tl.store(stats_ptr + C + offs_c, var, mask=mask_c)
        mean_gap = mean - tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        var_gap = var - tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        mean_sum += tl.sum(tl.where(mask_c, mean_gap * mean_gap, 0.0), axis=0)
        var_sum += tl.sum(tl.where(mask_c, var_gap * var_gap, 0.0), axis=0)
    mean_norm = tl.sqrt(mean_sum)
    var_norm = tl.sqrt(var_sum)
    tl.store(norms_ptr, mean_norm)
    tl.store(norms_ptr + 1, var_norm)
    tl.store(loss_ptr, mean_norm + var_norm)


@triton.jit
def _batch_norm_prior_bwd_kernel(
    dloss_ptr,  # scalar
    x_ptr,  # [G, C, P]
    dy_ptr,  # [G, C, P], with AFFINE
    scale_ptr,  # [C], with AFFINE
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    stats_ptr,  # [2, C]
    norms_ptr,  # [2]
    dx_ptr,  # [G, C, P]
    C,
    P,
    num_tiles,
    num_splits,
    num_values,  # of one channel
    stride_xg,
    stride_xc,
    stride_xp,
    AFFINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    split = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = tl.arange(0, BLOCK_P)
    mask_c = offs_c < C
    mean = tl.load(stats_ptr + offs_c, mask=mask_c, other=0.0)
    var = tl.load(stats_ptr + C + offs_c, mask=mask_c, other=0.0)
    mean_gap = mean - tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    var_gap = var - tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean_norm = tl.load(norms_ptr)
    var_norm = tl.load(norms_ptr + 1)
    dloss = tl.load(dloss_ptr).to(tl.float32) / num_values
    # A norm of zero has gradient zero, as in PyTorch.
    slope = 2.0 * dloss * var_gap / tl.where(var_norm == 0.0, float("inf"), var_norm)
    offset = dloss * mean_gap / tl.where(mean_norm == 0.0, float("inf"), mean_norm)
    if AFFINE:
        scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    tiles_p = tl.cdiv(P, BLOCK_P)
    for tile in range(split, num_tiles, num_splits):
        first_p = (tile % tiles_p) * BLOCK_P
        mask = mask_c[:, None] & (first_p + offs_p < P)[None, :]
        first = (tile // tiles_p).to(tl.int64) * stride_xg + first_p.to(tl.int64) * stride_xp
        within = offs_c[:, None] * stride_xc + offs_p[None, :] * stride_xp
        x = tl.load(x_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
        dx = offset[:, None] + slope[:, None] * (x - mean[:, None])
        if AFFINE:
            dx += scale[:, None] * tl.load(dy_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + first + within, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _layout(x: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """Groups, pixels of a group, strides of group, channel and pixel; `x` is dense NCHW or channels_last."""
    B, C, H, W = x.shape
    if x.is_contiguous():
        return B, H * W, (C * H * W, H * W, 1)
    return 1, B * H * W, (0, 1, C)


def _tile(C: int, P: int, pixels_adjoin: bool) -> tuple[int, int]:
    """Channels and pixels of a tile of at most 2048 values, long where memory is contiguous."""
    if pixels_adjoin:
        block_p = min(2048, next_power_of_2(P))
        return max(1, min(next_power_of_2(C), 2048 // block_p)), block_p
    block_c = min(64, next_power_of_2(C))
    return block_c, 2048 // block_c


def batch_norm_prior_forward(
    x: Tensor, running_mean: Tensor, running_var: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x` [B, C, H, W], dense -> `scale * x + shift` like `x`, or empty without them; loss (scalar), mean and variance
    [2, C], the two norms [2], all float32."""
    C = x.shape[1]
    groups, P, strides = _layout(x)
    block_c, block_p = _tile(C, P, strides[2] == 1)
    num_tiles = groups * cdiv(P, block_p)
    splits = min(num_tiles, 2 if arch() == 0 else max(1, min(64, 1056 // cdiv(C, block_c))))
    y = x.new_empty(0) if scale is None else torch.empty_like(x)
    partial = torch.empty((splits, 3, C), dtype=torch.float32, device=x.device)
    stats = torch.empty((2, C), dtype=torch.float32, device=x.device)
    norms = torch.empty(2, dtype=torch.float32, device=x.device)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    scale, shift = (partial if t is None else t.contiguous() for t in (scale, shift))
    _batch_norm_prior_stats_kernel[(cdiv(C, block_c), splits)](
        x, partial, scale, shift, y, C, P, num_tiles, splits, *strides,
        AFFINE=y.numel() > 0, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    block_s = next_power_of_2(splits)
    _batch_norm_prior_loss_kernel[(1,)](
        partial, running_mean.contiguous(), running_var.contiguous(), stats, norms, loss, C, splits,
        BLOCK_C=min(next_power_of_2(C), max(64, 4096 // block_s)), BLOCK_S=block_s, num_warps=8,
    )  # fmt: skip
    return y, loss, stats, norms


def batch_norm_prior_backward(
    dy: Tensor | None,
    x: Tensor,
    dloss: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    stats: Tensor,
    norms: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Gradient of `x`, in its memory format, which is that of `dy`, too; `dy` and `scale` are there or not together."""
    C = x.shape[1]
    groups, P, strides = _layout(x)
    block_c, block_p = _tile(C, P, strides[2] == 1)
    num_tiles = groups * cdiv(P, block_p)
    splits = min(num_tiles, 2 if arch() == 0 else 4096)
    dx = torch.empty_like(x)
    _batch_norm_prior_bwd_kernel[(cdiv(C, block_c), splits)](
        dloss, x, x if dy is None else dy, stats if scale is None else scale.contiguous(),
        running_mean.contiguous(), running_var.contiguous(), stats, norms, dx,
        C, P, num_tiles, splits, groups * P, *strides,
        AFFINE=dy is not None, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=8,
    )  # fmt: skip
    return dx
