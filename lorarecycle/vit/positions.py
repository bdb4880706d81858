"""Positions of patches on the grid of an image: mirrored, and on another grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import reference


def mirror(kept: Tensor, columns: int) -> Tensor:
    """Positions of kept patches after a left-right flip of the image, int64 [n, k]."""
    return kept - 2 * (kept % columns) + columns - 1


def magnify(kept: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """The patches of another grid, usually a finer one, that show the same parts of an image.

    Where the grids do not divide one another, those that the kept patches cover most; ties go to the lower position.

    Args:
        kept: int64 [n, k], positions on `grid`.
        grid, other: rows and columns.

    Returns:
        int64 [n, k'], ascending; k' is the same share of the other grid, rounded, and at least 1.
    """
    mask = torch.zeros(len(kept), grid[0] * grid[1], dtype=torch.float64, device=kept.device).scatter(1, kept, 1.0)
    down, across = (_overlaps(a, b, kept.device) for a, b in zip(grid, other, strict=True))
    cover = (down @ mask.view(-1, *grid) @ across.T).flatten(1)
    return reference.top_patches(cover, max(1, round(kept.shape[1] * cover.shape[1] / mask.shape[1])))


def _overlaps(cells: int, others: int, device: torch.device) -> Tensor:
    """How long each of `others` equal parts of a line lies in each of `cells` parts: whole numbers, [others, cells]."""
    start = torch.arange(others, device=device)[:, None] * cells
    first = torch.arange(cells, device=device)[None, :] * others
    return (torch.minimum(start + cells, first + others) - torch.maximum(start, first)).clamp(min=0).double()
