"""What inversion starts from: noise, or painted pictures of which the teacher takes the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.adapter import Head
from ..config import InversionConfig
from ..data.images import enlarge, of_channels
from ..vit.backbone import Backbone
from ..vit.features import extract_features
from .painted import paint_pictures
from .parametrization import Fourier

FAINT = 0.2
"""Of the noise that images of a Fourier parametrization start from: size of the sigmoid's argument."""


def start_images(
    teacher: Backbone, head: Head, labels: Tensor, config: InversionConfig, generator: torch.Generator
) -> Tensor:
    """Where the images of a batch start.

    Noise is that of the parametrization: of pixels, or, for Fourier coefficients, smooth. With `init="painted"` the
    teacher looks at `config.candidates` pictures for every one that is needed, and each class takes those that it finds
    most likely; it is not asked where there is no choice.

    Args:
        teacher: with the adapter merged; its device is used.
        head: the adapter's classifier.
        labels: int64 [B], the wanted classes.
        config: `init`, `candidates`, `latent_size`, `image_size`.
        generator: randomness, on the CPU.

    Returns:
        float32 [B, 3, s, s], normalised, on the teacher's device; s is `config.latent_size`, or the images' own size
        when that is None.
    """
    image_size = config.image_size or teacher.image_size
    size = config.latent_size or image_size
    if config.init == "noise" and config.parametrization == "fourier":
        smooth = Fourier(teacher, len(labels), size)
        with torch.no_grad():
            smooth.variable.copy_(FAINT * torch.randn(smooth.variable.shape, generator=generator))
            return smooth.images()
    if config.init == "noise":
        return torch.randn(len(labels), 3, size, size, generator=generator).to(teacher.device)
    pictures = paint_pictures(len(labels) * config.candidates, size, generator, teacher.device)
    if config.candidates > 1:
        pictures = pictures[_likeliest(teacher, head, pictures, labels, image_size)]
    mean, std = (of_channels(v, teacher.device) for v in (teacher.mean, teacher.std))
    return (pictures - mean) / std


def finished_pixels(images: Tensor, teacher: Backbone, config: InversionConfig) -> Tensor:
    """Normalised images, float [n, 3, s, s], as uint8 [n, 3, H, W] on the CPU, at the size that is asked for."""
    size = config.image_size or teacher.image_size
    mean, std = (of_channels(v, images.device) for v in (teacher.mean, teacher.std))
    within = enlarge(images, size).clamp(-mean / std, (1 - mean) / std)
    return to_pixels(within * std + mean, size).cpu()


def to_pixels(images: Tensor, size: int) -> Tensor:
    """Pictures in [0, 1], float [n, 3, s, s], as uint8 [n, 3, size, size]."""
    return (enlarge(images, size).clamp(0, 1) * 255).round().to(torch.uint8)


def _likeliest(teacher: Backbone, head: Head, pictures: Tensor, labels: Tensor, image_size: int) -> Tensor:
    """For each label a picture of its own that the teacher finds likely for that class, int64 [B]."""
    features = extract_features(teacher, to_pixels(pictures, image_size), size=image_size, pool=head.pool)
    likelihood = head(features.to(teacher.device)).log_softmax(-1).cpu()
    labels = labels.cpu()
    chosen = torch.empty_like(labels)
    for c in labels.unique().tolist():
        where = (labels == c).nonzero()[:, 0]
        best = likelihood[:, c].topk(len(where)).indices
        likelihood[best] = -torch.inf  # no picture serves twice
        chosen[where] = best
    return chosen.to(pictures.device)
