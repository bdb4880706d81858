"""Triton kernels of `select_tokens` and their launchers; imported on first use.

A product whose left operand is gathered from the images while it is loaded: neither patches nor tokens of
pruned patches ever exist in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import MAX_REGISTERS, arch, cdiv, large_shared, precision
from .launch import launch


@triton.jit
def _tile_of(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Tile of a program; GROUP_M row tiles share the column tiles they read while these are in L2."""
    group_size = GROUP_M * num_pid_n
    first_m = (pid // group_size) * GROUP_M
    rows = tl.minimum(num_pid_m - first_m, GROUP_M)
    return first_m + (pid % group_size) % rows, (pid % group_size) // rows


@triton.jit
def _select_tokens_fwd_kernel(
    images_ptr,  # [B, C, H, W]
    kept_ptr,  # [B, num_keep]
    weight_ptr,  # [D, C * PATCH * PATCH]
    bias_ptr,  # [D] or unused
    pos_ptr,  # [num_patches, D]
    prefix_ptr,  # [P, D] or unused
    out_ptr,  # [B, P + num_keep, D]
    B,
    D,
    K,  # C * PATCH * PATCH
    P,
    num_keep,
    num_patches,  # of an image
    grid_w,  # patches in a row of it
    stride_ib,
    stride_ic,
    stride_ih,
    stride_iw,
    HAS_BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    T = P + num_keep
    M = B * T
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < D
    image = (offs_m // T).to(tl.int64)
    token = offs_m % T
    is_patch = mask_m & (token >= P)
    patch = tl.load(kept_ptr + image * num_keep + token - P, mask=is_patch, other=0)
    exists = (patch >= 0) & (patch < num_patches)
    patch = tl.where(exists, patch, 0).to(tl.int32)
    corner = image * stride_ib
    corner += (patch // grid_w) * PATCH * stride_ih + (patch % grid_w) * PATCH * stride_iw

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + offs_k
        mask_k = k < K
        channel = k // (PATCH * PATCH)
        row = (k // PATCH) % PATCH
        pixel = channel * stride_ic + row * stride_ih + (k % PATCH) * stride_iw
        mask_x = is_patch[:, None] & mask_k[None, :]
        x = tl.load(images_ptr + corner[:, None] + pixel[None, :], mask=mask_x, other=0.0)
        w_ptrs = weight_ptr + k[:, None] + offs_n[None, :] * K
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    mask_pos = is_patch[:, None] & mask_n[None, :]
    added = tl.load(pos_ptr + patch[:, None] * D + offs_n[None, :], mask=mask_pos, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        added += tl.where(is_patch[:, None], bias[None, :], 0.0)
    if HAS_PREFIX:
        mask_prefix = (mask_m & (token < P))[:, None] & mask_n[None, :]
        prefix = tl.load(prefix_ptr + token[:, None] * D + offs_n[None, :], mask=mask_prefix, other=0.0)
        added += prefix.to(tl.float32)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * D + offs_n[None, :]
    tokens = tl.where(exists[:, None], acc + added, float("nan"))
    tl.store(out_ptrs, tokens.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _select_tokens_dimages_kernel(
    dout_ptr,  # [B, P + num_keep, D]
    kept_ptr,  # [B, num_keep]
    weight_ptr,  # [D, C * PATCH * PATCH]
    dimages_ptr,  # [B, C, H, W], zeros
    B,
    D,
    K,
    P,
    num_keep,
    num_patches,
    grid_w,
    height,
    width,
    stride_db,
    stride_dm,
    stride_dd,
    PATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of a patch
    BLOCK_K: tl.constexpr,  # width of the tokens
    GROUP_M: tl.constexpr,
):
    M = B * num_keep
    pid_m, pid_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < K
    image = (offs_m // num_keep).to(tl.int64)
    dout_rows = dout_ptr + image * stride_db + (P + offs_m % num_keep) * stride_dm

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        k = first + offs_k
        mask_k = k < D
        mask_d = mask_m[:, None] & mask_k[None, :]
        dout = tl.load(dout_rows[:, None] + k[None, :] * stride_dd, mask=mask_d, other=0.0)
        w_ptrs = weight_ptr + k[:, None] * K + offs_n[None, :]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(dout, w, acc, input_precision=PRECISION)

    patch = tl.load(kept_ptr + offs_m, mask=mask_m, other=0)
    exists = mask_m & (patch >= 0) & (patch < num_patches)
    patch = patch.to(tl.int32)
    channel = offs_n // (PATCH * PATCH)
    row = (offs_n // PATCH) % PATCH
    pixel = (channel * height + row) * width + offs_n % PATCH
    channels = K // (PATCH * PATCH)
    corner = image * channels * height * width
    corner += (patch // grid_w) * PATCH * width + (patch % grid_w) * PATCH
    dimages_ptrs = dimages_ptr + corner[:, None] + pixel[None, :]
    tl.store(dimages_ptrs, acc.to(dimages_ptr.dtype.element_ty), mask=exists[:, None] & mask_n[None, :])


def _tile(M: int, N: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    gpu = arch()
    if gpu == 0:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1}
        return tile | {"maxnreg": MAX_REGISTERS}
    if K % 16 == 0 and large_shared(gpu) and cdiv(M, 128) * cdiv(N, 128) >= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


def select_tokens_forward(
    images: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, prefix: Tensor
) -> Tensor:
    """`images` [B, C, H, W], `kept` [B, k], `weight` [D, C, p, p], `prefix` [P, D] -> [B, P + k, D].

    The token of a position that is none is NaN; no memory outside of the image is read.
    """
    B, num_keep = kept.shape
    D, C, patch, _ = weight.shape
    P, K = prefix.shape[0], C * patch * patch
    out = torch.empty((B, P + num_keep, D), dtype=images.dtype, device=images.device)
    tile = _tile(B * (P + num_keep), D, K, images.dtype)
    launch(
        _select_tokens_fwd_kernel, (cdiv(B * (P + num_keep), tile["BLOCK_M"]) * cdiv(D, tile["BLOCK_N"]), 1, 1),
        images, kept.contiguous(), weight.contiguous(), images if bias is None else bias.contiguous(),
        pos_embed.contiguous(), prefix.contiguous() if P else images, out,
        B, D, K, P, num_keep, pos_embed.shape[0], images.shape[3] // patch, *images.stride(),
        HAS_BIAS=bias is not None, HAS_PREFIX=P > 0, PATCH=patch, PRECISION=precision(images), GROUP_M=8,
        **tile,
    )  # fmt: skip
    return out


def select_tokens_backward(dout: Tensor, kept: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Gradient of the images, [B, C, height, width]; zero where a patch was not kept."""
    B, num_keep = kept.shape
    D, C, patch, _ = weight.shape
    K, M = C * patch * patch, B * num_keep
    dimages = torch.zeros((B, C, height, width), dtype=dout.dtype, device=dout.device)
    tile = _tile(M, K, D, dout.dtype)
    launch(
        _select_tokens_dimages_kernel, (cdiv(M, tile["BLOCK_M"]) * cdiv(K, tile["BLOCK_N"]), 1, 1),
        dout, kept.contiguous(), weight.contiguous(), dimages,
        B, D, K, dout.shape[1] - num_keep, num_keep, (height // patch) * (width // patch), width // patch,
        height, width, *dout.stride(),
        PATCH=patch, PRECISION=precision(dout), GROUP_M=8, **tile,
    )  # fmt: skip
    return dimages
