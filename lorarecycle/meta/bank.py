"""All surrogates side by side, where meta-training gathers its images from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inversion.surrogate import Surrogate
from ..vit.backbone import Backbone


class Bank(NamedTuple):
    """All surrogates side by side on the backbone's device."""

    images: Tensor
    """uint8 [n, 3, H, W]"""
    teacher_logits: Tensor | None
    """float32 [n, C], padded with zeros to the largest number of classes; None where a surrogate has none"""
    kept: Tensor | None
    """int64 [n, k]"""
    columns: int
    """patches in a row of the grid"""
    targets: Tensor | None = None
    """float32 [n, D], features to follow"""
    resampling: Tensor | None = None
    """float32 [resolutions, H, H], see `data.resolution.resampling`"""


def fill_bank(backbone: Backbone, surrogates: Sequence[Surrogate], sparsity: float | None = None) -> Bank:
    """Put surrogates side by side.

    Args:
        backbone: model that will see them.
        surrogates: of one image size.
        sparsity: mask every surrogate to this share from its scores; None takes their kept tokens as they are.

    Raises:
        ValueError: sizes, patch size or numbers of kept tokens that differ.
    """
    if sparsity is not None:
        surrogates = [s.masked(sparsity) for s in surrogates]
    for what, values in (
        ("image size", [tuple(s.images.shape[-2:]) for s in surrogates]),
        ("patch size", [s.patch_size for s in surrogates] + [backbone.patch_size]),
        ("number of kept tokens", [None if s.kept is None else s.kept.shape[1] for s in surrogates]),
    ):
        if len(set(values)) > 1:
            raise ValueError(
                f"`surrogates` must share one {what}, got {sorted(set(values), key=str)}; invert them anew."
            )
    answers = [s.teacher_logits for s in surrogates if s.teacher_logits is not None]
    width = max((each.shape[1] for each in answers), default=0)
    logits = [F.pad(each, (0, width - each.shape[1])) for each in answers]
    kept = [s.kept for s in surrogates if s.kept is not None]
    device = backbone.device
    return Bank(
        torch.cat([s.images for s in surrogates]).to(device),
        torch.cat(logits).to(device) if len(logits) == len(surrogates) else None,
        torch.cat(kept).to(device) if kept else None,
        surrogates[0].grid[1],
    )
