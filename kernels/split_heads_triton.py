"""Triton kernel behind `split_heads` and its launcher; imported on first use."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import cdiv, next_power_of_2
from .launch import launch


@triton.jit
def _copy_head(from_ptr, to_ptr, image, token, stride_b, stride_h, stride_m, offs_d, mask):
    """A tile of rows of one head, to rows that lie wherever `to_ptr` says."""
    rows = from_ptr + image * stride_b + tl.program_id(1) * stride_h + token * stride_m
    tl.store(to_ptr, tl.load(rows[:, None] + offs_d[None, :], mask=mask, other=0.0), mask=mask)


@triton.jit
def _merge_heads_kernel(
    dq_ptr,  # [B, H, M, d], each with strides of its own, the last 1
    dk_ptr,
    dv_ptr,
    out_ptr,  # [B, M, 3, H, d]
    num_rows,  # B * M
    M,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    H,
    HEAD: tl.constexpr,  # d
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_m < num_rows)[:, None] & (offs_d < HEAD)[None, :]
    image, token = (offs_m // M).to(tl.int64), offs_m % M
    width = H * HEAD
    rows = out_ptr + offs_m.to(tl.int64) * (3 * width) + tl.program_id(1) * HEAD
    to_ptr = rows[:, None] + offs_d[None, :]
    _copy_head(dq_ptr, to_ptr, image, token, stride_qb, stride_qh, stride_qm, offs_d, mask)
    _copy_head(dk_ptr, to_ptr + width, image, token, stride_kb, stride_kh, stride_km, offs_d, mask)
    _copy_head(dv_ptr, to_ptr + 2 * width, image, token, stride_vb, stride_vh, stride_vm, offs_d, mask)


def merge_heads(dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Three [B, H, M, d] of any strides as one [B, M, 3 H d], in one pass."""
    B, H, M, d = dq.shape
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (dq, dk, dv)]
    out = torch.empty((B, M, 3 * H * d), dtype=dq.dtype, device=dq.device)
    block_d = next_power_of_2(d)
    block_m = max(1, 1024 // block_d)
    launch(
        _merge_heads_kernel, (cdiv(B * M, block_m), H, 1),
        *parts, out, B * M, M, *(stride for part in parts for stride in part.stride()[:3]),
        H=H, HEAD=d, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    return out
