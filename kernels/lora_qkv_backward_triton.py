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
from .lora_qkv_triton import gemm_tile, precision, rank_block, run_end, skinny_product, tile_of


@triton.jit
def _lora_qkv_dx_kernel(
    dy_ptr,  # [M, S * N]
    weight_ptr,  # [S * N, K]
    lora_A_ptr,  # [L, S, R, K]
    lora_Bt_ptr,  # [L, R, S * N]; rows along the inner dimension load in 16-byte pieces at any rank
    ids_ptr,  # [M / T] or unused
    dx_ptr,  # [M, K]
    g_ptr,  # [M, S, BLOCK_R]: scaling * dy B, written where STORE_G
    M,
    N,
    K,
    S,
    R,
    T,
    scaling,
    stride_dym,
    stride_dyn,
    HAS_IDS: tl.constexpr,
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

    first_image = (pid_m * BLOCK_M) // T
    last_image = (tl.minimum(M, (pid_m + 1) * BLOCK_M) - 1) // T
    stride_al = S * R * K
    stride_bl = S * N * R
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for segment in range(0, S):
        image = first_image
        adapter = 0
        read_adapter = 0  # where the run wears none, some adapter is read and its product dropped
        if HAS_IDS:
            adapter = tl.load(ids_ptr + image).to(tl.int64)
            read_adapter = tl.maximum(adapter, 0)
        first_n = segment * N
        dy_tile = dy_ptr + rows[:, None] * stride_dym + (first_n + offs_n)[None, :] * stride_dyn
        b_tile = (first_n + offs_n)[:, None] + offs_r[None, :] * (S * N)
        a_tile = (segment * R + offs_r)[:, None] * K + offs_k[None, :]
        mask_a = mask_r[:, None] & mask_k[None, :]
        dy_ptrs = dy_tile
        w_ptrs = weight_ptr + (first_n + offs_n)[:, None] * K + offs_k[None, :]
        b_ptrs = lora_Bt_ptr + read_adapter * stride_bl + b_tile
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

        if HAS_IDS:
            end = run_end(ids_ptr, image, last_image, adapter)
            g = tl.where((offs_m // T < end)[:, None] & (adapter >= 0), g, 0.0)
        g = (g * scaling).to(dtype)
        a = tl.load(lora_A_ptr + read_adapter * stride_al + a_tile, mask=mask_a, other=0.0)
        acc = tl.dot(g, a, acc, input_precision=PRECISION)
        if HAS_IDS:
            image = end
            while image <= last_image:
                adapter = tl.load(ids_ptr + image).to(tl.int64)
                end = run_end(ids_ptr, image, last_image, adapter)
                if adapter >= 0:
                    more = skinny_product(
                        dy_tile,
                        lora_Bt_ptr + adapter * stride_bl + b_tile,
                        mask_r,
                        N,
                        stride_dyn,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_R,
                        EVEN_N,
                        PRECISION,
                    )
                    mask_run = (offs_m // T >= image) & (offs_m // T < end)
                    more = tl.where(mask_run[:, None], more * scaling, 0.0).to(dtype)
                    a = tl.load(lora_A_ptr + adapter * stride_al + a_tile, mask=mask_a, other=0.0)
                    acc = tl.dot(more, a, acc, input_precision=PRECISION)
                    g = tl.where(mask_run[:, None], more, g)
                image = end
        if STORE_G:
            g_ptrs = g_ptr + (rows[:, None] * S + segment) * BLOCK_R + offs_r[None, :]
            tl.store(g_ptrs, g, mask=(offs_m < tl.where(pid_k == 0, M, 0))[:, None])

    dx_ptrs = dx_ptr + rows[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dtype), mask=mask_m[:, None] & mask_k[None, :])


@triton.jit
def _lora_qkv_project_kernel(
    x_ptr,  # [M, K], or [M, S * K] where every segment has its own columns
    f_ptr,  # one low-rank factor, contiguous along its inner width
    ids_ptr,  # [M / T] or unused
    h_ptr,  # [M, S, BLOCK_R]: scaling * x F^T
    M,
    K,
    S,
    R,
    T,
    scaling,
    stride_xm,
    stride_xs,
    stride_xk,
    stride_fl,
    stride_fs,
    stride_fr,
    HAS_IDS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_m = tl.program_id(0)
    segment = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R

    x_tile = x_ptr + segment * stride_xs + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    f_tile = f_ptr + segment * stride_fs + offs_k[:, None] + offs_r[None, :] * stride_fr
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if HAS_IDS:
        image = (pid_m * BLOCK_M) // T
        last_image = (tl.minimum(M, (pid_m + 1) * BLOCK_M) - 1) // T
        while image <= last_image:
            adapter = tl.load(ids_ptr + image).to(tl.int64)
            end = run_end(ids_ptr, image, last_image, adapter)
            if adapter >= 0:
                more = skinny_product(
                    x_tile,
                    f_tile + adapter * stride_fl,
                    mask_r,
                    K,
                    stride_xk,
                    BLOCK_M,
                    BLOCK_K,
                    BLOCK_R,
                    EVEN_K,
                    PRECISION,
                )
                h = tl.where(((offs_m // T >= image) & (offs_m // T < end))[:, None], more, h)
            image = end
    else:
        h = skinny_product(x_tile, f_tile, mask_r, K, stride_xk, BLOCK_M, BLOCK_K, BLOCK_R, EVEN_K, PRECISION)
    h_ptrs = h_ptr + (rows[:, None] * S + segment) * BLOCK_R + offs_r[None, :]
    tl.store(h_ptrs, (h * scaling).to(h_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit
def _lora_qkv_factor_grad_kernel(
    x_ptr,  # [M, C], or [M, S * C] where every segment has its own columns
    h_ptr,  # [M, S, BLOCK_R]
    ids_ptr,  # [num_images] or unused
    out_ptr,  # [splits, L, S, C * R]: h^T x of each split of the images
    M,
    C,
    S,
    R,
    T,  # rows of one image; without ids, of one split
    num_images,
    num_splits,
    stride_xm,
    stride_xs,
    stride_xc,
    stride_oc,
    stride_or,
    HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    segment = tl.program_id(1)
    adapter = tl.program_id(2) // num_splits
    split = tl.program_id(2) % num_splits
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R

    x_cols = x_ptr + segment * stride_xs + offs_c[None, :] * stride_xc
    h_cols = h_ptr + segment * BLOCK_R + offs_r[None, :]
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for image in range(split, num_images, num_splits):
        wanted = True
        if HAS_IDS:
            wanted = tl.load(ids_ptr + image) == adapter
        if wanted:
            first = image * T
            for m in range(0, T, BLOCK_M):
                mask_m = (m + offs_m < T) & (first + m + offs_m < M)
                rows = tl.where(mask_m, first + m + offs_m, 0).to(tl.int64)
                mask_x = mask_m[:, None] & mask_c[None, :]
                x = tl.load(x_cols + rows[:, None] * stride_xm, mask=mask_x, other=0.0)
                h = tl.load(h_cols + rows[:, None] * (S * BLOCK_R), mask=mask_m[:, None], other=0.0)
                acc = tl.dot(tl.trans(x), h, acc, input_precision=PRECISION)
    num_adapters = tl.num_programs(2) // num_splits
    slot = (split * num_adapters + adapter) * S + segment
    out_ptrs = out_ptr + slot * C * R + offs_c[:, None] * stride_oc + offs_r[None, :] * stride_or
    tl.store(out_ptrs, acc, mask=mask_c[:, None] & mask_r[None, :])


def lora_qkv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    adapter_ids: Tensor | None,
    need_x: bool,
    need_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `lora_A`, `lora_B`; one not asked for is an empty tensor."""
    (M, K), (L, S, R, _) = x.shape, lora_A.shape
    N = weight.shape[0] // S
    weight, lora_A, lora_Bt = weight.contiguous(), lora_A.contiguous(), lora_B.mT.contiguous()
    T = M if adapter_ids is None else M // adapter_ids.shape[0]
    has_ids, ids = adapter_ids is not None, x if adapter_ids is None else adapter_ids
    empty = x.new_empty(0)
    dx = d_lora_A = d_lora_B = empty
    g = torch.empty((M, S, rank_block(R)), dtype=x.dtype, device=x.device) if need_lora else empty
    if need_x:
        dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
        tile = gemm_tile(M, K, N, 1, rank_block(R) * (1 + has_ids), x.dtype)
        tile["BLOCK_K"], tile["BLOCK_N"] = tile["BLOCK_N"], tile["BLOCK_K"]
        grid = (cdiv(M, tile["BLOCK_M"]) * cdiv(K, tile["BLOCK_K"]),)
        _lora_qkv_dx_kernel[grid](
            dy, weight, lora_A, lora_Bt, ids, dx, g, M, N, K, S, R, T, scaling, dy.stride(0), dy.stride(1),
            HAS_IDS=has_ids, STORE_G=need_lora, EVEN_N=N % tile["BLOCK_N"] == 0, PRECISION=precision(x),
            BLOCK_R=rank_block(R), GROUP_M=8, **tile,
        )  # fmt: skip
    elif need_lora:
        _project(dy, N, lora_Bt, (R * S * N, N, S * N), ids, g, R, N, T, scaling, has_ids)
    if need_lora:
        h = torch.empty_like(g)
        _project(x, 0, lora_A, (S * R * K, R * K, K), ids, h, R, K, T, scaling, has_ids)
        d_lora_A = _factor_grad(x, 0, g, ids, R, K, T, L, (1, K), has_ids).view(L, S, R, K).to(x.dtype)
        d_lora_B = _factor_grad(dy, N, h, ids, R, N, T, L, (R, 1), has_ids).view(L, S * N, R).to(x.dtype)
    return dx, d_lora_A, d_lora_B


def _project(
    x: Tensor,
    stride_xs: int,
    factor: Tensor,
    factor_strides: tuple[int, int, int],
    ids: Tensor,
    out: Tensor,
    R: int,
    K: int,
    T: int,
    scaling: float,
    has_ids: bool,
) -> None:
    """Write `scaling * x F^T` [M, S, BLOCK_R]; `factor_strides` are those of adapter, segment and rank."""
    M, S, block_r = out.shape
    block_m, block_k, stages = (64, 32, 1) if arch() == 0 else (64, 64, 3)
    if block_k == 64 and K % 16:  # loads of single elements, held in registers on their way
        block_m, block_k, stages = (32, 16, 1) if x.dtype == torch.float32 else (64, 32, 1)
    elif block_k == 64 and x.dtype == torch.float32:
        block_k, stages = 32, 2
    grid = (cdiv(M, block_m), S)
    _lora_qkv_project_kernel[grid](
        x, factor, ids, out, M, K, S, R, T, scaling, x.stride(0), stride_xs * x.stride(1), x.stride(1),
        *factor_strides, HAS_IDS=has_ids, EVEN_K=K % block_k == 0, PRECISION=precision(x),
        BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=4, num_stages=stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def _factor_grad(
    x: Tensor,
    stride_xs: int,
    h: Tensor,
    ids: Tensor,
    R: int,
    C: int,
    T: int,
    L: int,
    out_strides: tuple[int, int],
    has_ids: bool,
) -> Tensor:
    """`h^T x` per adapter and segment, float32 [L, S, C * R]; splits are summed in a fixed order."""
    M, S, block_r = h.shape
    block_m, block_c, stages = (64, 64, 1) if arch() == 0 else (64, 128, 3)
    if block_c == 128 and (x.dtype == torch.float32 or C % 16):
        block_m, block_c, stages = 32, 64, 1
    tiles = cdiv(C, block_c) * S * L
    if has_ids:
        num_images = M // T
        splits = max(1, min(num_images, 264 // tiles))
    else:
        splits = max(1, min(cdiv(M, 4 * block_m), 264 // tiles))
        T = cdiv(cdiv(M, splits), block_m) * block_m
        num_images = splits = cdiv(M, T)
    out = torch.empty((splits, L, S, C * R), dtype=torch.float32, device=x.device)
    _lora_qkv_factor_grad_kernel[(cdiv(C, block_c), S, L * splits)](
        x, h, ids, out, M, C, S, R, T, num_images, splits,
        x.stride(0), stride_xs * x.stride(1), x.stride(1), *out_strides,
        HAS_IDS=has_ids, PRECISION=precision(x), BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_R=block_r,
        num_warps=8 if x.dtype == torch.float32 or (has_ids and block_r >= 32) else 4, num_stages=stages,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return out.sum(0)
