"""What inversion optimises: images of the wanted size, or smaller ones that are enlarged; from noise or from shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adapters.adapter import Head
from ..config import InversionConfig
from ..data.images import normalize
from ..vit.backbone import Backbone
from .painted import draw_shapes, enlarge


def first_canvas(
    teacher: Backbone, head: Head, labels: Tensor, config: InversionConfig, generator: torch.Generator
) -> Tensor:
    """Where the images of a batch start.

    With `init="shapes"` the teacher looks at `config.candidates` random images of shapes for every one that is
    needed, and each class takes those that it finds most likely.

    Args:
        teacher: with the adapter merged; its device is used.
        head: the adapter's classifier.
        labels: int64 [B], the wanted classes.
        config: `init`, `candidates`, `latent_size`, `image_size`.
        generator: randomness, on the CPU.

    Returns:
        float32 [B, 3, s, s], normalised; s is `config.latent_size`, or the images' own size when that is None.
    """
    image_size = config.image_size or teacher.image_size
    size = config.latent_size or image_size
    if config.init == "noise":
        return torch.randn(len(labels), 3, size, size, generator=generator).to(teacher.device)
    pool = draw_shapes(len(labels) * config.candidates, size, generator).to(teacher.device)
    likelihood = torch.cat([_log_softmax(teacher, head, part, image_size) for part in pool.split(64)])
    chosen = torch.empty_like(labels)
    for c in labels.unique().tolist():
        where = (labels == c).nonzero()[:, 0]
        best = likelihood[:, c].topk(len(where)).indices
        likelihood[best] = -torch.inf  # no image serves twice
        chosen[where] = best.to(labels.device)
    mean, std = (torch.tensor(v, device=pool.device).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    return (pool[chosen.to(pool.device)] - mean) / std


@torch.no_grad()
def _log_softmax(teacher: Backbone, head: Head, pixels: Tensor, image_size: int) -> Tensor:
    images = (enlarge(pixels, image_size).clamp(0, 1) * 255).round().to(torch.uint8)
    features = teacher(normalize(images, teacher.mean, teacher.std, teacher.dtype), pool=head.pool)
    return head(features).log_softmax(-1)


def step_size(step: int, config: InversionConfig) -> float:
    """Learning rate of a step: constant, or falling to zero along half a cosine."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * step / config.steps)) / 2
