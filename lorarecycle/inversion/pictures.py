"""Painted pictures as surrogate data: they depend on no adapter, so one set serves any number of them."""

from __future__ import annotations

from functools import partial

import torch

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
    teacher: Backbone, config: InversionConfig, *, seed: int, scores: bool = False, quiet: bool = False
) -> Surrogate:
    """Paint `config.pictures` pictures without labels.

    Args:
        teacher: its attention gives `scores` and the tokens that `config.prune` keeps; the merged warm start, say. It
            is not run where neither is wanted.
        config: `pictures`, `image_size`, `latent_size`, `prune`.
        seed: of the pictures; those of a larger set begin with those of a smaller one.
        scores: whether scores of their patches are wanted, which then mask in place of `config.prune`.
        quiet: no progress bar.

    Returns:
        a `Surrogate` on the CPU without labels and logits.
    """
    size = config.image_size or teacher.image_size
    counts = [len(part) for part in torch.arange(config.pictures).split(PAINTED_TOGETHER)]
    paint = partial(paint_pictures, PAINTED_TOGETHER, config.latent_size or size, device=teacher.device)
    parts = [
        to_pixels(paint(stream(seed, "pictures", i)), size)[:n].cpu()
        for i, n in enumerate(track(counts, "paint pictures", unit="batches", quiet=quiet))
    ]
    images = torch.cat(parts)
    answers = teacher_answers(teacher, images, scores=scores, prune={} if scores else config.prune, size=size)
    return Surrogate(
        images=images,
        labels=None,
        class_names=(),
        patch_size=teacher.patch_size,
        config=as_plain(config),
        **answers._asdict(),
    )
