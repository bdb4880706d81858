"""The plain-PyTorch truth of every op: oracle of the tests, fallback and export path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """Linear layer with one low-rank pair per output segment: `y = x W^T + b + s (x A_i^T) B_i^T`.

    A fused qkv has S = 3 segments of N / 3 outputs, every other linear layer one. A segment without an
    adapter has zero factors; smaller ranks are padded with zeros. LoRA (Hu et al. 2022), Sec. 4.1.

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
    y = F.linear(x, weight, bias)
    h = F.linear(x, lora_A.flatten(0, 1))  # [..., S R]
    spread = torch.block_diag(*lora_B.chunk(lora_A.shape[0]))  # [N, S R]: one product for all segments
    y_rows, h_rows = (t.unsqueeze(0).flatten(0, -2) for t in (y, h))  # of a single vector too
    return torch.addmm(y_rows, h_rows, spread.T, alpha=scaling).view_as(y)


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


def mean_attention(q: Tensor, k: Tensor, num_prefix: int = 0) -> Tensor:
    """Attention that the patch tokens get, averaged over all queries and heads: Eq. 5 for a ViT without class token.

    Args:
        q: queries, [B, H, M, d].
        k: keys, [B, H, M, d].
        num_prefix: register tokens in front; they ask and take part in the softmax but are not returned.

    Returns:
        [B, M - num_prefix] in float32, without gradient.
    """
    with torch.no_grad():
        score = q.new_zeros((q.shape[0], q.shape[2]), dtype=torch.float32)
        for queries, keys in zip(q.unbind(1), k.unbind(1), strict=True):  # one head at a time holds less memory
            logits = torch.matmul(queries.float(), keys.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
            score = score + logits.softmax(dim=-1).mean(dim=1)
        return score[:, num_prefix:] / q.shape[1]


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


def scatter_tokens(dout: Tensor, index: Tensor, num_tokens: int, num_prefix: int = 1) -> Tensor:
    """Gradient of `gather_tokens`: rows go back to where they came from, zero elsewhere.

    Args:
        dout: [B, P + k, D].
        index: int64 [B, k], distinct positions among the patch tokens.
        num_tokens: P + N.
        num_prefix: P.

    Returns:
        [B, num_tokens, D].
    """
    B, _, D = dout.shape
    dx = dout.new_zeros((B, num_tokens, D))
    dx[:, :num_prefix] = dout[:, :num_prefix]
    rows = index.unsqueeze(-1).expand(-1, -1, D) + num_prefix
    return dx.scatter(1, rows, dout[:, num_prefix:])


def cls_topk_gather(q: Tensor, k: Tensor, x: Tensor, num_keep: int, num_prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Drop the patch tokens that the class token attends to least (LoRA Recycle, Sec. 4.3).

    Args:
        q: queries of the block, [B, H, M, d].
        k: keys of the block, [B, H, M, d].
        x: residual stream after the attention of the block, [B, M, D]; gathered as it is.
        num_keep: patch tokens kept, static.
        num_prefix: class and register tokens, always kept and never ranked.

    Returns:
        the shorter stream [B, num_prefix + num_keep, D]; the kept positions int64 [B, num_keep], ascending.
    """
    index = top_patches(cls_attention(q, k, num_prefix), num_keep)
    return gather_tokens(x, index, num_prefix), index


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """All patches, in the order of a convolution's weight.

    Args:
        images: [B, C, H, W].
        patch_size: p, which divides both sides.

    Returns:
        [B, H / p, W / p, C, p, p].
    """
    B, C, H, W = images.shape
    p = patch_size
    return images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)


def gather_patches(images: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    """Pixels of the kept patches.

    Args:
        images: [B, C, H, W].
        kept: int64 [B, k], patch positions in row order.
        patch_size: p.

    Returns:
        [B, k, C * p * p], in the order of a convolution's weight.
    """
    patches = cut_patches(images, patch_size)
    image = torch.arange(len(images), device=images.device)[:, None]
    row, column = kept // patches.shape[2], kept % patches.shape[2]
    return patches[image, row, column].flatten(2)


def select_tokens(
    images: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, prefix: Tensor
) -> Tensor:
    """Tokens of the kept patches, with their position embeddings, behind the prefix tokens.

    Args:
        images: normalised, [B, C, H, W].
        kept: int64 [B, k], patch positions.
        weight: of the patch convolution, [D, C, p, p].
        bias: [D] or None.
        pos_embed: of the patches, [H / p * W / p, D].
        prefix: class and register tokens with their position embeddings already added, [P, D].

    Returns:
        [B, P + k, D].
    """
    patches = gather_patches(images, kept, weight.shape[-1])
    tokens = F.linear(patches, weight.flatten(1), bias) + pos_embed[kept]
    return torch.cat([prefix.expand(images.shape[0], -1, -1), tokens], dim=1)


def select_tokens_dense(
    images: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, prefix: Tensor
) -> Tensor:
    """`select_tokens` as a ViT would do it: embed every patch, then gather. Same arguments and result."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + pos_embed
    tokens = torch.cat([prefix.expand(images.shape[0], -1, -1), tokens], dim=1)
    return gather_tokens(tokens, kept, prefix.shape[0])


def batch_norm_prior(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Distance of a feature map's statistics from those of a batch-norm layer (LoRA Recycle, Eq. 2).

    `||mean - running_mean||_2 + ||var - running_var||_2`, norms over the channels, not squared.

    Args:
        x: input of the layer, [B, C, H, W].
        running_mean: [C].
        running_var: [C]; compared with the biased variance, which is what batch norm uses to normalise.

    Returns:
        scalar, float32 (float64 for float64 input).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    var, mean = torch.var_mean(x.to(wide), dim=(0, 2, 3), correction=0)
    mean_distance = torch.linalg.vector_norm(mean - running_mean.to(wide))
    return mean_distance + torch.linalg.vector_norm(var - running_var.to(wide))


ACTIVATIONS = ("none", "relu", "relu6")


def activate(x: Tensor, activation: str) -> Tensor:
    """`x` after the activation of that name, one of `ACTIVATIONS`."""
    return {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}[activation](x)


def batch_norm_with_prior(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch-norm layer that normalises with its running statistics, what follows it, and its prior.

    Args:
        x: input of the layer, [B, C, H, W].
        running_mean, running_var: [C].
        weight, bias: [C] or None.
        eps: added to the variance.
        activation: "none", "relu" or "relu6", after the layer and the residual.
        residual: added to the layer's output, [B, C, H, W], or None.

    Returns:
        the output, as `x`; the prior of `x`, as `batch_norm_prior`.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    y = F.batch_norm(x, running_mean.to(wide), running_var.to(wide), weight, bias, eps=eps)
    y = activate(y if residual is None else y + residual, activation)
    return y, batch_norm_prior(x, running_mean, running_var)
