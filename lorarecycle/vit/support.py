"""Which timm modules a `Backbone` can be: plain Vision Transformers; and copies of them over the same storage."""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from .lvvit import ConvStem
from .rotary import PlainEva, is_eva, require_plain_eva

_POOLS = {"token": "token", "avg": "avg", "map": "map", "": "token"}
"""timm's `global_pool` -> our name; without pooling the class token counts."""
_LUMINANCE = (0.299, 0.587, 0.114)


def require_plain_vit(vit: Any) -> None:
    """Make sure that `Backbone` knows a module's forward pass.

    Raises:
        TypeError: not a timm VisionTransformer.
        ValueError: a variant with other patches, channels, blocks or pooling, named.
    """
    kind = type(vit).__name__
    if not isinstance(vit, VisionTransformer | PlainEva) and not is_eva(vit):
        raise TypeError(
            f"`base` must be a timm VisionTransformer, got a {kind}; choose a plain ViT, such as one of "
            "`timm.list_models('vit_*_patch*')`."
        )
    patches: Any = vit.patch_embed
    if type(patches) not in (PatchEmbed, ConvStem) or patches.patch_size[0] != patches.patch_size[1]:
        raise ValueError(
            f"the backbone must cut images into square patches by one convolution, got {type(patches).__name__} with "
            f"patches {getattr(patches, 'patch_size', None)}."
        )
    _require_pool(vit)
    channels = patches.conv1.in_channels if isinstance(patches, ConvStem) else patches.proj.in_channels
    if channels not in (1, 3):
        raise ValueError(
            f"the backbone must read colour or grey images, 3 channels or 1, got in_chans={channels}; photographs have "
            "no others: create the model with in_chans=3, to which timm adapts pre-trained weights."
        )
    if is_eva(vit):
        require_plain_eva(vit)
        return
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        if type(block) is not Block or type(attn) is not Attention or getattr(attn, "gate", None) is not None:
            raise ValueError(
                f"the backbone must be built of plain timm blocks, got {type(block).__name__} with "
                f"{type(attn).__name__} at blocks.{i}."
            )


def _require_pool(vit: Any) -> None:
    """Class token, mean of the patch tokens, or attention of a learnt query."""
    prefix = " with pool_include_prefix" if getattr(vit, "pool_include_prefix", False) else ""
    if vit.global_pool not in _POOLS or (prefix and vit.global_pool != "map"):
        raise ValueError(
            "the backbone must pool by class token, by the mean of its patch tokens or by attention, got "
            f"global_pool={vit.global_pool!r}{prefix}; choose a model with global_pool 'token', 'avg' or 'map'."
        )
    if vit.cls_token is None and _POOLS[vit.global_pool] == "token":
        raise ValueError(
            f"the backbone must pool where it has no class token, got global_pool={vit.global_pool!r}; create the "
            "model with global_pool='avg'."
        )
    latent: Any = vit.attn_pool
    if vit.global_pool == "map" and (
        type(latent) is not AttentionPoolLatent or latent.out_features != vit.embed_dim or latent.pos_embed is not None
    ):
        raise ValueError(
            f"the backbone must pool by timm's AttentionPoolLatent without positions, of the model's width, got "
            f"{type(latent).__name__}; choose a model with global_pool 'token' or 'avg'."
        )


def own_pool(vit: Any) -> str:
    """The feature that a ViT's own head reads, see `Head.pool`."""
    return _POOLS[vit.global_pool]


def square_size(vit: Any) -> int:
    """Side in pixels of the images that a ViT was built for.

    Raises:
        ValueError: they are not square.
    """
    height, width = vit.patch_embed.img_size
    if height != width:
        raise ValueError(
            f"`image_size` must be given for a model of images that are not square, got {height} x {width}: images are "
            f"brought to squares here; `Backbone.load(..., image_size={min(height, width)})` resamples its positions."
        )
    return int(height)


def plain_form(vit: nn.Module) -> nn.Module:
    """A timm VisionTransformer as it is; of an Eva what `Encoder` reads (see `PlainEva`)."""
    return PlainEva(vit) if is_eva(vit) else vit


def with_rgb(vit: Any) -> Any:
    """The same module; one that reads grey gets filters that read the luminance of RGB (ITU-R 601, as Pillow's "L")."""
    proj = vit.patch_embed.proj
    if proj.in_channels == 1:
        wide = nn.utils.skip_init(nn.Conv2d, 3, proj.out_channels, proj.kernel_size, proj.stride, bias=False)
        luminance = proj.weight.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
        wide.weight = nn.Parameter(proj.weight.data * luminance, requires_grad=False)
        wide.bias = proj.bias
        vit.patch_embed.proj = wide
    return vit


def share(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers are new objects over the same storage."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, memo)
