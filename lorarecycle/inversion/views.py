"""How images are seen at each step: shifted around and mirrored, by index, so that the step draws nothing itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import InversionConfig


def draw_views(config: InversionConfig, size: int, generator: torch.Generator) -> Tensor:
    """The shift down, the shift across and whether the image is mirrored (0 or 1) of each step, int64 [steps, 3]."""
    reach = int(config.roll * size)
    shifts = torch.randint(-reach, reach + 1, (config.steps, 2), generator=generator)
    mirrored = torch.rand(config.steps, generator=generator) < (0.5 if config.flip else 0.0)
    return torch.cat([shifts, mirrored[:, None].long()], dim=1)


def seen_as(images: Tensor, view: Tensor) -> Tensor:
    """Images rolled, then mirrored.

    Args:
        images: [B, C, s, s].
        view: int64 [3], a row of `draw_views`, on the device of the images: it is not read by the host.

    Returns:
        [B, C, s, s], the pixels of `images.roll((view[0], view[1]), (2, 3))`, flipped left to right where view[2] is 1.
    """
    size = images.shape[-1]
    places = torch.arange(size, device=images.device)
    down, across, mirrored = view.unbind()

    def mirror(columns: Tensor) -> Tensor:
        return torch.where(mirrored > 0, size - 1 - columns, columns)

    there = _flat((places - down) % size, (mirror(places) - across) % size)
    back = _flat((places + down) % size, mirror((places + across) % size))
    return _Rearranged.apply(images, there, back)  # type: ignore[no-any-return]


def _flat(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] * len(columns) + columns).flatten()


class _Rearranged(torch.autograd.Function):
    """Pixels in another order; the gradient goes back by the inverse order, with no sum to order."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return images.flatten(2).index_select(2, there).view_as(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return gradient.flatten(2).index_select(2, back).view_as(gradient), None, None
