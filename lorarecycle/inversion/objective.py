"""What inversion minimises (Eq. 1): the teacher's cross-entropy plus the weighted batch-norm prior."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adapters.adapter import Head
from ..data.images import enlarge
from ..vit.backbone import Backbone
from .prior import BatchNormPrior


def inversion_loss(
    teacher: Backbone,
    head: Head,
    images: Tensor,
    labels: Tensor,
    prune: Mapping[int, float] | None,
    prior: BatchNormPrior | None,
    prior_weight: float,
    image_size: int,
    terms: Tensor | None = None,
) -> Tensor:
    """Eq. 1: `cross_entropy(head(teacher(x)), y) + prior_weight * prior(x)`.

    The teacher sees the images enlarged to `image_size`, the prior as they are.

    Args:
        teacher: with the adapter merged.
        head: the adapter's classifier.
        images: normalised, [B, 3, s, s].
        labels: int64 [B].
        prune: `{layer: ratio}`, see `Backbone.forward`.
        prior: naturalness prior (Eq. 2); none when None.
        prior_weight: alpha_R.
        image_size: side in pixels.
        terms: float32 [B + 1], into which the cross-entropy of each image and the prior of the batch are written.

    Returns:
        float32 scalar.
    """
    features = teacher(enlarge(images, image_size), prune=prune, pool=head.pool)
    doubts = cross_entropy(head(features), labels, reduction="none")
    unnatural = None if prior is None else prior(images, teacher.mean, teacher.std)
    if terms is not None:
        terms[:-1].copy_(doubts.detach())
        if unnatural is not None:
            terms[-1:].copy_(unnatural.detach().view(1))
    return doubts.mean() if unnatural is None else doubts.mean() + prior_weight * unnatural
