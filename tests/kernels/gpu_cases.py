"""Launches that `gpu_compiler.py` compiles: one function per op and variant, run on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _lora_qkv(
    B: int, T: int, K: int, N: int, S: int, R: int, *, strided: bool = False
) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.lora_qkv_backward_triton import lora_qkv_factor_grads
        from lorarecycle.kernels.lora_qkv_triton import lora_qkv_fold

        def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        factors = meta(S, R, K, dtype=torch.float32), meta(N, R, dtype=torch.float32)
        x, dy = (meta(width, B * T).T if strided else meta(B * T, width) for width in (K, N))
        lora_qkv_fold(meta(N, K), *factors, 1.0)
        lora_qkv_factor_grads(dy, x, *factors, 1.0)

    return launch


def _cls_topk_gather(
    B: int, H: int, M: int, d: int, num_keep: int, num_prefix: int = 1
) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.cls_topk_gather_triton import (
            cls_topk_gather_backward,
            cls_topk_gather_forward,
        )

        qkv = torch.empty((B, M, 3, H, d), dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
        x = torch.empty((B, M, H * d), dtype=dtype, device="meta")
        out, index = cls_topk_gather_forward(qkv[0], qkv[1], x, num_keep, num_prefix)
        cls_topk_gather_backward(out, index, M, num_prefix)

    return launch


def _select_tokens(
    B: int, size: int, patch: int, D: int, num_keep: int, num_prefix: int = 1
) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.select_tokens_triton import select_tokens_backward, select_tokens_forward

        def meta(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        kept = torch.empty((B, num_keep), dtype=torch.int64, device="meta")
        weight = meta(D, 3, patch, patch)
        out = select_tokens_forward(
            meta(B, 3, size, size), kept, weight, meta(D), meta((size // patch) ** 2, D), meta(num_prefix, D)
        )
        select_tokens_backward(out, kept, weight, size, size)

    return launch


def _split_heads(B: int, H: int, M: int, d: int) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.split_heads_triton import merge_heads

        part = torch.empty((B, M, H, d), dtype=dtype, device="meta").transpose(1, 2)  # as attention leaves it
        merge_heads(part, part, part)

    return launch


def _batch_norm_prior(
    B: int, C: int, size: int, memory_format: torch.memory_format, form: str
) -> Callable[[torch.dtype], None]:
    """`form`: "statistics" alone, or an activation, with "+" for a residual before it."""

    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.batch_norm_prior_backward_triton import batch_norm_prior_backward
        from lorarecycle.kernels.batch_norm_prior_triton import batch_norm_prior_forward

        x = torch.empty((B, C, size, size), dtype=dtype, device="meta", memory_format=memory_format)
        running, layer = torch.empty(C, device="meta"), form != "statistics"
        activation, residual = form.removesuffix("+") if layer else "none", x if form.endswith("+") else None
        weight = running if layer else None
        args = (x, running, running, weight, weight, residual, 1e-5, activation, layer)
        y, loss, stats = batch_norm_prior_forward(*args)
        masking = y if residual is not None and activation != "none" else None
        channels = (running, running, weight, weight, stats)
        batch_norm_prior_backward(x if layer else None, loss, x, masking, *channels, 1e-5, activation)

    return launch


# images, tokens, K, N, segments: rows in pieces of 16 bytes, and in single elements
LORA_SHAPES = {"even": (100, 197, 768, 2304, 3), "odd": (3, 49, 100, 66, 3)}
LORA_RANKS = (4, 8, 32, 64)  # 16, 32, 64 and 64 columns of all segments' ranks; rank blocks of 16, 16, 32 and 64

CASES: dict[str, Callable[[torch.dtype], None]] = {
    **{f"lora_qkv/{name}_rank{R}": _lora_qkv(*shape, R) for name, shape in LORA_SHAPES.items() for R in LORA_RANKS},
    "lora_qkv/strided_rank4": _lora_qkv(16, 197, 768, 768, 1, 4, strided=True),
    "lora_qkv/ones": _lora_qkv(1, 1, 1, 1, 1, 1),  # arguments that are 1 are compiled in
    **{
        f"cls_topk_gather/tokens{M}_width{D}": _cls_topk_gather(100, D // d, M, d, max(1, M // 4))
        for M in (10, 17, 50, 101, 197, 400, 577, 1374, 4096)
        for D, d in ((192, 64), (768, 64), (1280, 80))
    },
    "cls_topk_gather/registers": _cls_topk_gather(8, 12, 262, 64, 64, 5),
    **{
        f"select_tokens/patch{patch}_batch{B}": _select_tokens(B, 224, patch, 1024, 36)
        for patch in (8, 14, 16, 32)
        for B in (100, 1)
    },
    "select_tokens/registers": _select_tokens(16, 224, 14, 768, 49, 5),
    "select_tokens/odd": _select_tokens(4, 32, 8, 100, 4, 0),
    **{f"split_heads/{H}x{d}": _split_heads(100, H, 197, d) for H, d in ((12, 64), (3, 64), (16, 80), (3, 24))},
    **{
        f"batch_norm_prior/{name}_{form}": _batch_norm_prior(*shape, memory_format, form)
        for name, *shape, memory_format, forms in (
            ("channels_last", 100, 256, 56, torch.channels_last, ("statistics", "relu", "relu+", "relu6")),
            ("few_channels", 25, 24, 112, torch.channels_last, ("relu6",)),
            ("odd_channels", 3, 70, 9, torch.channels_last, ("relu",)),
            ("nchw", 100, 256, 56, torch.contiguous_format, ("statistics", "relu+")),
            ("nchw_deep", 100, 2048, 7, torch.contiguous_format, ("relu+",)),
        )
        for form in forms
    },
}


def sweep() -> list[Callable[[torch.dtype], None]]:
    """Launches of many more sizes: no configuration of theirs may be missing from `CASES`."""
    launches = [
        _lora_qkv(B, T, K, N, S, R)
        for B, T in ((1, 1), (2, 50), (16, 197), (100, 257))
        for K, N, S in (
            *((D, 3 * D, 3) for D in (40, 48, 100, 192, 384, 768, 1000, 1024, 1408)),
            *((768, 768, 1), (768, 3072, 1), (3072, 768, 1), (1408, 6144, 1), (48, 33, 1)),
        )
        for R in (1, 4, 8, 16, 17, 33, 64)
    ]
    launches += [
        _cls_topk_gather(B, D // 64 or 1, M, d, max(1, M // 4))
        for B in (1, 100)
        for M in (5, 17, 50, 101, 197, 257, 577, 1025, 2500, 4096)
        for D, d in ((192, 64), (768, 64), (1280, 80))
    ]
    launches += [
        _select_tokens(B, size, patch, D, keep, P)
        for B in (1, 16, 100)
        for size, patch in ((224, 16), (224, 14), (224, 8), (384, 32))
        for D in (100, 192, 768, 1024)
        for keep in (1, 36)
        for P in (0, 1, 5)
    ]
    return launches
