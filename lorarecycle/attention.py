"""Softmax attention: PyTorch's own, or xformers' where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Literal

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

AttentionKind = Literal["sdpa", "xformers"]


def attend(q: Tensor, k: Tensor, v: Tensor, attention: AttentionKind) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` for every head.

    Args:
        q: queries, [B, H, M, d].
        k, v: keys and values, [B, H, N, d].
        attention: "sdpa" for `torch.nn.functional.scaled_dot_product_attention`, "xformers" for
            `xformers.ops.memory_efficient_attention`.

    Returns:
        [B, M, H * d], heads side by side.

    Raises:
        ValueError: xformers, for tensors that are not on a GPU.
    """
    if attention == "sdpa":
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    from xformers.ops import memory_efficient_attention

    if not q.is_cuda:
        raise ValueError(f"`attention` must be 'sdpa' on {q.device}, got 'xformers', which runs on CUDA devices only.")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers' order is [B, M, H, d]
    return memory_efficient_attention(q, k, v).flatten(2)


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
