"""Triton kernels of `cls_topk_gather` and their launchers; imported on first use.

The class token's attention is computed by one program for each head of each image, selection and gather by one for
each image. The k-th highest score is found bit by bit (scores are not negative, so their bits order as integers), ties
are settled by a running count: no sort, no atomics, the same result every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import MAX_REGISTERS, cdiv, next_power_of_2
from .launch import launch


@triton.jit
def _cls_topk_gather_attention_kernel(
    q_ptr,  # [B, H, M, d]
    k_ptr,  # [B, H, M, d]
    weights_ptr,  # [B, H, M]: attention of the class token
    H,
    M,
    d,
    scale,  # log2(e) / sqrt(d)
    stride_qb,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kd,
    BLOCK_M: tl.constexpr,
    BLOCK_d: tl.constexpr,
):
    head = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_d)
    mask_m = offs_m < M
    q_ptrs = q_ptr + image * stride_qb + head * stride_qh + offs_d * stride_qd
    k_ptrs = k_ptr + image * stride_kb + head * stride_kh + offs_m[:, None] * stride_km + offs_d[None, :] * stride_kd
    logits = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, d, BLOCK_d):
        mask_d = offs_d < d - first
        q = tl.load(q_ptrs + first * stride_qd, mask=mask_d, other=0.0).to(tl.float32)
        k_mask = mask_m[:, None] & mask_d[None, :]
        k = tl.load(k_ptrs + first * stride_kd, mask=k_mask, other=0.0).to(tl.float32)
        logits += tl.sum(k * q[None, :], axis=1)
    logits = tl.where(mask_m, logits * scale, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, axis=0))
    tl.store(weights_ptr + (image * H + head) * M + offs_m, weights / tl.sum(weights, axis=0), mask=mask_m)


@triton.jit
def _cls_topk_gather_fwd_kernel(
    weights_ptr,  # [B, H, M]
    x_ptr,  # [B, M, D]
    out_ptr,  # [B, P + num_keep, D]
    index_ptr,  # [B, num_keep]
    H,
    M,
    D,
    P,
    num_keep,
    stride_xb,
    stride_xm,
    stride_xd,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    scores = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for head in tl.range(0, H, num_stages=NUM_STAGES):
        scores += tl.load(weights_ptr + (image * H + head) * M + offs_m, mask=mask_m, other=0.0)

    scores = tl.where(scores == scores, scores, float("inf"))  # NaN ranks first, whatever its sign bit
    is_patch = (offs_m >= P) & mask_m
    bits = tl.where(is_patch, scores.to(tl.int32, bitcast=True), -1)
    threshold = tl.full((), 0, tl.int32)
    for step in range(0, 31):
        candidate = threshold | (1 << (30 - step))
        count = tl.sum((bits >= candidate).to(tl.int32), axis=0)
        threshold = tl.where(count >= num_keep, candidate, threshold)
    above = bits > threshold
    tied = bits == threshold
    tied_kept = num_keep - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= tied_kept))
    position = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(index_ptr + image * num_keep + position, (offs_m - P).to(tl.int64), mask=kept)
    tl.debug_barrier()  # the positions written above are read back by other threads of this program

    offs_rows = tl.arange(0, BLOCK_ROWS)
    offs_D = tl.arange(0, BLOCK_D)
    num_rows = P + num_keep
    for first_row in range(0, num_rows, BLOCK_ROWS):
        rows = first_row + offs_rows
        mask_rows = rows < num_rows
        from_index = mask_rows & (rows >= P)
        patch = tl.load(index_ptr + image * num_keep + rows - P, mask=from_index, other=0).to(tl.int32)
        source = tl.where(rows >= P, patch + P, rows)
        for first_col in range(0, D, BLOCK_D):
            cols = first_col + offs_D
            mask = mask_rows[:, None] & (cols < D)[None, :]
            x_ptrs = x_ptr + image * stride_xb + source[:, None] * stride_xm + cols[None, :] * stride_xd
            out_ptrs = out_ptr + (image * num_rows + rows[:, None]) * D + cols[None, :]
            tl.store(out_ptrs, tl.load(x_ptrs, mask=mask, other=0.0), mask=mask)


@triton.jit
def _cls_topk_gather_bwd_kernel(
    dout_ptr,  # [B, P + num_keep, D]
    index_ptr,  # [B, num_keep]
    dx_ptr,  # [B, M, D]
    M,
    D,
    P,
    num_keep,
    stride_db,
    stride_dm,
    stride_dd,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_rows = rows < M
    offs_keep = tl.arange(0, BLOCK_KEEP)
    index = tl.load(index_ptr + image * num_keep + offs_keep, mask=offs_keep < num_keep, other=-M).to(tl.int32)
    match = index[None, :] == (rows - P)[:, None]
    position = tl.sum(tl.where(match, offs_keep[None, :] + 1, 0), axis=1) - 1
    kept = (position >= 0) | (rows < P)
    source = tl.where(rows < P, rows, P + position)
    offs_D = tl.arange(0, BLOCK_D)
    for first_col in range(0, D, BLOCK_D):
        cols = first_col + offs_D
        mask_cols = (cols < D)[None, :]
        dout_ptrs = dout_ptr + image * stride_db + source[:, None] * stride_dm + cols[None, :] * stride_dd
        dout = tl.load(dout_ptrs, mask=(kept & mask_rows)[:, None] & mask_cols, other=0.0)
        dx_ptrs = dx_ptr + (image * M + rows[:, None]) * D + cols[None, :]
        tl.store(dx_ptrs, dout, mask=mask_rows[:, None] & mask_cols)


def cls_topk_gather_forward(q: Tensor, k: Tensor, x: Tensor, num_keep: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """`q`, `k` [B, H, M, d], `x` [B, M, D] -> [B, P + num_keep, D] and int64 [B, num_keep]; M up to `MAX_TOKENS`."""
    (B, H, M, d), D = q.shape, x.shape[-1]
    out = torch.empty((B, num_prefix + num_keep, D), dtype=x.dtype, device=x.device)
    index = torch.empty((B, num_keep), dtype=torch.int64, device=x.device)
    weights = torch.empty((B, H, M), dtype=torch.float32, device=x.device)
    block_m = next_power_of_2(max(M, 16))
    block_d = min(next_power_of_2(max(d, 4)), 16384 // block_m)
    num_warps = 8 if block_m <= 1024 else 16
    options = {"num_warps": num_warps, "maxnreg": min(MAX_REGISTERS, 2048 // num_warps)}
    launch(
        _cls_topk_gather_attention_kernel, (H, B, 1),
        q, k, weights, H, M, d, d**-0.5 * 1.4426950408889634,
        q.stride(0), q.stride(1), q.stride(3), k.stride(0), k.stride(1), k.stride(2), k.stride(3),
        BLOCK_M=block_m, BLOCK_d=block_d, **options,
    )  # fmt: skip
    launch(
        _cls_topk_gather_fwd_kernel, (B, 1, 1),
        weights, x, out, index, H, M, D, num_prefix, num_keep, *x.stride(),
        BLOCK_M=block_m, BLOCK_ROWS=16, BLOCK_D=min(1024, next_power_of_2(D)), NUM_STAGES=3, **options,
    )  # fmt: skip
    return out, index


def cls_topk_gather_backward(dout: Tensor, index: Tensor, num_tokens: int, num_prefix: int) -> Tensor:
    """`dout` [B, P + num_keep, D], `index` [B, num_keep] -> [B, num_tokens, D], zero for dropped tokens."""
    (B, _, D), num_keep = dout.shape, index.shape[1]
    dx = torch.empty((B, num_tokens, D), dtype=dout.dtype, device=dout.device)
    block_keep = next_power_of_2(max(num_keep, 16))
    rows = max(1, min(16, 8192 // block_keep))
    launch(
        _cls_topk_gather_bwd_kernel, (B, cdiv(num_tokens, rows), 1),
        dout, index, dx, num_tokens, D, num_prefix, num_keep, dout.stride(0), dout.stride(1), dout.stride(2),
        BLOCK_ROWS=rows, BLOCK_KEEP=block_keep, BLOCK_D=min(512, next_power_of_2(D)), num_warps=4,
        maxnreg=MAX_REGISTERS,  # ptxas of triton 3.9 spills for the sake of occupancy otherwise
    )  # fmt: skip
    return dx
