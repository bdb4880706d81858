"""Backward Triton kernels of `lora_qkv` and their launcher; imported on first use.

Three steps: dx with g = s dy B beside it (as the forward has h beside y), h = s x A^T once more, and the
gradients of both factors as split products over the rows, summed in a fixed order: no atomics, the same
result every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import MAX_REGISTERS, arch, cdiv
from .lora_qkv_triton import gemm_tile, precision, rank_block, tile_of


@triton.jit
def _lora_qkv_dx_kernel(
    dy_ptr,  # [M, S * N]
    weight_ptr,  # [S * N, K]
    lora_A_ptr,  # [S, R, K]
    lora_Bt_ptr,  # [R, S * N]; rows along the inner dimension load in 16-byte pieces at any rank
    dx_ptr,  # [M, K]
    g_ptr,  # [M, S, BLOCK_R]: scaling * dy B, written where STORE_G
    M,
    N,
    K,
    S,
    R,
    scaling,
    stride_dym,
    stride_dyn,
    STORE_G: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid_m, pid_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    dtype: tl.constexpr = dx_ptr.dtype.element_ty

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for segment in range(0, S):
        cols = segment * N + offs_n
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + cols[None, :] * stride_dyn
        w_ptrs = weight_ptr + cols[:, None] * K + offs_k[None, :]
        b_ptrs = lora_Bt_ptr + cols[:, None] + offs_r[None, :] * (S * N)
        g = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            if EVEN_N:
                dy = tl.load(dy_ptrs)
                w = tl.load(w_ptrs, mask=mask_k[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=mask_r[None, :], other=0.0)
            else:
                mask_n = offs_n < N - n
                dy = tl.load(dy_ptrs, mask=mask_n[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
            g = tl.dot(dy, b, g, input_precision=PRECISION)
            dy_ptrs += BLOCK_N * stride_dyn
            w_ptrs += BLOCK_N * K
            b_ptrs += BLOCK_N

        g = (g * scaling).to(dtype)
        a_ptrs = lora_A_ptr + (segment * R + offs_r)[:, None] * K + offs_k[None, :]
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
        if STORE_G:
            g_ptrs = g_ptr + (rows[:, None] * S + segment) * BLOCK_R + offs_r[None, :]
            tl.store(g_ptrs, g, mask=(offs_m < tl.where(pid_k == 0, M, 0))[:, None])

    dx_ptrs = dx_ptr + rows[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dtype), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit
def _lora_qkv_project_kernel(
    x_ptr,  # [M, K], or [M, S * K] where every segment has its own columns
    f_ptr,  # low-rank factors, contiguous along their inner width
    h_ptr,  # [M, S, BLOCK_R]: scaling * x F^T
    M,
    K,
    S,
    R,
    scaling,
    stride_xm,
    stride_xs,
    stride_xk,
    stride_fs,
    stride_fr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    segment = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R

    x_ptrs = x_ptr + segment * stride_xs + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    f_ptrs = f_ptr + segment * stride_fs + offs_k[:, None] + offs_r[None, :] * stride_fr
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            f = tl.load(f_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            f = tl.load(f_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        h = tl.dot(x, f, h, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        f_ptrs += BLOCK_K
    h_ptrs = h_ptr + (rows[:, None] * S + segment) * BLOCK_R + offs_r[None, :]
    tl.store(h_ptrs, (h * scaling).to(h_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit
def _lora_qkv_factor_grad_kernel(
    x_ptr,  # [M, C], or [M, S * C] where every segment has its own columns
    h_ptr,  # [M, S, BLOCK_R]
    out_ptr,  # [splits, S, C * R]: h^T x of each split of the rows
    M,
    C,
    S,
    R,
    rows_per_split,
    stride_xm,
    stride_xs,
    stride_xc,
    stride_oc,
    stride_or,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    segment = tl.program_id(1)
    split = tl.program_id(2)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R

    x_cols = x_ptr + segment * stride_xs + offs_c[None, :] * stride_xc
    h_cols = h_ptr + segment * BLOCK_R + offs_r[None, :]
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    first = split * rows_per_split
    for m in range(first, tl.minimum(M, first + rows_per_split), BLOCK_M):
        mask_m = m + offs_m < M
        rows = tl.where(mask_m, m + offs_m, 0).to(tl.int64)
        x = tl.load(x_cols + rows[:, None] * stride_xm, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        h = tl.load(h_cols + rows[:, None] * (S * BLOCK_R), mask=mask_m[:, None], other=0.0)
        acc = tl.dot(tl.trans(x), h, acc, input_precision=PRECISION)
    slot = split * S + segment
    out_ptrs = out_ptr + slot * C * R + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or
    tl.store(out_ptrs, acc, mask=mask_c[:, None] & mask_r[None, :])


def lora_qkv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    need_x: bool,
    need_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `lora_A`, `lora_B`; one not asked for is an empty tensor."""
    (M, K), (S, R, _) = x.shape, lora_A.shape
    N = weight.shape[0] // S
    weight, lora_A, lora_Bt = weight.contiguous(), lora_A.contiguous(), lora_B.mT.contiguous()
    empty = x.new_empty(0)
    dx = d_lora_A = d_lora_B = empty
    g = torch.empty((M, S, rank_block(R)), dtype=x.dtype, device=x.device) if need_lora else empty
    if need_x:
        dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
        tile = gemm_tile(M, K, N, 1, R, x.dtype)
        tile["BLOCK_K"], tile["BLOCK_N"] = tile["BLOCK_N"], tile["BLOCK_K"]
        grid = (cdiv(M, tile["BLOCK_M"]) * cdiv(K, tile["BLOCK_K"]),)
        _lora_qkv_dx_kernel[grid](
            dy, weight, lora_A, lora_Bt, dx, g, M, N, K, S, R, scaling, dy.stride(0), dy.stride(1),
            STORE_G=need_lora, EVEN_N=N % tile["BLOCK_N"] == 0, PRECISION=precision(x),
            BLOCK_R=rank_block(R), GROUP_M=8, **tile,
        )  # fmt: skip
    elif need_lora:
        _project(dy, N, lora_Bt, (N, S * N), g, R, N, scaling)
    if need_lora:
        h = torch.empty_like(g)
        _project(x, 0, lora_A, (R * K, K), h, R, K, scaling)
        d_lora_A = _factor_grad(x, 0, g, R, K, (1, K)).view(S, R, K).to(x.dtype)
        d_lora_B = _factor_grad(dy, N, h, R, N, (R, 1)).view(S * N, R).to(x.dtype)
    return dx, d_lora_A, d_lora_B


def _project(
    x: Tensor,
    stride_xs: int,
    factor: Tensor,
    factor_strides: tuple[int, int],
    out: Tensor,
    R: int,
    K: int,
    scaling: float,
) -> None:
    """Write `scaling * x F^T` [M, S, BLOCK_R]; `factor_strides` are those of segment and rank."""
    M, S, block_r = out.shape
    block_m, block_k, stages = (64, 32, 1) if arch() == 0 else (64, 64, 3)
    if block_k == 64 and K % 16:  # loads of single elements, held in registers on their way
        block_m, block_k, stages = (32, 16, 1) if x.dtype == torch.float32 else (64, 32, 1)
    elif block_k == 64 and x.dtype == torch.float32:
        block_k, stages = 32, 2
    grid = (cdiv(M, block_m), S)
    _lora_qkv_project_kernel[grid](
        x, factor, out, M, K, S, R, scaling, x.stride(0), stride_xs * x.stride(1), x.stride(1),
        *factor_strides, EVEN_K=K % block_k == 0, PRECISION=precision(x),
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4, num_stages=stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _factor_grad(x: Tensor, stride_xs: int, h: Tensor, R: int, C: int, out_strides: tuple[int, int]) -> Tensor:
    """`h^T x` of each segment, float32 [S, C * R]; `out_strides` are those of column and rank.

    The rows are split where columns and segments do not fill the GPU; splits are summed in a fixed order.
    """
    M, S, block_r = h.shape
    block_m, block_c, stages = (64, 64, 1) if arch() == 0 else (64, 128, 3)
    if block_c == 128 and (x.dtype == torch.float32 or C % 16):
        block_m, block_c, stages = 32, 64, 1
    tiles = cdiv(C, block_c) * S
    splits = max(1, min(cdiv(M, 4 * block_m), 264 // tiles))
    rows_per_split = cdiv(cdiv(M, splits), block_m) * block_m
    splits = cdiv(M, rows_per_split)
    out = torch.empty((splits, S, C * R), dtype=torch.float32, device=x.device)
    _lora_qkv_factor_grad_kernel[(cdiv(C, block_c), S, splits)](
        x, h, out, M, C, S, R, rows_per_split,
        x.stride(0), stride_xs * x.stride(1), x.stride(1), *out_strides,
        PRECISION=precision(x), BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_R=block_r,
        num_warps=8 if x.dtype == torch.float32 else 4, num_stages=stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return out.sum(0)
