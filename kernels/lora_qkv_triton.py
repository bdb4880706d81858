"""Forward Triton kernel of `lora_qkv` and its launcher; imported on first use.

Rows are the tokens of all images, flattened. The low-rank product is accumulated beside the main one, from
the same tiles of `x`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import MAX_REGISTERS, arch, cdiv, large_shared, next_power_of_2


@triton.jit
def tile_of(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Tile of a program; GROUP_M row tiles share the column tiles they read while these are in L2."""
    group_size = GROUP_M * num_pid_n
    first_m = (pid // group_size) * GROUP_M
    rows = tl.minimum(num_pid_m - first_m, GROUP_M)
    return first_m + (pid % group_size) % rows, (pid % group_size) // rows


@triton.jit
def _lora_qkv_fwd_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [S * N, K]
    bias_ptr,  # [S * N] or unused
    lora_A_ptr,  # [S, R, K]
    lora_B_ptr,  # [S * N, R]
    y_ptr,  # [M, S * N]
    M,
    N,  # outputs of one segment
    K,
    S,
    R,
    scaling,
    stride_xm,
    stride_xk,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_pid_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), S * num_pid_n, GROUP_M)
    segment = pid_n // num_pid_n
    local_n = (pid_n % num_pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = local_n < N
    offs_n = segment * N + tl.where(mask_n, local_n, 0)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = tl.where(mask_m, offs_m, 0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    dtype: tl.constexpr = y_ptr.dtype.element_ty

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = weight_ptr + offs_k[:, None] + offs_n[None, :] * K
    a_ptrs = lora_A_ptr + offs_k[:, None] + (segment * R + offs_r)[None, :] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
            a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
            a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        h = tl.dot(x, a, h, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K
        a_ptrs += BLOCK_K

    b_ptrs = lora_B_ptr + offs_r[:, None] + offs_n[None, :] * R
    b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0)
    acc = tl.dot((h * scaling).to(dtype), b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * (S * N) + offs_n[None, :]
    tl.store(y_ptrs, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


def precision(x: Tensor) -> str:
    """TF32 for float32 where the user allowed it for PyTorch's own products, else exact float32."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if x.dtype != torch.float32 or allowed else "ieee"


def gemm_tile(M: int, N: int, K: int, segments: int, R: int, dtype: torch.dtype) -> dict[str, int]:
    """Largest tile of [M, K] x [K, segments * N], with rank R beside it, that fills the GPU and does not spill."""
    gpu = arch()
    if gpu == 0:
        tiles = [(64, 64, 32, 4, 1)]
    elif dtype == torch.float32:
        tiles = [(64, 64, 16, 8, 1) if R <= 16 and not (N % 16 or K % 16) else (32, 32, 16, 8, 1)]
    elif N % 16 or K % 16:  # loads of single elements, held in registers on their way
        tiles = [(64, 64, 32, 8, 2) if gpu >= 90 else (32, 64, 32, 8, 2)]
    elif gpu >= 90 and large_shared(gpu):
        tiles = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 4)]
        tiles = tiles[R > 16 :]
    elif R <= 32 and not (N % 32 or K % 32):
        tiles = [(128, 128, 32, 8, 3), (64, 64, 32, 4, 3)]
    else:
        tiles = [(64, 64, 32, 8, 3)]
    for tile in tiles:
        if cdiv(M, tile[0]) * cdiv(N, tile[1]) * segments >= 128 and tile[1] // 2 < N:
            break
    chosen = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile, strict=True))
    # Left to itself, ptxas spills a few registers of a float32 product to fit one more block beside it.
    return chosen | {"maxnreg": MAX_REGISTERS} if dtype == torch.float32 else chosen


def rank_block(R: int) -> int:
    return max(16, next_power_of_2(R))


def lora_qkv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """`x` [M, K], `weight` [N, K], `lora_A` [S, R, K], `lora_B` [N, R] -> [M, N]."""
    (M, K), (S, R, _) = x.shape, lora_A.shape
    N = weight.shape[0] // S
    y = torch.empty((M, S * N), dtype=x.dtype, device=x.device)
    tile = gemm_tile(M, N, K, S, R, x.dtype)
    grid = (cdiv(M, tile["BLOCK_M"]) * S * cdiv(N, tile["BLOCK_N"]),)
    _lora_qkv_fwd_kernel[grid](
        x, weight.contiguous(), x if bias is None else bias.contiguous(), lora_A.contiguous(), lora_B.contiguous(), y,
        M, N, K, S, R, scaling, x.stride(0), x.stride(1),
        HAS_BIAS=bias is not None, EVEN_K=K % tile["BLOCK_K"] == 0,
        PRECISION=precision(x), BLOCK_R=rank_block(R), GROUP_M=8, **tile,
    )  # fmt: skip
    return y
