"""Triton forward kernels of `batch_norm_prior` and their launcher; imported on first use.

One kernel reads the map once: it leaves mean and squared distances of every split and writes the layer's output. A
small second one merges the splits, side by side over channels; its last block to finish adds up the norms.

A map is seen as [G, C, P]: G images of P pixels where it is NCHW, one group of all pixels where it is channels_last.
Values are taken relative to the channel's first pixel, means and squares kept by Welford's recurrence and merged by
Chan's formula, so that nothing cancels; all in a fixed order, so that results repeat bit by bit.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_target import cdiv, next_power_of_2, processors
from .launch import launch

IN_FRONT = tl.constexpr(16)  # values: what follows starts on a line of memory


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """`z` after the activation; NaN stays NaN, as in PyTorch."""
    if ACTIVATION != "none":
        z = tl.where(z < 0.0, 0.0, z)
    if ACTIVATION == "relu6":
        z = tl.where(z > 6.0, 6.0, z)
    return z


@triton.jit
def layer_of(running_mean, running_var, weight_ptr, bias_ptr, eps, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS):
    """Factor and summand of the frozen layer: `y = scale * x + shift`."""
    scale = tl.rsqrt(running_var + eps)
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    shift = -running_mean * scale
    if HAS_BIAS:
        shift += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def place_of(split, steps, num_steps, P, C, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of a split: first pixel, number of tiles, pixels from one to the next; offset, values from one tile to the next.

    A split of a channels_last map is a stretch of pixels; of an NCHW map, the same pixels of several images.
    """
    wide = tl.cast(C, tl.int64)
    if CHANNELS_LAST:
        first_step = split * steps
        first_p = first_step * BLOCK_P
        pixels = BLOCK_P
        base = first_p * wide
        stride = BLOCK_P * wide
    else:
        tiles_p = tl.cdiv(P, BLOCK_P)
        first_step = (split // tiles_p) * steps
        first_p = (split % tiles_p) * BLOCK_P
        pixels = 0
        base = first_step * wide * P
        stride = wide * P
    return first_p, tl.minimum(steps, num_steps - first_step), pixels, base, stride


@triton.jit
def _batch_norm_prior_fwd_kernel(
    x_ptr,  # [G, C, P]
    residual_ptr,  # like x, with HAS_RESIDUAL
    y_ptr,  # like x, with LAYER
    running_mean_ptr,  # [C], as all of the layer
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    scratch_ptr,  # in front what the next kernel counts in, then [splits, 2, C]: mean relative to the first pixel,
    # squared distances from that mean
    C,
    P,
    steps,  # of a split
    num_steps,  # tiles of pixels of a channels_last map, images of an NCHW one
    eps,
    LAYER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,  # divides the length of contiguous memory
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    split = tl.program_id(1)
    if (tl.program_id(0) == 0) & (split == 0):
        tl.store(scratch_ptr, 0.0)
    if CHANNELS_LAST:
        C = C // VECTOR * VECTOR
    else:
        P = P // VECTOR * VECTOR
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first_p, n, pixels, base, stride = place_of(split, steps, num_steps, P, C, CHANNELS_LAST, BLOCK_P)
    offs_p = tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        within = offs_p[None, :] * C + offs_c[:, None]
        reference = tl.load(x_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    else:
        within = offs_c[:, None] * P + (first_p + offs_p)[None, :]
        reference = tl.load(x_ptr + offs_c * P, mask=mask_c, other=0.0).to(tl.float32)
    if LAYER:
        running_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        running_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32)
        scale, shift = layer_of(
            running_mean, running_var, weight_ptr, bias_ptr, eps, offs_c, mask_c, HAS_WEIGHT, HAS_BIAS
        )

    mean = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)  # of the values that one place of the tile has seen
    squares = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    for i in tl.range(0, n, num_stages=NUM_STAGES):
        mask = mask_c[:, None] & (first_p + i * pixels + offs_p < P)[None, :]
        first = base + i * stride
        x = tl.load(x_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
        if LAYER:
            z = x * scale[:, None] + shift[:, None]
            if HAS_RESIDUAL:
                z += tl.load(residual_ptr + first + within, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + first + within, activated(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)
        value = x - reference[:, None]
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / (i + 1))  # a place that the mask leaves out takes no part in any later step
        squares += delta * (value - mean)

    count = n - (first_p + (n - 1) * pixels + offs_p >= P).to(tl.int32) * (1 if CHANNELS_LAST else n)
    count = count.to(tl.float32)[None, :]
    split_mean = tl.sum(mean * count, axis=1) / tl.sum(count, axis=1)
    gap = mean - split_mean[:, None]
    partial_ptrs = scratch_ptr + IN_FRONT + split * 2 * C + offs_c
    tl.store(partial_ptrs, split_mean, mask=mask_c)
    tl.store(partial_ptrs + C, tl.sum(squares + count * gap * gap, axis=1), mask=mask_c)


@triton.jit
def _batch_norm_prior_loss_kernel(
    x_ptr,  # [G, C, P]; first pixels
    scratch_ptr,  # as the kernel before left it; behind that [2, blocks]: squared distances of mean and variance
    running_mean_ptr,  # [C]
    running_var_ptr,  # [C]
    stats_ptr,  # [2 C + 2]: means, variances, the two norms
    loss_ptr,  # scalar
    C,
    P,
    steps,
    num_steps,
    num_splits,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,  # of the kernel before
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    partial_ptr = scratch_ptr + IN_FRONT
    gaps_ptr = partial_ptr + num_splits * 2 * C
    count = tl.zeros((BLOCK_S, 1), dtype=tl.float32)
    mean = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    for first in tl.range(0, num_splits, BLOCK_S, num_stages=NUM_STAGES):
        split = first + tl.arange(0, BLOCK_S)
        mask = (split < num_splits)[:, None] & mask_c[None, :]
        ptrs = partial_ptr + split[:, None] * 2 * C + offs_c[None, :]
        other_mean = tl.load(ptrs, mask=mask, other=0.0)
        other_squares = tl.load(ptrs + C, mask=mask, other=0.0)
        first_p, n, _, _, _ = place_of(split, steps, num_steps, P, C, CHANNELS_LAST, BLOCK_P)
        per_tile = tl.minimum(BLOCK_P, P - first_p)
        pixels = tl.minimum(n * BLOCK_P, P - first_p) if CHANNELS_LAST else n * per_tile
        other_count = tl.where(split < num_splits, pixels, 0).to(tl.float32)[:, None]
        total = count + other_count
        share = other_count / tl.maximum(total, 1.0)
        delta = other_mean - mean
        mean += delta * share
        squares += other_squares + delta * delta * (count * share)
        count = total
    total = tl.sum(count, axis=0)
    all_mean = tl.sum(mean * count, axis=0) / total
    gap = mean - all_mean[None, :]
    var = tl.sum(squares + count * gap * gap, axis=0) / total
    x_ptrs = x_ptr + offs_c if CHANNELS_LAST else x_ptr + offs_c * P
    all_mean += tl.load(x_ptrs, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(stats_ptr + offs_c, all_mean, mask=mask_c)
    tl.store(stats_ptr + C + offs_c, var, mask=mask_c)

    mean_gap = all_mean - tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    var_gap = var - tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    blocks = tl.num_programs(0)
    tl.store(gaps_ptr + tl.program_id(0), tl.sum(tl.where(mask_c, mean_gap * mean_gap, 0.0), axis=0))
    tl.store(gaps_ptr + blocks + tl.program_id(0), tl.sum(tl.where(mask_c, var_gap * var_gap, 0.0), axis=0))
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(scratch_ptr, 1.0, sem="acq_rel", scope="gpu") == blocks - 1:
        mean_sum = tl.zeros((BLOCK_S,), dtype=tl.float32)
        var_sum = tl.zeros((BLOCK_S,), dtype=tl.float32)
        for first in range(0, blocks, BLOCK_S):
            offs = first + tl.arange(0, BLOCK_S)
            mask_b = offs < blocks
            mean_sum += tl.load(gaps_ptr + offs, mask=mask_b, other=0.0, cache_modifier=".cg")
            var_sum += tl.load(gaps_ptr + blocks + offs, mask=mask_b, other=0.0, cache_modifier=".cg")
        mean_norm = tl.sqrt(tl.sum(mean_sum, axis=0))
        var_norm = tl.sqrt(tl.sum(var_sum, axis=0))
        tl.store(stats_ptr + 2 * C, mean_norm)
        tl.store(stats_ptr + 2 * C + 1, var_norm)
        tl.store(loss_ptr, mean_norm + var_norm)


@lru_cache(maxsize=4096)
def _tile(B: int, C: int, P: int, channels_last: bool, vectors: int, blocks: int) -> tuple[int, int, dict[str, Any]]:
    if channels_last:
        P = B * P
        # fewest idle places; the widest of equals
        block_c = next_power_of_2(C) if C < 32 else min((64, 32), key=lambda block: cdiv(C, block) * block)
        block_p = 2048 // block_c
        num_steps, places = cdiv(P, block_p), 1
    else:
        block_p = min(512, next_power_of_2(P))
        block_c = min(next_power_of_2(C), 2048 // block_p)
        num_steps, places = B, cdiv(P, block_p)
    channel_blocks = cdiv(C, block_c)
    steps = cdiv(num_steps, max(1, blocks // (channel_blocks * places)) if blocks else 3)
    vector = gcd(C if channels_last else P, vectors)
    arguments = {"C": C, "P": P, "steps": steps, "num_steps": num_steps, "CHANNELS_LAST": channels_last}
    arguments |= {"VECTOR": vector, "BLOCK_C": block_c, "BLOCK_P": block_p}
    # single values cannot be copied ahead; their addresses take many registers
    arguments |= {"NUM_STAGES": 1, "num_warps": 8} if vector == 1 else {"NUM_STAGES": 3, "num_warps": 4}
    return channel_blocks, places * cdiv(num_steps, steps), arguments


def tile_of(x: Tensor, blocks: int) -> tuple[int, int, dict[str, Any]]:
    """How programs share a dense map: how many over channels, how many splits, and the kernels' arguments.

    All run at once, `blocks` on each processor, so that none is left to run alone at the end. Tiles have at most 2048
    values and are long where memory is contiguous.
    """
    B, C, H, W = x.shape
    return _tile(B, C, H * W, not x.is_contiguous(), 16 // x.element_size(), blocks * processors(x.device))


def batch_norm_prior_forward(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    layer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x` [B, C, H, W], dense, `residual` laid out alike, the rest [C] and contiguous.

    Returns the layer's output like `x`, empty without `layer`; the loss, a scalar; means, variances and the two norms
    in one [2 C + 2]. The last two are float32.
    """
    C = x.shape[1]
    channel_blocks, splits, tile = tile_of(x, 5)
    y = torch.empty_like(x) if layer else x.new_empty(0)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    stats = torch.empty(2 * C + 2, dtype=torch.float32, device=x.device)
    loss_c = 8
    loss_blocks = cdiv(C, loss_c)
    scratch = torch.empty(16 + 2 * C * splits + 2 * loss_blocks, dtype=torch.float32, device=x.device)
    launch(
        _batch_norm_prior_fwd_kernel, (channel_blocks, splits, 1),
        x, x if residual is None else residual, y, running_mean, running_var,
        running_mean if weight is None else weight, running_mean if bias is None else bias, scratch,
        eps=eps, LAYER=layer, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=activation, **tile,
    )  # fmt: skip
    launch(
        _batch_norm_prior_loss_kernel, (loss_blocks, 1, 1),
        x, scratch, running_mean, running_var, stats, loss,
        C, tile["P"], tile["steps"], tile["num_steps"], splits,
        CHANNELS_LAST=tile["CHANNELS_LAST"], BLOCK_P=tile["BLOCK_P"], BLOCK_C=loss_c,
        BLOCK_S=min(256, max(32, next_power_of_2(splits))), NUM_STAGES=2, num_warps=4,
    )  # fmt: skip
    return y, loss, stats
