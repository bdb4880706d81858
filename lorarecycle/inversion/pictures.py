"""Painted pictures as surrogate data: they depend on no adapter, so one set serves any number of them."""

from __future__ import annotations

from functools import partial

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
        config: `pictures`, `image_size`, `latent_size`, `prune`.
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
    paint = partial(paint_pictures, PAINTED_TOGETHER, config.latent_size or size, device=teacher.device)
    parts = [
        to_pixels(paint(stream(seed, "pictures", i)), size).cpu()[_own(index, i)]
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


def _own(index: Tensor, batch: int) -> Tensor:
    """Which pictures of a batch are wanted, counted from its first one."""
    return index[index // PAINTED_TOGETHER == batch] % PAINTED_TOGETHER
