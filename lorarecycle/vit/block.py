"""What every block of a ViT does with its own weights, in two halves: up to the attention, before which tokens may be
dropped, and from it on. Each half is compiled once for all blocks (`runtime.steps.repeated`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels import split_heads
from ..runtime.steps import repeated
from .attention import AttentionKind, attend
from .lora import BlockFactors, linear
from .rotary import Rotation, rotate


@repeated
def queries_keys_values(
    block: Any, x: Tensor, factors: BlockFactors, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a token stream [B, M, D], each [B, H, M, d]; the first two turned by position."""
    attn = block.attn
    qkv = linear(attn.qkv, block.norm1(x), factors.qkv)
    q, k, v = split_heads(qkv, attn.num_heads)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return q, k, v


@repeated
def attend_and_mix(
    block: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, factors: BlockFactors, attention: AttentionKind
) -> Tensor:
    """The token stream [B, M, D] after attention, projection and MLP, each added to it; `q` has as many rows."""
    heads = attend(q, k, v, attention)
    x = x + block.ls1(linear(block.attn.proj, block.attn.norm(heads), factors.proj))
    return x + block.ls2(_mlp(block.mlp, block.norm2(x), factors))


def _mlp(mlp: Any, x: Tensor, factors: BlockFactors) -> Tensor:
    if factors.fc1 is None and factors.fc2 is None:
        return mlp(x)
    x = mlp.norm(mlp.act(linear(mlp.fc1, x, factors.fc1)))
    return linear(mlp.fc2, x, factors.fc2)
