"""Frozen layers whose weights lie in memory as oneDNN wants them, for bfloat16 on a CPU."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_unshuffle

M = TypeVar("M", bound=nn.Module)


def pack(module: M) -> M:
    """Make a frozen module in bfloat16 on a CPU ready for many steps, in place: the same numbers, sooner.

    oneDNN rearranges a weight anew for every product, which costs 5 to 10 % of it. Linear layers and 1 x 1 convolutions
    at stride 1 keep a rearranged copy for the product and one for its gradient, made when they are first called. A
    convolution of few channels at stride 2, the first of a ResNet, becomes one of four times as many at stride 1, whose
    gradient is fast. The module can't be moved, cast, saved or trained any more; gradients reach its input only.
    """
    if not torch.backends.mkldnn.is_available():
        return module
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            weight = getattr(child, "weight", None)
            if weight is None or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
                continue
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(weight, child.bias))
            elif type(child) is nn.Conv2d and _is_plain(child):
                if child.kernel_size == child.stride == (1, 1) and child.padding == (0, 0):
                    setattr(parent, name, _PackedPointwise(child))
                elif (
                    child.in_channels <= 4 and child.stride == (2, 2) and all(k in (3, 5, 7) for k in child.kernel_size)
                ):
                    setattr(parent, name, _Stem(child))
    return module


def _is_plain(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
    )


class PackedLinear(nn.Module):
    """`x W^T + b` for x [..., K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach(), requires_grad=False), bias
        self.packed: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed = _rearranged(self.weight, rows), _rearranged(self.weight.T, rows)
        return _Product.apply(x, *self.packed, self.bias)


class _PackedPointwise(PackedLinear):
    """A 1 x 1 convolution at stride 1."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight.flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Stem(nn.Module):
    """A convolution of odd size at stride 2 as one at stride 1 of the image's four sub-images (space to depth)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = pixel_unshuffle(pad(conv.weight.detach(), (0, 1, 0, 1)), 2)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias, self.padding = conv.bias, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        (H, W), (rows, columns) = x.shape[-2:], self.padding
        even = pad(x, (columns, columns + W % 2, rows, rows + H % 2))
        return conv2d(pixel_unshuffle(even, 2), self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Tensor, backwards: Tensor, bias: Tensor | None) -> Tensor:
        ctx.backwards = backwards
        return _linear(x, forwards, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _linear(grads[0], ctx.backwards, None), None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _rearranged(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
