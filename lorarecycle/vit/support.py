"""Which timm modules a `Backbone` can be: plain Vision Transformers; and copies of them over the same storage."""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


def require_plain_vit(vit: nn.Module) -> None:
    """Make sure that `Backbone` knows a module's forward pass.

    Raises:
        TypeError: not a timm VisionTransformer.
        ValueError: a variant with other patches, blocks or pooling, named.
    """
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


def share(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers are new objects over the same storage."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b.detach() for b in module.buffers()}
    return copy.deepcopy(module, memo)
