"""Images as photographs of fewer pixels show them: reduced to a lower resolution and enlarged again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resampling(size: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """The matrix M for which `M x M^T` is an image of `size` pixels reduced to `side` and enlarged again.

    Both ways bicubic and antialiased, as images are read (see `to_uint8`), in one product that a captured step can
    choose from a table.

    Args:
        size, side: sides in pixels.
        device: where it is wanted.

    Returns:
        float32 [size, size]; the identity where `side` is `size` or more.
    """
    identity = torch.eye(size)
    if side >= size:
        return identity.to(device)
    columns = identity[None, None]  # an image's columns are resampled one by one
    less = interpolate(columns, size=(side, size), mode="bicubic", antialias=True)
    return interpolate(less, size=(size, size), mode="bicubic", antialias=True)[0, 0].to(device)


def resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Each image through its own matrix of `resampling`.

    Args:
        images: uint8 [B, 3, s, s].
        matrices: float32 [B, s, s].

    Returns:
        uint8 [B, 3, s, s].
    """
    across = matrices[:, None]
    return (across @ images.float() @ across.mT).round_().clamp_(0, 255).to(torch.uint8)
