"""Painted pictures as surrogate data: they depend on no adapter, so one set serves any number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import InversionConfig, as_plain
from ..runtime.progress import track
from ..runtime.seeds import stream
from ..vit.backbone import Backbone
from .answers import teacher_answers
from .painted import paint_pictures
from .start import to_pixels
from .surrogate import Surrogate

PAINTED_TOGETHER = 25
"""Pictures that share a random stream; a matter of memory."""
SMALL = (32, 64)
"""Sides in pixels that batches are painted at in turn with their full size, as photographs of few pixels are common."""


def painted_surrogate(
    teacher: Backbone,
    config: InversionConfig,
    *,
    seed: int,
    scores: bool = False,
    rows: Tensor | None = None,
    quiet: bool = False,
) -> Surrogate:
    """Paint `config.pictures` pictures without labels.

    Args:
        teacher: its attention gives `scores` and the tokens that `config.prune` keeps; the merged warm start, say. It
            is not run where neither is wanted.
        config: `pictures`, `image_size`, `prune`, and `latent_size`, the side that all are painted at; when None they
            are painted at `image_size`, 32 and 64 pixels in turn, as far as those are lower.
        seed: of the pictures; those of a larger set begin with those of a smaller one.
        scores: whether scores of their patches are wanted, which then mask in place of `config.prune`.
        rows: int64, ascending, the pictures that are wanted; all when None.
        quiet: no progress bar.

    Returns:
        a `Surrogate` on the CPU without labels and logits.
    """
    size = config.image_size or teacher.image_size
    index = torch.arange(config.pictures) if rows is None else rows
    numbers = (index // PAINTED_TOGETHER).unique().tolist()
    sides = painted_sides(config, size)

    def paint(i: int) -> Tensor:
        return paint_pictures(PAINTED_TOGETHER, sides[i % len(sides)], stream(seed, "pictures", i), teacher.device)

    parts = [
        to_pixels(paint(i), size).cpu()[_own(index, i)]
        for i in track(numbers, "paint pictures", unit="batches", quiet=quiet)
    ]
    images = torch.cat(parts)
    answers = teacher_answers(teacher, images, scores=scores, prune={} if scores else config.prune, size=size)
    return Surrogate(
        images=images,
        labels=None,
        class_names=(),
        patch_size=teacher.patch_size,
        config=as_plain(config),
        rows=None if rows is None or len(index) == config.pictures else index,
        **answers._asdict(),
    )


def painted_sides(config: InversionConfig, size: int) -> tuple[int, ...]:
    """Sides in pixels that batches of pictures of `size` pixels are painted at, in turn."""
    return (config.latent_size,) if config.latent_size else (size, *(side for side in SMALL if side < size))


def _own(index: Tensor, batch: int) -> Tensor:
    """Which pictures of a batch are wanted, counted from its first one."""
    return index[index // PAINTED_TOGETHER == batch] % PAINTED_TOGETHER
