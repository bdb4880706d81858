"""Forward Triton kernel of `lora_qkv` and its launcher; imported on first use.

Rows are the tokens of all images, flattened. With many adapters (`HAS_IDS`) a tile of rows walks over the
runs of neighbouring images that wear the same adapter: the first run's low-rank product is accumulated
beside the main product, every further run re-reads the tile of `x`. A batch sorted by adapter has few such
tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import MAX_REGISTERS, arch, cdiv, large_shared, next_power_of_2


@triton.jit
def run_end(ids_ptr, image, last_image, adapter):
    """One past the last image of the run of equal adapter ids that starts at `image`."""
    end = image + 1
    while tl.load(ids_ptr + end, mask=end <= last_image, other=-2) == adapter:
        end += 1
    return end


@triton.jit
def tile_of(pid, num_pid_m, num_pid_n, GROUP_M: tl.constexpr):
    """Tile of a program; GROUP_M row tiles share the column tiles they read while these are in L2."""
    group_size = GROUP_M * num_pid_n
    first_m = (pid // group_size) * GROUP_M
    rows = tl.minimum(num_pid_m - first_m, GROUP_M)
    return first_m + (pid % group_size) % rows, (pid % group_size) // rows


@triton.jit
def skinny_product(
    x_ptrs,  # [BLOCK_M, BLOCK_K] tile of pointers at k = 0
    f_ptrs,  # [BLOCK_K, BLOCK_R] tile of pointers at k = 0
    mask_r,
    K,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Product of a row tile with one low-rank factor over the whole inner width."""
    offs_k = tl.arange(0, BLOCK_K)
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
    return h


@triton.jit
def _lora_qkv_fwd_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [S * N, K]
    bias_ptr,  # [S * N] or unused
    lora_A_ptr,  # [L, S, R, K]
    lora_B_ptr,  # [L, S * N, R]
    ids_ptr,  # [M / T] or unused
    y_ptr,  # [M, S * N]
    M,
    N,  # outputs of one segment
    K,
    S,
    R,
    T,  # tokens of one image
    scaling,
    stride_xm,
    stride_xk,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
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

    image = (pid_m * BLOCK_M) // T
    last_image = (tl.minimum(M, (pid_m + 1) * BLOCK_M) - 1) // T
    adapter = 0
    read_adapter = 0  # where the run wears none, some adapter is read and its product dropped
    if HAS_IDS:
        adapter = tl.load(ids_ptr + image).to(tl.int64)
        read_adapter = tl.maximum(adapter, 0)
    a_tile = offs_k[:, None] + offs_r[None, :] * K + segment * R * K
    b_tile = offs_r[:, None] + offs_n[None, :] * R
    stride_al = S * R * K
    stride_bl = S * N * R

    x_tile = x_ptr + rows[:, None] * stride_xm + offs_k[None, :] * stride_xk
    x_ptrs = x_tile
    w_ptrs = weight_ptr + offs_k[:, None] + offs_n[None, :] * K
    a_ptrs = lora_A_ptr + read_adapter * stride_al + a_tile
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

    if HAS_IDS:
        end = run_end(ids_ptr, image, last_image, adapter)
        h = tl.where((offs_m // T < end)[:, None] & (adapter >= 0), h, 0.0)
    b_ptrs = lora_B_ptr + read_adapter * stride_bl + b_tile
    b = tl.load(b_ptrs, mask=mask_r[:, None], other=0.0)
    acc = tl.dot((h * scaling).to(dtype), b, acc, input_precision=PRECISION)
    if HAS_IDS:
        image = end
        while image <= last_image:
            adapter = tl.load(ids_ptr + image).to(tl.int64)
            end = run_end(ids_ptr, image, last_image, adapter)
            if adapter >= 0:
                h = skinny_product(
                    x_tile,
                    lora_A_ptr + adapter * stride_al + a_tile,
                    mask_r,
                    K,
                    stride_xk,
                    BLOCK_M,
                    BLOCK_K,
                    BLOCK_R,
                    EVEN_K,
                    PRECISION,
                )
                h = tl.where(((offs_m // T >= image) & (offs_m // T < end))[:, None], h, 0.0)
                b = tl.load(lora_B_ptr + adapter * stride_bl + b_tile, mask=mask_r[:, None], other=0.0)
                acc = tl.dot((h * scaling).to(dtype), b, acc, input_precision=PRECISION)
            image = end

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * (S * N) + offs_n[None, :]
    tl.store(y_ptrs, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


def precision(x: Tensor) -> str:
    """TF32 for float32 where the user allowed it for PyTorch's own products, else exact float32."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if x.dtype != torch.float32 or allowed else "ieee"


def gemm_tile(M: int, N: int, K: int, segments: int, ranks: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of a product [M, K] x [K, segments * N]: the largest that fills the GPU and does not spill."""
    # `ranks`: columns of low-rank products alive at once; a run of another adapter has its own.
    gpu = arch()
    if gpu == 0:
        tiles = [(64, 64, 32, 4, 1)]
    elif dtype == torch.float32:
        tiles = [(64, 64, 16, 8, 1) if ranks <= 16 and not (N % 16 or K % 16) else (32, 32, 16, 8, 1)]
    elif N % 16 or K % 16:  # loads of single elements, held in registers on their way
        tiles = [(64, 64, 32, 8, 2) if gpu >= 90 else (32, 64, 32, 8, 2)]
    elif gpu >= 90 and large_shared(gpu):
        tiles = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 4)]
        tiles = tiles[ranks > 16 :]
    elif ranks <= 32 and not (N % 32 or K % 32):
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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    adapter_ids: Tensor | None,
) -> Tensor:
    """`x` [M, K], `weight` [N, K], `lora_A` [L, S, R, K], `lora_B` [L, N, R] -> [M, N]."""
    (M, K), (_, S, R, _) = x.shape, lora_A.shape
    N = weight.shape[0] // S
    y = torch.empty((M, S * N), dtype=x.dtype, device=x.device)
    has_ids = adapter_ids is not None
    T = M if adapter_ids is None else M // adapter_ids.shape[0]
    tile = gemm_tile(M, N, K, S, rank_block(R) * (1 + has_ids), x.dtype)
    grid = (cdiv(M, tile["BLOCK_M"]) * S * cdiv(N, tile["BLOCK_N"]),)
    _lora_qkv_fwd_kernel[grid](
        x, weight.contiguous(), x if bias is None else bias.contiguous(),
        lora_A.contiguous(), lora_B.contiguous(), x if adapter_ids is None else adapter_ids, y,
        M, N, K, S, R, T, scaling, x.stride(0), x.stride(1),
        HAS_BIAS=bias is not None, HAS_IDS=has_ids, EVEN_K=K % tile["BLOCK_K"] == 0,
        PRECISION=precision(x), BLOCK_R=rank_block(R), GROUP_M=8, **tile,
    )  # fmt: skip
    return y
