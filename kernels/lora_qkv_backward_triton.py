"""Triton kernels of the gradients of `lora_qkv`'s factors, and their launcher; imported on first use.

`dB = s dy^T h` needs `h = x A^T`, `dA = dh^T x` needs `dh = s dy B`: x is read for h, dy once for dh and dB, x again
for dA. Keeping h from the forward pass would save nothing: x would be read for it there. Sums over rows are split and
added up in a fixed order: no atomics, the same result every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import MAX_REGISTERS, arch, cdiv, large_shared, next_power_of_2, precision


@triton.jit
def _lora_qkv_project_kernel(
    x_ptr,  # [M, K]
    lora_A_ptr,  # [S, R, K]
    h_ptr,  # [M, S, block_r]: scaling * x A^T; columns from R on stay unwritten
    M,
    K,
    S,
    R,
    block_r,
    scaling,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,  # ranks of all segments, one after the other
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_c = offs_c < S * R
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    a_ptrs = lora_A_ptr + offs_k[:, None] + offs_c[None, :] * K
    h = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_c[None, :], other=0.0).to(x.dtype)
        h = tl.dot(x, a, h, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K
    h_ptrs = h_ptr + (rows[:, None] * S + (offs_c // R)[None, :]) * block_r + (offs_c % R)[None, :]
    tl.store(h_ptrs, (h * scaling).to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def _lora_qkv_dy_kernel(
    dy_ptr,  # [M, S * N]
    h_ptr,  # [M, S, BLOCK_R]
    lora_B_ptr,  # [S * N, R]
    dh_ptr,  # [tiles of a segment, M, width]: dy B of each tile's outputs; columns from S * R on stay unwritten
    d_lora_B_ptr,  # [splits, S * N, R]
    M,
    N,
    S,
    R,
    width,
    rows_per_split,
    scaling,
    stride_dym,
    stride_dyn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    segment = tl.program_id(0) // tiles_n
    tile = tl.program_id(0) % tiles_n
    split = tl.program_id(1)
    local_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < N
    offs_n = segment * N + local_n
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    dtype: tl.constexpr = dy_ptr.dtype.element_ty

    b_ptrs = lora_B_ptr + offs_n[:, None] * R + offs_r[None, :]
    b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
    b = (b.to(tl.float32) * scaling).to(dtype)
    dh_cols = dh_ptr + tile.to(tl.int64) * M * width + segment * R + offs_r[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    first = split * rows_per_split
    for m in range(first, tl.minimum(M, first + rows_per_split), BLOCK_M):
        mask_m = m + offs_m < M
        rows = tl.where(mask_m, m + offs_m, 0).to(tl.int64)
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        h_ptrs = h_ptr + (rows[:, None] * S + segment) * BLOCK_R + offs_r[None, :]
        h = tl.load(h_ptrs, mask=mask_m[:, None], other=0.0)
        dh = tl.dot(dy, b, input_precision=PRECISION)
        acc = tl.dot(tl.trans(dy), h, acc, input_precision=PRECISION)
        tl.store(dh_cols + rows[:, None] * width, dh, mask=mask_m[:, None] & mask_r[None, :])
    out_ptrs = d_lora_B_ptr + (split.to(tl.int64) * S * N + offs_n[:, None]) * R + offs_r[None, :]
    tl.store(out_ptrs, acc, mask=mask_n[:, None] & mask_r[None, :])


@triton.jit
def _lora_qkv_dA_kernel(
    x_ptr,  # [M, K]
    dh_ptr,  # [M, width]
    d_lora_A_ptr,  # [splits, S * R, K]
    M,
    K,
    columns,  # S * R
    width,
    rows_per_split,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(1)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_k = offs_k < K
    mask_c = offs_c < columns

    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    first = split * rows_per_split
    for m in range(first, tl.minimum(M, first + rows_per_split), BLOCK_M):
        mask_m = m + offs_m < M
        rows = tl.where(mask_m, m + offs_m, 0).to(tl.int64)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        dh = tl.load(dh_ptr + rows[:, None] * width + offs_c[None, :], mask=mask_m[:, None], other=0.0)
        acc = tl.dot(tl.trans(x), dh, acc, input_precision=PRECISION)
    out_ptrs = d_lora_A_ptr + (split.to(tl.int64) * columns + offs_c[None, :]) * K + offs_k[:, None]
    tl.store(out_ptrs, acc, mask=mask_k[:, None] & mask_c[None, :])


@triton.jit(do_not_specialize=["splits_0", "splits_1"])
def _lora_qkv_sum_kernel(
    parts_ptr,  # [splits_0, count_0] and behind it [splits_1, count_1]
    out_ptr,  # [count_0 + count_1]
    count_0,
    splits_0,
    count_1,
    splits_1,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    blocks_0 = tl.cdiv(count_0, BLOCK)
    second = tl.program_id(0) >= blocks_0
    offs = (tl.program_id(0) - tl.where(second, blocks_0, 0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.where(second, count_1, count_0).to(tl.int64)
    splits = tl.where(second, splits_1, splits_0)
    parts_ptr += tl.where(second, splits_0.to(tl.int64) * count_0, 0)
    out_ptr += tl.where(second, count_0, 0)
    mask = offs < count
    offs_s = tl.arange(0, BLOCK_SPLITS)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + offs_s
        parts = tl.load(
            parts_ptr + split[:, None] * count + offs[None, :],
            mask=(split < splits)[:, None] & mask[None, :],
            other=0.0,
        )
        total += tl.sum(parts, axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def lora_qkv_factor_grads(dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`dy` [M, N], `x` [M, K], `lora_A` [S, R, K], `lora_B` [N, R] -> their gradients, flat, one behind the other.

    In the wider dtype of the factors. x is read once for h and once for dA where S * R is at most 64, else once
    more for every further 64.
    """
    (M, K), (S, R, _) = x.shape, lora_A.shape
    N = lora_B.shape[0] // S
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    block_r, block_c = max(16, next_power_of_2(R)), min(64, max(16, next_power_of_2(S * R)))
    width = cdiv(S * R, block_c) * block_c
    x_tile, dy_tile = _x_tile(x), _dy_tile(dy, N, block_r)

    h = torch.empty((M, S, block_r), dtype=x.dtype, device=x.device)
    tile = _project_tile(x)
    _lora_qkv_project_kernel[(cdiv(M, tile["BLOCK_M"]), cdiv(S * R, block_c))](
        x, lora_A, h, M, K, S, R, block_r, scaling, x.stride(0), x.stride(1),
        PRECISION=precision(x), BLOCK_C=block_c, **tile,
    )  # fmt: skip

    tiles_n = cdiv(N, dy_tile["BLOCK_N"])
    tiles_k = cdiv(K, x_tile["BLOCK_K"]) * cdiv(S * R, block_c)
    splits_B, rows_B = _splits(M, dy_tile["BLOCK_M"], tiles_n * S)
    splits_A, rows_A = _splits(M, x_tile["BLOCK_M"], tiles_k)
    count_A, count_B = S * R * K, S * N * R
    parts = torch.empty(splits_A * count_A + splits_B * count_B, dtype=torch.float32, device=x.device)
    dh_parts = torch.empty((tiles_n, M, width), dtype=torch.float32, device=x.device)
    _lora_qkv_dy_kernel[(tiles_n * S, splits_B)](
        dy, h, lora_B, dh_parts, parts[splits_A * count_A :], M, N, S, R, width, rows_B, scaling,
        dy.stride(0), dy.stride(1), PRECISION=precision(x), BLOCK_R=block_r, **dy_tile,
    )  # fmt: skip
    dh = torch.empty((M, width), dtype=x.dtype, device=x.device)
    _sum(dh_parts, dh, M * width, tiles_n)

    _lora_qkv_dA_kernel[(cdiv(K, x_tile["BLOCK_K"]), splits_A, cdiv(S * R, block_c))](
        x, dh, parts, M, K, S * R, width, rows_A, x.stride(0), x.stride(1),
        PRECISION=precision(x), BLOCK_C=block_c, **x_tile,
    )  # fmt: skip
    out = torch.empty(count_A + count_B, dtype=torch.promote_types(lora_A.dtype, lora_B.dtype), device=x.device)
    _sum(parts, out, count_A, splits_A, count_B, splits_B)
    return out


def _sum(parts: Tensor, out: Tensor, count_0: int, splits_0: int, count_1: int = 0, splits_1: int = 0) -> None:
    """Write the sums of [splits_0, count_0] and of [splits_1, count_1] behind it, both flat in `parts`."""
    block = 256
    _lora_qkv_sum_kernel[(cdiv(count_0, block) + cdiv(count_1, block),)](
        parts, out, count_0, splits_0, count_1, splits_1, BLOCK=block, BLOCK_SPLITS=8, num_warps=4
    )


def _splits(M: int, block_m: int, tiles: int) -> tuple[int, int]:
    """Number of splits of the rows, and rows of one: two blocks on each of 132 multiprocessors, no empty split."""
    splits = max(1, min(cdiv(M, 2 * block_m), 264 // tiles))
    rows = cdiv(cdiv(M, splits), block_m) * block_m
    return cdiv(M, rows), rows


def _in_pieces(x: Tensor, width: int) -> bool:
    """Whether rows load in pieces of 16 bytes; where not, single elements go through registers."""
    return width % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def _launch(block_m: int, other: str, block: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, other: block, "num_warps": warps, "num_stages": stages, "maxnreg": MAX_REGISTERS}


def _project_tile(x: Tensor) -> dict[str, int]:
    if arch() == 0 or x.dtype == torch.float32 or not _in_pieces(x, x.shape[1]):
        return _launch(64, "BLOCK_K", 32, 4, 1)
    return _launch(64, "BLOCK_K", 64, 4, 4)


def _x_tile(x: Tensor) -> dict[str, int]:
    if arch() == 0 or x.dtype == torch.float32:
        return _launch(32, "BLOCK_K", 64, 8, 1)
    if not _in_pieces(x, x.shape[1]):
        return _launch(64, "BLOCK_K", 64, 4, 1)
    return _launch(64, "BLOCK_K", 128, 4, 3)


def _dy_tile(dy: Tensor, N: int, block_r: int) -> dict[str, int]:
    gpu = arch()
    if gpu == 0 or dy.dtype == torch.float32:
        return _launch(32, "BLOCK_N", 64, 8, 1)
    if not _in_pieces(dy, N):
        return _launch(64, "BLOCK_N", 64, 4, 1)
    if not large_shared(gpu) or (gpu < 90 and block_r > 16):  # before Hopper, B is held in registers
        return _launch(64, "BLOCK_N", 64 if block_r == 64 else 128, 4, 2)
    return _launch(64, "BLOCK_N", 256, 4, 2) if block_r == 16 else _launch(64, "BLOCK_N", 256, 8, 3)
