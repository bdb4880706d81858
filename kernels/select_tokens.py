"""`select_tokens`: the sequence of a ViT from its kept patches alone; pruned patches are never embedded.

Opaque to `torch.compile`: a product with a gathered operand is nothing that Inductor makes by itself.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import reference
from .backend import choose_backend, on_device_of
from .registration import register


@cache  # an import statement costs as much as a small allocation
def _triton() -> ModuleType:
    from . import select_tokens_triton

    return select_tokens_triton


def _forward(
    images: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, prefix: Tensor
) -> Tensor:
    with on_device_of(images):
        return _triton().select_tokens_forward(images, kept, weight, bias, pos_embed, prefix)


def _forward_fake(images, kept, weight, bias, pos_embed, prefix):
    return images.new_empty((kept.shape[0], prefix.shape[0] + kept.shape[1], weight.shape[0]))


def _backward(dout: Tensor, kept: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    with on_device_of(dout):
        return _triton().select_tokens_backward(dout, kept, weight, height, width)


def _backward_fake(dout, kept, weight, height, width):
    return dout.new_empty((dout.shape[0], weight.shape[1], height, width))


_select_tokens_backward = register("select_tokens_backward", _backward, _backward_fake)


def _setup_context(ctx, inputs, output) -> None:
    images, kept, weight, _, pos_embed, prefix = inputs
    ctx.save_for_backward(images if ctx.needs_input_grad[2] else None, kept, weight)
    ctx.height, ctx.width = images.shape[-2:]
    ctx.num_prefix, ctx.num_patches = prefix.shape[0], pos_embed.shape[0]


def _gradients(ctx, dout: Tensor):
    images, kept, weight = ctx.saved_tensors
    need_images, _, need_weight, need_bias, need_pos, need_prefix = ctx.needs_input_grad
    dimages = dweight = dbias = dpos = dprefix = None
    if need_weight or need_bias or need_pos:  # a copy, where there are prefix tokens
        rows = dout[:, ctx.num_prefix :].flatten(0, 1)
    if need_images:
        dimages = _select_tokens_backward(dout, kept, weight, ctx.height, ctx.width)
    if need_weight:
        patches = reference.gather_patches(images, kept, weight.shape[-1])
        dweight = (rows.T @ patches.flatten(0, 1)).view_as(weight)
    if need_bias:
        dbias = rows.sum(0)
    if need_pos:  # index_put_ with accumulation is deterministic on CUDA, index_add_ is not
        dpos = dout.new_zeros((ctx.num_patches, dout.shape[-1]))
        dpos = dpos.index_put((kept.flatten(),), rows, accumulate=True)
    if need_prefix:
        dprefix = dout[:, : ctx.num_prefix].sum(0)
    return dimages, None, dweight, dbias, dpos, dprefix


_select_tokens = register("select_tokens", _forward, _forward_fake, setup_context=_setup_context, backward=_gradients)


def _check(
    images: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, prefix: Tensor
) -> None:
    """Raise ValueError, naming argument, rule and value, where the arguments do not fit together."""
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"`weight` must be [D, C, p, p], got shape {list(weight.shape)}.")
    D, C, patch, _ = weight.shape
    if images.ndim != 4 or images.shape[1] != C or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(
            f"`images` must be [B, {C}, H, W] with H and W multiples of the patch size {patch}, got shape "
            f"{list(images.shape)}."
        )
    num_patches = (images.shape[2] // patch) * (images.shape[3] // patch)
    if kept.ndim != 2 or kept.shape[0] != images.shape[0]:
        raise ValueError(f"`kept` must be [B, k] with B = {images.shape[0]}, got shape {list(kept.shape)}.")
    if not 1 <= kept.shape[1] <= num_patches:
        raise ValueError(f"`kept` must hold 1 to {num_patches} patches an image, got {kept.shape[1]}.")
    if kept.dtype != torch.int64:
        raise ValueError(f"`kept` must be int64, got {kept.dtype}.")
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"`bias` must be [{D}] to fit `weight`, got shape {list(bias.shape)}.")
    if pos_embed.shape != (num_patches, D):
        raise ValueError(
            f"`pos_embed` must be [{num_patches}, {D}], a row for each patch, got shape {list(pos_embed.shape)}."
        )
    if prefix.ndim != 2 or prefix.shape[1] != D:
        raise ValueError(f"`prefix` must be [P, {D}], got shape {list(prefix.shape)}.")
    named = {"kept": kept, "weight": weight, "bias": bias, "pos_embed": pos_embed, "prefix": prefix}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.device != images.device:
            raise ValueError(f"`{name}` must be on the device of `images`, {images.device}, got {tensor.device}.")
        if name != "kept" and tensor.dtype != images.dtype:
            raise ValueError(f"`{name}` must have the dtype of `images`, {images.dtype}, got {tensor.dtype}.")
    if not images.dtype.is_floating_point:
        raise ValueError(f"`images` must have a floating-point dtype, got {images.dtype}.")
    if torch.compiler.is_compiling() or kept.device.type != "cpu" or kept.numel() == 0:
        return
    valid = (kept >= 0) & (kept < num_patches)
    if not bool(valid.all()):
        raise ValueError(f"`kept` must hold positions from 0 to {num_patches - 1}, got {kept[~valid][0].item()}.")


def select_tokens(
    images: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, prefix: Tensor
) -> Tensor:
    """Tokens of the kept patches, with their position embeddings, behind the prefix tokens.

    The same as embedding every patch and gathering afterwards (LoRA Recycle, Sec. 4.4), at the cost of the
    kept patches. Gradients: every floating-point input.

    Args:
        images: normalised, [B, C, H, W], any strides.
        kept: int64 [B, k], distinct patch positions of each image in row order, in the order wanted.
        weight: of the patch convolution, [D, C, p, p].
        bias: [D] or None.
        pos_embed: of the patches alone, [H / p * W / p, D].
        prefix: class and register tokens with their position embeddings already added, [P, D]; P may be 0.

    Returns:
        [B, P + k, D], ready for block 0.

    Raises:
        ValueError: shapes, dtypes, devices or a position break the rules above. Looking at positions on a GPU would
            hold up the host: there the token of a wrong one is NaN.
    """
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
        images, weight, bias = images.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        pos_embed, prefix = pos_embed.to(dtype), prefix.to(dtype)
    _check(images, kept, weight, bias, pos_embed, prefix)
    if images.numel() == 0 or choose_backend(images, has_cpp=False) == "reference":
        return reference.select_tokens(images, kept, weight, bias, pos_embed, prefix)
    return _select_tokens(images, kept, weight, bias, pos_embed, prefix)
