"""What stages cost: operations of a forward pass, the speed of this device, seconds of painting. Estimates."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from .inversion.painted import paint_pictures
from .vit.backbone import Backbone

EFFICIENCY = {"cpu": 0.55, "cuda": 0.4}
"""Share of the speed of one large product that a whole network reaches."""
PASSES = 2.2
"""Cost of a forward pass and a backward pass to the images or to low-rank factors, in forward passes."""
DECOMPOSITION = 60.0
"""Operations of orthogonalising stacked factors and of the decomposition, relative to width * rank^2; they run slower
than products do."""


def forward_flops(
    backbone: Backbone, image_size: int, prune: Mapping[int, float] | None = None, *, patches: int | None = None
) -> float:
    """Floating-point operations of one image's forward pass, two for a multiplication and an addition; `patches` are
    those that are read, all when None."""
    D, patches = backbone.embed_dim, backbone.num_patches(image_size) if patches is None else patches
    total = 2.0 * patches * 3 * backbone.patch_size**2 * D
    kept, left = backbone.kept_per_layer(prune or {}, patches), patches
    for i, block in enumerate(backbone.vit.blocks):
        hidden = sum(p.numel() for p in block.mlp.parameters())
        N = left + backbone.num_prefix_tokens
        total += 2.0 * N * 4 * D * D + 4.0 * N * N * D
        left = kept.get(i, left)
        total += 2.0 * (left + backbone.num_prefix_tokens) * hidden
    return total


def network_flops(network: torch.nn.Module, image_size: int) -> float:
    """Operations of a network's forward pass for one image, counted on a copy without storage."""
    import copy

    from torch.utils.flop_counter import FlopCounterMode

    bare = copy.deepcopy(network).to("meta")
    dtype = next(bare.parameters()).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare(torch.zeros(1, 3, image_size, image_size, device="meta", dtype=dtype))
    return float(counter.get_total_flops())


def flops_per_second(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """What a ViT of that width may reach: a product of its shape is timed for 30 ms."""
    x = torch.randn(8 * 197, width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    torch.nn.functional.linear(x, weight)
    count, start = 0, _now(device)
    while count < 3 or _now(device) - start < 0.03:
        torch.nn.functional.linear(x, weight)
        count += 1
    return EFFICIENCY.get(device.type, 0.4) * count * 2 * x.numel() * len(weight) / (_now(device) - start)


def painting_seconds(size: int) -> float:
    """Seconds that one painted picture takes: four are painted."""
    start = time.perf_counter()
    paint_pictures(4, size, torch.Generator().manual_seed(0))
    return (time.perf_counter() - start) / 4


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
