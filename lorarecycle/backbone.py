"""A frozen timm Vision Transformer that wears adapters, drops tokens and reads sparse ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .adapter import SITE_PATTERN, Adapter
from .kernels import reference
from .lora import LoRA


class Encoding(NamedTuple):
    """What a forward pass over tokens leaves."""

    tokens: Tensor
    """[B, P + N', D] before the final norm; [B, 1, D], the class token alone, where no more was asked for."""
    kept: Tensor | None
    """int64 [B, N']: positions of the patch tokens on the original grid; None when all are there."""
    scores: Tensor | None
    """[B, N']: attention of the class token in the last block (Eq. 5), if asked for."""


class Backbone(nn.Module):
    """A frozen `timm.models.VisionTransformer` with a class token.

    The features are the class token after the final norm. Images are float [B, 3, H, W] normalised with `mean` and
    `std`; any height and width that the patch size divides (the position embedding is resampled). The weights never
    train; `merge` gives a copy that shares every tensor it does not change.

    Args:
        vit: the module; its tensors are shared, not copied, and it is left as it is.
        name: what to call it; adapters name it as their base model.
        image_size: side in pixels that preprocessing resizes to; the module's own when None.
        mean, std: input normalisation per RGB channel for pixels in [0, 1].

    Raises:
        TypeError: not a timm VisionTransformer.
        ValueError: a variant whose forward pass this class does not know, named.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        name: str = "vit",
        image_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        _require_plain_vit(vit)
        self.vit: Any = _share(vit).requires_grad_(False)
        cfg = getattr(vit, "pretrained_cfg", None) or {}
        self.name = name
        self.embed_dim: int = self.vit.embed_dim
        self.num_blocks: int = len(self.vit.blocks)
        self.num_heads: int = self.vit.blocks[0].attn.num_heads
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.image_size: int = image_size or self.vit.patch_embed.img_size[0]
        self.mean: tuple[float, ...] = tuple(mean or cfg.get("mean") or (0.5, 0.5, 0.5))
        self.std: tuple[float, ...] = tuple(std or cfg.get("std") or (0.5, 0.5, 0.5))
        self._unmerged: tuple[Backbone, ...] = ()  # a tuple, so that it is no submodule
        self.num_patches(self.image_size)
        side = self.image_size // self.patch_size
        self.register_buffer("_patch_positions", self._resampled_positions((side, side)), persistent=False)
        self.eval()

    @classmethod
    def load(
        cls,
        base: str | PathLike[str] | nn.Module,
        *,
        weights: str | PathLike[str] | None = None,
        image_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Backbone:
        """Load a Vision Transformer.

        Args:
            base: a timm model name; a Hub id ("google/vit-base-patch16-224"); a directory of a transformers
                checkpoint (ViT, DeiT, DINOv2, CLIP vision); a safetensors file whose metadata names its timm
                `architecture`; "demo", the small ViT that comes with the package; or a module.
            weights: local safetensors file for the architecture that `base` names, under timm's or transformers'
                keys; a classifier in it is left out. Fetched from the Hub when None.
            image_size: side in pixels that images are resized to; the pre-training size when None.
            mean, std: input normalisation; the checkpoint's own when None.
            device, dtype: where and in which precision it runs.

        Raises:
            FileNotFoundError, ValueError: the model or its weights cannot be had; the message says how.
        """
        from .backbone_sources import find_vit

        vit, facts = find_vit(base, weights)
        facts = {**facts, **{k: v for k, v in (("mean", mean), ("std", std)) if v is not None}}
        return cls(vit, image_size=image_size, **facts).to(device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights and activations."""
        return self.vit.cls_token.dtype

    def train(self, mode: bool = True) -> Backbone:
        """Frozen: stays in evaluation mode whatever `mode` says."""
        return super().train(False)

    # --- adapters ---------------------------------------------------------------------------------------------

    def site_shape(self, site: str) -> tuple[int, int]:
        """(out, in) of a site's weight.

        Raises:
            ValueError: the backbone has no such site.
        """
        weight, rows = self._site_weight(site)
        return len(range(*rows.indices(weight.shape[0]))), weight.shape[1]

    def check(self, adapter: Adapter) -> None:
        """Make sure that an adapter fits.

        Raises:
            ValueError: other depth, width or sites; the message names adapter, site and both shapes.
        """
        for site, (lora_A, lora_B, _) in adapter.factors.items():
            try:
                shape = self.site_shape(site)
            except ValueError as error:
                raise ValueError(
                    f"adapter {adapter.name!r} must have sites of backbone {self.name!r} only: {error} Choose the base "
                    f"that it was tuned on ({adapter.base_model or 'unknown'})."
                ) from None
            if (lora_B.shape[0], lora_A.shape[1]) != shape:
                raise ValueError(
                    f"adapter {adapter.name!r} must fit backbone {self.name!r}: at {site} it is for a weight "
                    f"{[lora_B.shape[0], lora_A.shape[1]]}, the backbone has {list(shape)}. Choose the base that it "
                    f"was tuned on ({adapter.base_model or 'unknown'})."
                )
        if adapter.head is not None:
            width = self.embed_dim * (2 if adapter.head.pool == "token+mean" else 1)
            if adapter.head.weight.shape[1] != width:
                raise ValueError(
                    f"the head of adapter {adapter.name!r} must read {width} features of backbone {self.name!r}, "
                    f"got weight {list(adapter.head.weight.shape)}."
                )

    def merge(self, adapter: Adapter) -> Backbone:
        """A backbone whose weights hold the adapter: `W + scaling * B A`, added in float32.

        It shares every tensor that the adapter does not touch; this one is left as it is.

        Raises:
            ValueError: the adapter does not fit (see `check`).
        """
        self.check(adapter)
        merged = self.clone()
        changed: set[int] = set()
        for site in adapter.sites:
            weight, rows = merged._site_weight(site)
            if id(weight) not in changed:
                weight.data = weight.data.clone()
                changed.add(id(weight))
            part = weight.data[rows]
            part.copy_(part.float() + adapter.delta(site).to(weight.device))
        merged._unmerged = (self,)
        return merged

    def clone(self) -> Backbone:
        """A backbone over the same storage; moving or casting it leaves this one as it is."""
        origin, self._unmerged = self._unmerged, ()
        try:
            return _share(self)
        finally:
            self._unmerged = origin

    def unmerge(self) -> Backbone:
        """The backbone that `merge` was called on, to the bit.

        Raises:
            ValueError: nothing is merged.
        """
        if not self._unmerged:
            raise ValueError(f"backbone {self.name!r} must hold a merged adapter, got none; call `merge` first.")
        return self._unmerged[0]

    def _site_weight(self, site: str) -> tuple[Any, slice]:
        match = SITE_PATTERN.fullmatch(site)
        if match is None or int(match[1]) >= self.num_blocks:
            raise ValueError(f"no site {site!r} among {self.num_blocks} blocks.")
        block, name = self.vit.blocks[int(match[1])], match[2]
        if name in ("attn.q", "attn.k", "attn.v"):
            weight = block.attn.qkv.weight
            third = weight.shape[0] // 3
            start = "qkv".index(name[-1]) * third
            return weight, slice(start, start + third)
        layer = getattr(block.attn if name == "attn.proj" else block.mlp, name.partition(".")[2], None)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"no site {site!r}: its MLP is a {type(block.mlp).__name__}.")
        return layer.weight, slice(None)

    # --- tokens -----------------------------------------------------------------------------------------------

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
        pool: str = "token",
    ) -> Tensor:
        """Features of images.

        Args:
            images: normalised, [B, 3, H, W], any float dtype.
            lora: trainable factors to wear on top of the weights.
            prune: `{layer: ratio}`, patch tokens dropped on the way (Sec. 4.3).
            kept: int64 [B, N'], patches to read; the others are never embedded beyond the patch projection.
            pool: which feature, see `Head.pool`.

        Returns:
            [B, D], or [B, 2 D] with `pool="token+mean"`.
        """
        encoding = self.encode(images, lora=lora, prune=prune, kept=kept, class_token_only=pool == "token")
        return self.pool(encoding.tokens, pool)

    def pool(self, tokens: Tensor, pool: str = "token") -> Tensor:
        """Feature of a token stream [B, M, D] before the final norm; see `Head.pool`."""
        if pool == "token":
            return self.vit.fc_norm(self.vit.norm(tokens[:, 0]))
        if pool == "mean":
            return tokens[:, self.num_prefix_tokens :].mean(dim=1)
        if pool == "token+mean":
            tokens = self.vit.norm(tokens)
            return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)
        raise ValueError(f"`pool` must be 'token', 'token+mean' or 'mean', got {pool!r}.")

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
            scores: also return the class token's attention in the last block.
            class_token_only: only the class token of the last block is computed, the rest of its output is not.
        """
        x = self._embed(images.to(self.dtype), kept)
        keep = self.kept_per_layer(prune or {}, x.shape[1] - self.num_prefix_tokens)
        attention = None
        for i, block in enumerate(self.vit.blocks):
            q, k, v = self._qkv(i, block, x, lora)
            last = i == self.num_blocks - 1
            if last and scores:
                attention = reference.cls_attention(q, k, self.num_prefix_tokens)
            index = None
            narrow = last and class_token_only
            if narrow:
                if i in keep:
                    index = reference.top_patches(reference.cls_attention(q, k, self.num_prefix_tokens), keep[i])
                x, q = x[:, :1], q[:, :, :1]
            x = x + block.ls1(self._attention_output(i, block, q, k, v, lora))
            if i in keep and not narrow:
                x, index = reference.cls_topk_gather(q, k, x, keep[i], self.num_prefix_tokens)
            if index is not None:
                kept = index if kept is None else kept.gather(1, index)
                attention = attention.gather(1, index) if attention is not None else None
            x = x + block.ls2(self._mlp(i, block, block.norm2(x), lora))
        return Encoding(x, kept, attention)

    def _embed(self, images: Tensor, kept: Tensor | None) -> Tensor:
        vit = self.vit
        self.num_patches(*images.shape[-2:])
        x = vit.patch_embed.proj(images)
        grid = (x.shape[-2], x.shape[-1])
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))
        if vit.pos_embed is not None:
            x = x + self._positions(grid)
        if kept is not None:
            x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([self._prefix().expand(x.shape[0], -1, -1), x], dim=1)
        return vit.norm_pre(x)

    def _prefix(self) -> Any:
        """Class, distillation and register tokens with their position embeddings, [1, P, D]."""
        vit = self.vit
        tokens = [vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token]
        prefix = torch.cat([t for t in tokens if t is not None], dim=1)
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

    def _qkv(self, i: int, block: Any, x: Tensor, lora: LoRA | None) -> tuple[Tensor, Tensor, Tensor]:
        attn = block.attn
        qkv = self._linear(f"blocks.{i}.attn.qkv", attn.qkv, block.norm1(x), lora)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attn.q_norm(q), attn.k_norm(k), v

    def _attention_output(self, i: int, block: Any, q: Tensor, k: Tensor, v: Tensor, lora: LoRA | None) -> Tensor:
        x = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._linear(f"blocks.{i}.attn.proj", block.attn.proj, block.attn.norm(x), lora)

    def _mlp(self, i: int, block: Any, x: Tensor, lora: LoRA | None) -> Tensor:
        mlp = block.mlp
        if lora is None or not lora.adapts(f"blocks.{i}.mlp."):
            return mlp(x)
        if type(mlp) is not Mlp:
            raise ValueError(f"`lora` must leave the MLPs of {self.name!r} alone, which are gated; `merge` it instead.")
        x = mlp.norm(mlp.act(self._linear(f"blocks.{i}.mlp.fc1", mlp.fc1, x, lora)))
        return self._linear(f"blocks.{i}.mlp.fc2", mlp.fc2, x, lora)

    def _linear(self, name: str, layer: Any, x: Tensor, lora: LoRA | None) -> Tensor:
        """A linear layer, with the low-rank factors that `lora` has for it."""
        segments = 3 if name.endswith("qkv") else 1
        factors = lora and lora.layer(name, (layer.in_features, layer.out_features // segments), x.dtype)
        if not factors:
            return layer(x)
        return reference.lora_qkv(x, layer.weight, layer.bias, *factors)


def _share(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers are new objects over the same storage."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, memo)


def _require_plain_vit(vit: nn.Module) -> None:
    kind = type(vit).__name__
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"`base` must be a timm VisionTransformer, got a {kind}; load it by name with `Backbone.load`.")
    if vit.cls_token is None:
        raise ValueError(f"the backbone must have a class token, got a {kind} without one; choose another model.")
    patches: Any = vit.patch_embed
    if type(patches) is not PatchEmbed or patches.patch_size[0] != patches.patch_size[1]:
        raise ValueError(
            f"the backbone must cut images into square patches by one convolution, got {type(patches).__name__} with "
            f"patches {getattr(patches, 'patch_size', None)}."
        )
    if vit.global_pool not in ("token", "avg", ""):
        raise ValueError(f"the backbone must pool by class token, got global_pool={vit.global_pool!r}.")
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention or getattr(attn, "gate", None) is not None:
            raise ValueError(
                f"the backbone must be built of plain timm blocks, got {type(block).__name__} with "
                f"{type(attn).__name__} at blocks.{i}."
            )
