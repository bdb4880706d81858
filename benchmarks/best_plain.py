"""The two training steps as a good engineer would write them today with timm and PEFT: what ours must beat.

The precision that the library picks for the machine, frozen and merged weights, `scaled_dot_product_attention`, fused
Adam, whole batches, memory formats that convolutions like; nothing of this library. `baseline.py` holds the published
code's way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def features_of(
    vit: Any, images: Tensor, *, prune: dict[int, float] | None = None, kept: Tensor | None = None
) -> Tensor:
    """The class token's feature [B, D]; patch tokens are dropped in the blocks of `prune`, or read by `kept` alone."""
    x = vit.patch_embed(images)
    x = x + vit.pos_embed[:, 1:]
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for i, block in enumerate(vit.blocks):
        x = _pruned(block, x, prune[i]) if prune and i in prune else block(x)
    return vit.norm(x[:, 0])


def _pruned(block: Any, x: Tensor, ratio: float) -> Tensor:
    """A block in which the patch tokens that the class token attends to least are dropped."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.no_grad():
        scores = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(-1)[:, :, 0, 1:].mean(1)
        n = scores.shape[1]
        kept = scores.topk(n - math.floor(n * ratio), dim=1).indices.sort(dim=1).values + 1
    x = x + attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = torch.cat([x[:, :1], x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))], dim=1)
    return x + block.mlp(block.norm2(x))


class HookedPrior(nn.Module):
    """Eq. 2 through forward hooks on a frozen batch-norm network in `channels_last`."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
        self.losses: list[Tensor] = []
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._hook)

    def _hook(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        self.losses.append((mean - module.running_mean).float().norm() + (var - module.running_var).float().norm())

    def forward(self, images: Tensor) -> Tensor:
        """The prior of a batch [B, 3, H, W], a scalar."""
        self.losses = []
        dtype = next(self.network.parameters()).dtype
        self.network(images.to(dtype, memory_format=torch.channels_last))
        return torch.stack(self.losses).sum()


def inversion_step(
    vit: Any,
    head: nn.Linear,
    prior: HookedPrior | None,
    batch: int,
    prune: dict[int, float] | None = None,
    wrap: Callable[[Any], Any] = lambda loss: loss,
) -> Callable[[], None]:
    """A step of Eq. 1 on images of its own; `vit` and `head` are frozen, `wrap` may compile the loss."""
    device, dtype = vit.pos_embed.device, vit.pos_embed.dtype
    images = torch.randn(batch, 3, 224, 224, device=device).requires_grad_()
    labels = torch.arange(batch, device=device) % head.out_features
    optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99), fused=images.is_cuda)

    def loss_of(seen: Tensor) -> Tensor:
        loss = F.cross_entropy(head(features_of(vit, seen.to(dtype), prune=prune)).float(), labels)
        return loss if prior is None else loss + 0.01 * prior(seen)

    wrapped = wrap(loss_of)

    def step() -> None:
        loss = wrapped(images.roll((3, -2), dims=(2, 3)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(-1, 1)

    return step


def meta_step(
    vit: Any, images: Tensor, n_way: int, n_shot: int, r: int, kept: Tensor | None = None
) -> Callable[[], None]:
    """A step of Eq. 3 with PEFT's LoRA on qkv (one update of rank r for all three), on normalised images."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(vit, LoraConfig(r=r, lora_alpha=r, target_modules=["qkv"]))
    student = wrapped.base_model.model
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3, fused=images.is_cuda)
    S = n_way * n_shot
    targets = torch.rand(len(images) - S, n_way, device=images.device).softmax(dim=-1)

    def step() -> None:
        features = features_of(student, images, kept=kept).float()
        centres = features[:S].view(n_way, n_shot, -1).mean(dim=1)
        logits = -torch.cdist(features[S:], centres)
        loss = F.kl_div(logits.log_softmax(dim=-1), targets, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
