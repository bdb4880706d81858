"""The plain way to take the two training steps, which ours are timed against.

What LoRA Recycle's published code does, written anew: float32; LoRA as separate modules beside a fused qkv; inversion
tracks every parameter, prunes image by image and reads batch-norm statistics from permuted copies; meta-training
computes the teacher's logits in the loop and always sees all tokens.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAQKV(nn.Module):
    """A fused qkv with low-rank updates of q and v as modules of their own."""

    def __init__(self, qkv: nn.Linear, r: int = 4) -> None:
        super().__init__()
        self.qkv, self.width = qkv, qkv.in_features
        self.q_A, self.v_A = nn.Linear(self.width, r, bias=False), nn.Linear(self.width, r, bias=False)
        self.q_B, self.v_B = nn.Linear(r, self.width, bias=False), nn.Linear(r, self.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        y[:, :, : self.width] += self.q_B(self.q_A(x))
        y[:, :, -self.width :] += self.v_B(self.v_A(x))
        return y


class PlainViT(nn.Module):
    """A timm ViT with `LoRAQKV` in every block; the class token after the final norm.

    Args:
        vit: a plain timm VisionTransformer; copied.
        freeze: train the low-rank modules only.
    """

    def __init__(self, vit: Any, *, freeze: bool) -> None:
        super().__init__()
        self.vit = copy.deepcopy(vit).requires_grad_(not freeze)
        for block in self.vit.blocks:
            block.attn.qkv = LoRAQKV(block.attn.qkv)

    def forward(self, images: Tensor, prune: dict[int, float] | None = None) -> Tensor:
        """Features [B, D] of images [B, 3, H, W]; `prune` as in `Backbone.forward`."""
        vit = self.vit
        x = vit.patch_embed(images)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
        for i, block in enumerate(vit.blocks):
            h = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, h, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            if prune and i in prune:
                x = _prune(x, weights[:, :, 0, 1:].mean(dim=1), prune[i])
            x = x + block.mlp(block.norm2(x))
        return vit.norm(x)[:, 0]


def _prune(x: Tensor, scores: Tensor, ratio: float) -> Tensor:
    n = scores.shape[1]
    kept = []
    for image, score in zip(x, scores, strict=True):
        index = score.topk(n - math.floor(n * ratio)).indices.sort().values
        kept.append(torch.cat([image[:1], image[1:][index]]))
    return torch.stack(kept)


class PlainPrior(nn.Module):
    """Eq. 2 through forward hooks on a batch-norm network, its parameters tracked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        self.losses: list[Tensor] = []
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._hook)

    def _hook(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self.losses.append((mean - module.running_mean).norm(2) + (var - module.running_var).norm(2))

    def forward(self, images: Tensor) -> Tensor:
        """The prior of a batch [B, 3, H, W], a scalar."""
        self.losses = []
        self.network(images)
        return torch.stack(self.losses).sum()


def inversion_step(
    model: PlainViT,
    head: nn.Linear,
    prior: PlainPrior | None,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    prune: dict[int, float] | None,
) -> None:
    """One step of Eq. 1 on `images` [B, 3, H, W], a leaf that `optimizer` holds."""
    seen = images.roll((3, -2), dims=(2, 3))
    loss = F.cross_entropy(head(model(seen, prune)), labels)
    if prior is not None:
        loss = loss + 0.01 * prior(seen)
    model.zero_grad()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        images.clamp_(-1, 1)


def meta_step(
    student: PlainViT,
    teacher: PlainViT,
    head: nn.Linear,
    images: Tensor,
    n_way: int,
    n_shot: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """One step of Eq. 3 on normalised `images` [n_way * (n_shot + n_query), 3, H, W], support first."""
    features = student(images)
    S = n_way * n_shot
    centres = features[:S].unflatten(0, (n_way, n_shot)).mean(dim=1)
    logits = -(features[S:, None] - centres[None]).norm(dim=-1)
    with torch.no_grad():
        target = head(teacher(images[S:])).softmax(dim=-1)
    loss = F.kl_div(logits.log_softmax(dim=-1), target, reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
