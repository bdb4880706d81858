"""Features for the meta-LoRA to follow: those of the warm start, at the resolution that the backbone was made for, as a
mean over two grids of patches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.adapter import Adapter
from ..inversion.stored import StoredImages
from ..runtime.distributed import ALONE, Group
from ..runtime.progress import track
from ..vit.backbone import Backbone
from ..vit.features import normalized_batches
from ..vit.positions import magnify, mirror


@torch.no_grad()
def feature_targets(
    backbone: Backbone,
    guide: Adapter | None,
    images: Tensor | StoredImages,
    *,
    kept: Tensor | None = None,
    image_size: int | None = None,
    flip: bool = True,
    shift: bool = True,
    batch_size: int = 64,
    quiet: bool = True,
    group: Group = ALONE,
) -> Tensor:
    """Features that the student is trained to give: those of the same images, enlarged, under a guide.

    A Vision Transformer is worse at a lower resolution than it was pre-trained with. The guide sees the images at
    `image_size`, the student at their own. So the student learns to give the features of the higher resolution at the
    lower one. Its features also depend on where the grid of patches happens to lie; a mean over shifts depends on it
    less. No labels are needed. Each target is scaled to the mean length of all, because the nearest class mean depends
    on lengths too: `target_i = f_i / |f_i| * mean_j |f_j|`.

    Args:
        backbone: its device and dtype are used.
        guide: adapter merged into it, such as the warm start; none when None.
        images: uint8 [n, 3, H, W], on any device, or in files.
        kept: int64 [n, k], patches that the student reads, of which the guide sees the same parts of the image; all of
            it when None. A guide that saw more would teach the student to make up for what is missing, which whole
            images then pay for.
        image_size: side in pixels at which the guide sees them; `guide_side` when None.
        flip: take the mean over an image and its mirror image, for students that see either.
        shift: take the mean over the image as it is and rolled by half a patch, down and across at once; not where
            `kept` leaves patches out, which lie on one grid.
        batch_size: images per forward pass.
        quiet: no progress bar.
        group: processes that share out the images; each gets all features.

    Returns:
        float32 [n, D] on the backbone's device.
    """
    size = image_size or guide_side(backbone, images.shape[-1])
    model = backbone if guide is None else backbone.merge(guide)
    columns, rows = images.shape[-1] // backbone.patch_size, images.shape[-2] // backbone.patch_size
    if kept is not None and kept.shape[1] == rows * columns:  # nothing is left out
        kept = None
    side = size // backbone.patch_size
    first, last = group.own(len(images))
    own = itertools.repeat(None) if kept is None else kept[first:last].split(batch_size)
    parts = []
    batches = _batches(model, images, range(first, last), size, batch_size, quiet)
    for x, index in zip(batches, own, strict=False):
        read = None
        if index is not None:
            finer = magnify(index.to(backbone.device), (rows, columns), (side, side))
            read = torch.cat([finer, mirror(finer, side)] if flip else [finer])
        features = []
        for by in (0, backbone.patch_size // 2) if shift and index is None else (0,):
            rolled = x.roll((by, by), (-2, -1))
            views = [rolled, rolled.flip(-1)] if flip else [rolled]
            features += model(torch.cat(views), kept=read).float().chunk(len(views))
        parts.append(torch.stack(features).mean(dim=0))
    targets = torch.cat(parts) if parts else torch.zeros(0, backbone.embed_dim, device=backbone.device)
    if group.size > 1:
        everybody = targets.new_zeros(len(images), targets.shape[1])
        everybody[first:last] = targets
        group.add(everybody)
        targets = everybody
    return F.normalize(targets, dim=-1) * targets.norm(dim=-1).mean()


def _batches(
    model: Backbone, images: Tensor | StoredImages, own: range, size: int, batch_size: int, quiet: bool
) -> Iterator[Tensor]:
    title = "guide features"
    if isinstance(images, Tensor):
        part = images[own.start : own.stop]
        if len(part):
            yield from normalized_batches(model, part, size=size, batch_size=batch_size, title=title, quiet=quiet)
        return
    for rows in track(
        torch.arange(own.start, own.stop).split(batch_size) if len(own) else (), title, unit="batches", quiet=quiet
    ):
        yield from normalized_batches(model, images.read(rows), size=size, batch_size=batch_size)


def guide_side(backbone: Backbone, size: int) -> int:
    """Side in pixels at which a guide sees images of `size`: the one that the backbone's position embedding was made
    for, or the images' own where that is larger."""
    return max(backbone.vit.patch_embed.grid_size[0] * backbone.patch_size, size)
