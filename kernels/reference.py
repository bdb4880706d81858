"""The plain-PyTorch truth of every op: oracle of the tests, fallback and export path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_qkv(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0
) -> Tensor:
    """Linear layer with one low-rank pair per output segment: `y = x W^T + b + s (x A_i^T) B_i^T`.

    A fused qkv has S = 3 segments of N / 3 outputs, every other linear layer one. A segment without an adapter
    has zero factors; smaller ranks are padded with zeros. LoRA (Hu et al. 2022), Sec. 4.1.

    Args:
        x: input, [..., K].
        weight: frozen weight, [N, K].
        bias: [N] or None.
        lora_A: [S, R, K].
        lora_B: [N, R]; rows of segment i belong to `lora_A[i]`.
        scaling: factor of the low-rank product.

    Returns:
        [..., N], in the dtype of `x`.
    """
    S = lora_A.shape[0]
    y = F.linear(x, weight, bias)
    h = F.linear(x, lora_A.flatten(0, 1))  # [..., S R]
    spread = torch.block_diag(*lora_B.chunk(S))  # [N, S R]: one product for all segments
    return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), spread.T, alpha=scaling).view_as(y)


def cls_attention(q: Tensor, k: Tensor, num_prefix: int = 1) -> Tensor:
    """Attention of the class token to the patch tokens, averaged over heads (LoRA Recycle, Eq. 5).

    Args:
        q: queries, [B, H, M, d].
        k: keys, [B, H, M, d].
        num_prefix: class and register tokens in front; they take part in the softmax but are not returned.

    Returns:
        [B, M - num_prefix] in float32, without gradient.
    """
    with torch.no_grad():
        logits = torch.matmul(q[:, :, :1].float(), k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
        return logits.softmax(dim=-1).mean(dim=1)[:, 0, num_prefix:]


def top_patches(scores: Tensor, num_keep: int) -> Tensor:
    """Indices of the `num_keep` highest scores in ascending index order; ties go to the lower index.

    Args:
        scores: [B, N].
        num_keep: static number kept, 1 to N.

    Returns:
        int64 [B, num_keep].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :num_keep].sort(dim=-1).values


def gather_tokens(x: Tensor, index: Tensor, num_prefix: int = 1) -> Tensor:
    """Keep the prefix tokens and the patch tokens at `index`.

    Args:
        x: token stream, [B, P + N, D].
        index: int64 [B, k], positions among the patch tokens.
        num_prefix: P.

    Returns:
        [B, P + k, D].
    """
    patches = x[:, num_prefix:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :num_prefix], patches], dim=1)


def cls_topk_gather(q: Tensor, k: Tensor, x: Tensor, num_keep: int, num_prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Drop the patch tokens that the class token attends to least (LoRA Recycle, Sec. 4.3).

    Args:
        q: queries of the block, [B, H, M, d].
        k: keys of the block, [B, H, M, d].
        x: residual stream after the attention of the block, [B, M, D]; gathered as it is.
        num_keep: patch tokens kept, static.
        num_prefix: class and register tokens, always kept and never ranked.

    Returns:
        the shorter stream [B, num_prefix + num_keep, D] and the kept positions int64 [B, num_keep], ascending.
    """
    index = top_patches(cls_attention(q, k, num_prefix), num_keep)
    return gather_tokens(x, index, num_prefix), index


def batch_norm_prior(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Distance of a feature map's statistics to those of a batch-norm layer (LoRA Recycle, Eq. 2).

    Args:
        x: input of the batch-norm layer, [B, C, H, W].
        running_mean, running_var: [C].

    Returns:
        `||mean - running_mean||_2 + ||var - running_var||_2`, a float32 scalar; the variance is the biased one.
    """
    var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    return torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(var - running_var)
