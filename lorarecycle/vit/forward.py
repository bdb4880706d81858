"""The forward pass of a frozen timm Vision Transformer (EVA models too) that drops tokens and reads sparse ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.layers import Mlp, resample_abs_pos_embed
from torch import Tensor, nn

from ..adapters.value import POOLS
from ..data.images import Fit
from ..kernels import cls_topk_gather, reference, select_tokens
from .attention import AttentionKind, check_attention
from .block import attend_and_mix, queries_keys_values
from .lora import NO_FACTORS, BlockFactors, LoRA
from .lvvit import ConvStem
from .rotary import Rotation
from .support import own_pool, plain_form, require_plain_vit, share, square_size, with_rgb


class Encoding(NamedTuple):
    """What a forward pass over tokens leaves."""

    tokens: Tensor
    """[B, P + N', D] before the final norm; [B, 1, D], the class token alone, where there is one and no more was asked
    for."""
    kept: Tensor | None
    """int64 [B, N']: positions of the patch tokens on the original grid; None when all are there."""
    scores: Tensor | None
    """[B, N']: attention of the class token in the last block (Eq. 5), or of all tokens in a model without one, if
    asked for."""


class Encoder(nn.Module):
    """The forward pass of a `Backbone`, without loading and merging; arguments and errors are documented there."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        name: str = "vit",
        image_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        resize: str | None = None,
        crop_pct: float | None = None,
        family: str = "",
        attention: AttentionKind = "sdpa",
    ) -> None:
        super().__init__()
        self.attention = check_attention(attention)
        require_plain_vit(vit)
        self.vit: Any = with_rgb(share(plain_form(vit))).requires_grad_(False)
        cfg = getattr(vit, "pretrained_cfg", None) or {}
        self.family = family
        self.own_pool: str = own_pool(vit)
        self.name = name
        self.embed_dim: int = self.vit.embed_dim
        self.num_blocks: int = len(self.vit.blocks)
        self.num_heads: int = self.vit.blocks[0].attn.num_heads
        self.has_class_token: bool = self.vit.cls_token is not None
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.image_size: int = image_size or square_size(vit)
        self.mean: tuple[float, ...] = _triple(mean or cfg.get("mean") or (0.5, 0.5, 0.5), "mean")
        self.std: tuple[float, ...] = _triple(std or cfg.get("std") or (0.5, 0.5, 0.5), "std")
        resize = resize or ("squash" if cfg.get("crop_mode") == "squash" else "crop")
        self.fit: Fit = Fit.of(Fit(self.image_size, resize, crop_pct or cfg.get("crop_pct") or 1.0))
        self.num_patches(self.image_size)
        side = self.image_size // self.patch_size
        if getattr(self.vit, "rotation", None) is not None:  # exporting traces what reads it, not what makes it
            self.vit.rotation.table((side, side), self.device)
        self.register_buffer("_patch_positions", self._resampled_positions((side, side)), persistent=False)
        self.eval()

    def check_pool(self, pool: str) -> None:
        """Make sure that the model has what a feature is of.

        Raises:
            ValueError: an unknown feature, a class token or an attention pool that it does not have.
        """
        if pool not in POOLS:
            raise ValueError(f"`pool` must be one of {POOLS}, got {pool!r}.")
        if pool in ("token", "token+mean") and not self.has_class_token:
            raise ValueError(f"`pool` must be 'avg', 'mean' or 'pooled' for {self.name!r}, which has no class token.")
        if pool == "map" and self.vit.attn_pool is None:
            raise ValueError(f"`pool` must be another than 'map' for {self.name!r}, which has no attention pool.")

    def reads_class_token(self, pool: str) -> bool:
        """Whether a feature needs no other token of the last block."""
        return self._pool_name(pool) == "token"

    def feature_width(self, pool: str = "pooled") -> int:
        """Numbers of a feature: D, or 2 D with "token+mean"."""
        return self.embed_dim * (2 if pool == "token+mean" else 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.patch_embed.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and activations."""
        return self.vit.patch_embed.proj.weight.dtype

    def train(self, mode: bool = True) -> Encoder:
        """Frozen: stays in evaluation mode whatever `mode` says."""
        return super().train(False)

    def has_plain_mlp(self, block: int) -> bool:
        """Whether a block's MLP is fc1, activation, fc2, which can take LoRA factors; gated ones cannot."""
        return type(self.vit.blocks[block].mlp) is Mlp

    def num_patches(self, height: int, width: int | None = None) -> int:
        """Patch tokens of an image.

        Raises:
            ValueError: the patch size does not divide a side.
        """
        width = height if width is None else width
        if height % self.patch_size or width % self.patch_size or height <= 0 or width <= 0:
            raise ValueError(
                f"`image_size` must be a positive multiple of the patch size {self.patch_size}, got {height} x {width}."
            )
        return (height // self.patch_size) * (width // self.patch_size)

    def kept_per_layer(self, prune: Mapping[int, float], num_patches: int) -> dict[int, int]:
        """Patch tokens left after each pruning layer: `n - floor(n * ratio)`, layer after layer.

        Raises:
            ValueError: no such layer, a ratio outside [0, 1), or no token left.
        """
        left, kept = num_patches, {}
        for layer in sorted(prune):
            ratio = prune[layer]
            if not 0 <= layer < self.num_blocks:
                raise ValueError(f"`prune` must name layers 0 to {self.num_blocks - 1}, got {layer}.")
            if not 0 <= ratio < 1:
                raise ValueError(f"`prune[{layer}]` must be a ratio in [0, 1), got {ratio}; no token would be left.")
            left -= math.floor(left * ratio)
            kept[layer] = left
        return kept

    def forward(
        self,
        images: Tensor,
        *,
        lora: LoRA | None = None,
        prune: Mapping[int, float] | None = None,
        kept: Tensor | None = None,
        pool: str = "pooled",
    ) -> Tensor:
        """Features of images.

        Args:
            images: normalised, [B, 3, H, W], any float dtype.
            lora: trainable factors, applied beside the weights.
            prune: `{layer: ratio}`, patch tokens dropped on the way (Sec. 4.3).
            kept: int64 [B, N'], patches to read; the others are never embedded.
            pool: which feature, see `Head.pool`; by default the one that the ViT itself pools.

        Returns:
            [B, D], or [B, 2 D] with `pool="token+mean"`.
        """
        encoding = self.encode(images, lora=lora, prune=prune, kept=kept, class_token_only=self.reads_class_token(pool))
        return self.pool(encoding.tokens, pool)

    def pool(self, tokens: Tensor, pool: str = "pooled") -> Tensor:
        """Feature of a token stream [B, M, D] before the final norm; see `Head.pool`."""
        pool = self._pool_name(pool)
        self.check_pool(pool)
        if pool == "map":
            skipped = 0 if self.vit.pool_include_prefix else self.num_prefix_tokens
            return self.vit.fc_norm(self.vit.attn_pool(self.vit.norm(tokens)[:, skipped:]))
        if pool == "avg":
            return self.vit.fc_norm(self.vit.norm(tokens)[:, self.num_prefix_tokens :].mean(dim=1))
        if pool == "token":
            return self.vit.fc_norm(self.vit.norm(tokens[:, 0]))
        if pool == "mean":
            return tokens[:, self.num_prefix_tokens :].mean(dim=1)
        tokens = self.vit.norm(tokens)  # "token+mean"
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)

    def _pool_name(self, pool: str) -> str:
        return self.own_pool if pool == "pooled" else pool

    def encode(
        self,
        images: Tensor,
        *,
        lora: LoRA | None = None,
        prune: Mapping[int, float] | None = None,
        kept: Tensor | None = None,
        scores: bool = False,
        class_token_only: bool = False,
    ) -> Encoding:
        """The token stream after the last block; arguments as in `forward`.

        Args:
            scores: also return the attention in the last block that patches are ranked by: the class token's, or that
                of all tokens where there is none.
            class_token_only: only the class token of the last block is computed, the rest of its output is not. A
                model without one computes all.

        Raises:
            ValueError: tokens that cannot be pruned so.
        """
        x = self._embed(images.to(self.dtype), kept)
        keep = self.kept_per_layer(prune or {}, x.shape[1] - self.num_prefix_tokens)
        rotation = self._rotation(images, kept)
        attention = None
        for i, block in enumerate(self.vit.blocks):
            factors = NO_FACTORS if lora is None else self._factors(i, lora)
            q, k, v = queries_keys_values(block, x, factors, rotation)
            last = i == self.num_blocks - 1
            if last and scores:
                attention = self._scores(q, k)
            index = None
            narrow = last and class_token_only and self.has_class_token
            if narrow:
                if i in keep:
                    index = reference.top_patches(self._scores(q, k), keep[i])
                x, q = x[:, :1], q[:, :, :1]
            elif i in keep:  # before the attention: a row that is dropped need not attend
                x, index = self._drop(q, k, x, keep[i])
                rows = reference.gather_tokens(q.transpose(1, 2).flatten(2), index, self.num_prefix_tokens)
                q = rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            if index is not None:
                kept = index if kept is None else kept.gather(1, index)
                attention = attention.gather(1, index) if attention is not None else None
                rotation = rotation.select(index) if rotation is not None else None
            x = attend_and_mix(block, x, q, k, v, factors, self.attention)
        return Encoding(x, kept, attention)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """What patches are ranked by, [B, N]."""
        score = reference.cls_attention if self.has_class_token else reference.mean_attention
        return score(q, k, self.num_prefix_tokens)

    def _drop(self, q: Tensor, k: Tensor, x: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
        """The token stream with its `num_keep` best patches, and their positions."""
        if self.has_class_token:
            return cls_topk_gather(q, k, x, num_keep, self.num_prefix_tokens)
        index = reference.top_patches(self._scores(q, k), num_keep)
        return reference.gather_tokens(x, index, self.num_prefix_tokens), index

    def _rotation(self, images: Tensor, kept: Tensor | None) -> Rotation | None:
        positions = getattr(self.vit, "rotation", None)
        if positions is None:
            return None
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        rotation = Rotation(positions.table(grid, images.device), self.num_prefix_tokens, positions.half)
        return rotation if kept is None else rotation.select(kept)

    def _factors(self, i: int, lora: LoRA) -> BlockFactors:
        if not self.has_plain_mlp(i) and lora.adapts(f"blocks.{i}.mlp."):
            raise ValueError(f"`lora` must leave the MLPs of {self.name!r} alone, which are gated; `merge` it instead.")
        return lora.block(i, self.vit.blocks[i])

    def _embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        vit = self.vit
        self.num_patches(*images.shape[-2:])
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        patches, prefix, positions = vit.patch_embed, self._prefix(), self._positions(grid)
        stem = isinstance(patches, ConvStem)  # looks across patches: all are computed
        if kept is not None and positions is not None and isinstance(patches.norm, nn.Identity) and not stem:
            weight, bias = patches.proj.weight, patches.proj.bias
            return vit.norm_pre(select_tokens(images, kept, weight, bias, positions[0], prefix[0]))
        x = patches(images) if stem else patches.norm(_embed_patches(patches.proj, images))
        x = x if positions is None else x + positions
        if kept is not None:
            x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return vit.norm_pre(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1))

    def _prefix(self) -> Any:
        """Class, distillation and register tokens with their position embeddings, [1, P, D]."""
        vit = self.vit
        tokens = [t for t in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if t is not None]
        if not tokens:
            return vit.patch_embed.proj.weight.new_empty(1, 0, self.embed_dim)
        prefix = torch.cat(tokens, dim=1)
        if vit.pos_embed is None or vit.no_embed_class:
            return prefix
        return prefix + vit.pos_embed[:, : self.num_prefix_tokens]

    def _positions(self, grid: tuple[int, int]) -> Any:
        side = self.image_size // self.patch_size
        return self._patch_positions if grid == (side, side) else self._resampled_positions(grid)

    def _resampled_positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Position embeddings of the patches for a grid (rows, columns), [1, N, D]."""
        vit = self.vit
        if vit.pos_embed is None:
            return None
        patches = vit.pos_embed if vit.no_embed_class else vit.pos_embed[:, self.num_prefix_tokens :]
        return resample_abs_pos_embed(
            patches.detach(),
            new_size=list(grid),
            old_size=list(vit.patch_embed.grid_size),
            num_prefix_tokens=0,
        )


def _triple(values: Any, name: str) -> tuple[float, ...]:
    """One number for all channels, or three."""
    numbers = tuple(float(value) for value in values) if isinstance(values, (tuple, list)) else (float(values),)
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
        rule = "one finite number or three" + (", above 0" if name == "std" else "")
        raise ValueError(f"`{name}` must be {rule}, got {values}.")
    return (numbers * 3)[:3]


def _embed_patches(proj: nn.Conv2d, images: Tensor) -> Tensor:
    """[B, N, D]; as a matrix product where the convolution is slow: on a GPU, and where the images want a gradient."""
    if not (images.is_cuda or (torch.is_grad_enabled() and images.requires_grad)):
        return proj(images).flatten(2).transpose(1, 2)
    patches = reference.cut_patches(images, proj.weight.shape[-1])
    return nn.functional.linear(patches.flatten(3).flatten(1, 2), proj.weight.flatten(1), proj.bias)
