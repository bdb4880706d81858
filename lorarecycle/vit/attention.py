"""Softmax attention: PyTorch's own, or xformers' where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

AttentionKind = Literal["sdpa", "xformers"]
MAX_STORED = 2**26
"""Attention weights, over all images and heads, that "sdpa" may keep for the backward pass on a CPU in bfloat16."""


def attend(q: Tensor, k: Tensor, v: Tensor, attention: AttentionKind) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` for every head.

    Args:
        q: queries, [B, H, M, d].
        k, v: keys and values, [B, H, N, d].
        attention: "sdpa" for `torch.nn.functional.scaled_dot_product_attention`, "xformers" for
            `xformers.ops.memory_efficient_attention`. On a CPU in bfloat16, where its backward pass is slow,
            "sdpa" is written out if gradients are wanted and the weights are no more than `MAX_STORED`.

    Returns:
        [B, M, H * d], heads side by side.

    Raises:
        ValueError: xformers, for tensors that are not on a GPU.
    """
    if attention == "sdpa":
        heads = _written_out(q, k, v) if _is_faster_written_out(q, k) else scaled_dot_product_attention(q, k, v)
        return heads.transpose(1, 2).flatten(2)
    from xformers.ops import memory_efficient_attention

    if not q.is_cuda:
        raise ValueError(f"`attention` must be 'sdpa' on {q.device}, got 'xformers', which runs on CUDA devices only.")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers' order is [B, M, H, d]
    return memory_efficient_attention(q, k, v).flatten(2)


def _is_faster_written_out(q: Tensor, k: Tensor) -> bool:
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return trains and slow and q.shape[:3].numel() * k.shape[2] <= MAX_STORED


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def check_attention(attention: str) -> AttentionKind:
    """The argument, after checking that it can run here.

    Raises:
        ValueError: unknown kind.
        ImportError: xformers is asked for and not installed.
    """
    if attention == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ImportError(
            "`attention` must be of an installed package, got 'xformers', which is missing; "
            "`pip install 'lorarecycle[xformers]'`, or use 'sdpa'."
        )
    if attention in ("sdpa", "xformers"):
        return attention  # type: ignore[return-value]
    raise ValueError(f"`attention` must be 'sdpa' or 'xformers', got {attention!r}.")
