"""Launches that `gpu_compiler.py` compiles: one function per op and variant, run on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _lora_qkv(
    B: int, T: int, K: int, N: int, S: int, R: int, *, num_adapters: int | None = None, need_x: bool = True
) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.lora_qkv_backward_triton import lora_qkv_backward
        from lorarecycle.kernels.lora_qkv_triton import lora_qkv_forward

        def meta(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        L = num_adapters or 1
        x, weight, bias = meta(B * T, K), meta(N, K), meta(N)
        factors = meta(L, S, R, K), meta(L, N, R)
        ids = None if num_adapters is None else torch.empty(B, dtype=torch.int64, device="meta")
        lora_qkv_forward(x, weight, bias, *factors, 1.0, ids)
        lora_qkv_backward(meta(B * T, N), x, weight, *factors, 1.0, ids, need_x, True)

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


def _batch_norm_prior(B: int, C: int, size: int, memory_format: torch.memory_format) -> Callable[[torch.dtype], None]:
    def launch(dtype: torch.dtype) -> None:
        from lorarecycle.kernels.batch_norm_prior_triton import (
            batch_norm_prior_backward,
            batch_norm_prior_forward,
        )

        x = torch.empty((B, C, size, size), dtype=dtype, device="meta", memory_format=memory_format)
        running = torch.empty((2, C), device="meta")
        loss, stats, norms = batch_norm_prior_forward(x, running[0], running[1])
        batch_norm_prior_backward(loss, x, running[0], running[1], stats, norms)

    return launch


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "lora_qkv": _lora_qkv(100, 197, 768, 2304, 3, 4),
    "lora_qkv/no_dx": _lora_qkv(100, 197, 768, 2304, 3, 4, need_x=False),
    "lora_qkv/many": _lora_qkv(100, 197, 768, 2304, 3, 4, num_adapters=8),
    "lora_qkv/rank64": _lora_qkv(100, 257, 1024, 3072, 3, 64),
    "lora_qkv/many_rank64": _lora_qkv(100, 257, 1024, 3072, 3, 64, num_adapters=8),
    "lora_qkv/fc1": _lora_qkv(100, 257, 1024, 4096, 1, 16),
    "lora_qkv/tiny": _lora_qkv(4, 50, 192, 576, 3, 4),
    "lora_qkv/medium": _lora_qkv(16, 197, 768, 2304, 3, 8),
    "lora_qkv/odd": _lora_qkv(3, 49, 100, 66, 3, 3),
    "lora_qkv/many_odd": _lora_qkv(3, 49, 100, 66, 3, 3, num_adapters=2),
    "lora_qkv/rank32": _lora_qkv(100, 197, 768, 2304, 3, 32),
    "lora_qkv/many_rank32": _lora_qkv(100, 197, 768, 2304, 3, 32, num_adapters=8),
    "lora_qkv/many_tiny": _lora_qkv(4, 50, 192, 576, 3, 4, num_adapters=2),
    "cls_topk_gather": _cls_topk_gather(100, 12, 197, 64, 49),
    "cls_topk_gather/large": _cls_topk_gather(100, 16, 257, 64, 64),
    "cls_topk_gather/dinov2": _cls_topk_gather(8, 12, 1374, 64, 342, 5),
    "cls_topk_gather/odd": _cls_topk_gather(3, 3, 50, 80, 12),
    "select_tokens": _select_tokens(100, 224, 16, 768, 49),
    "select_tokens/patch14": _select_tokens(100, 224, 14, 1024, 64, 5),
    "select_tokens/tiny": _select_tokens(4, 32, 8, 100, 4, 0),
    "batch_norm_prior": _batch_norm_prior(100, 256, 56, torch.contiguous_format),
    "batch_norm_prior/channels_last": _batch_norm_prior(100, 256, 56, torch.channels_last),
    "batch_norm_prior/deep": _batch_norm_prior(100, 2048, 7, torch.contiguous_format),
    "batch_norm_prior/odd": _batch_norm_prior(3, 70, 9, torch.channels_last),
}
