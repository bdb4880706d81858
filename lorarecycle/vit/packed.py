"""Frozen linear layers whose weights lie in memory as oneDNN wants them, for bfloat16 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backbone import Backbone


def pack(backbone: Backbone) -> Backbone:
    """A copy of a backbone for many steps that want the gradient of its images.

    oneDNN rearranges a bfloat16 weight anew for every product, which costs 5 to 10 % of it. The linear layers of the
    copy's blocks keep a rearranged weight for the product and one for its gradient instead, made when they are first
    called. The copy can run: it can't be copied, moved, cast, saved or merged, nor wear factors.

    Args:
        backbone: its weights are shared. Returned as it is where there is nothing to gain: on a GPU, in another
            precision than bfloat16, or on a CPU whose bfloat16 oneDNN does not know.
    """
    if backbone.device.type != "cpu" or backbone.dtype != torch.bfloat16 or not _supported():
        return backbone
    packed = backbone.clone()
    for parent in list(packed.vit.blocks.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return packed


class PackedLinear(nn.Module):
    """`x W^T + b` in bfloat16, x [..., K]; gradients reach x only, once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.packed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.packed is None:
            self.packed = _rearranged(self.weight, len(rows)), _rearranged(self.weight.T, len(rows))
        return _Product.apply(rows, *self.packed, self.bias).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Tensor, backwards: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backwards = backwards
        return _linear(x, forwards, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _linear(grads[0], ctx.backwards, None), None, None, None


def _supported() -> bool:
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # private, as are the two below
    return torch.backends.mkldnn.is_available() and known is not None and bool(known())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _rearranged(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
