"""Positions of patches on the grid of an image: mirrored, and on a finer grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import reference


def mirror(kept: Tensor, columns: int) -> Tensor:
    """Positions of kept patches after a left-right flip of the image, int64 [n, k]."""
    return kept - 2 * (kept % columns) + columns - 1


def magnify(kept: Tensor, grid: tuple[int, int], finer: tuple[int, int]) -> Tensor:
    """The patches of a finer grid that show the same parts of an image.

    Where the grids do not divide one another, those that the kept patches cover most.

    Args:
        kept: int64 [n, k], positions on `grid`.
        grid, finer: rows and columns.

    Returns:
        int64 [n, k'], ascending; k' is the same share of the finer grid, rounded.
    """
    mask = torch.zeros(len(kept), grid[0] * grid[1], device=kept.device).scatter(1, kept, 1.0)
    cover = F.interpolate(mask.view(-1, 1, *grid), size=finer, mode="area").flatten(1)
    return reference.top_patches(cover, round(kept.shape[1] * cover.shape[1] / mask.shape[1]))
