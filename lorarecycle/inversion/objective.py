"""The frozen classifiers that inversion asks about its images: one adapter's, or those of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adapters.adapter import Head
from ..vit.backbone import Backbone
from ..vit.lora_stack import LoRAStack
from .painted import enlarge
from .prior import BatchNormPrior


class Teachers(NamedTuple):
    """K adapters, each of which looks at its own rows of a batch of images."""

    backbone: Backbone
    """Bare where they wear a stack; else with the only adapter merged."""
    heads: tuple[Head, ...]
    """K of them."""
    rows: tuple[int, ...]
    """Images of each, one after the other."""
    stack: LoRAStack | None
    """Factors of all K, and perhaps of more behind them; None where there is one, merged."""
    owners: Tensor
    """int64 [sum of rows], which of the K each image belongs to."""

    @classmethod
    def of(
        cls, backbone: Backbone, heads: Sequence[Head], rows: Sequence[int], stack: LoRAStack | None = None
    ) -> Teachers:
        """Those with so many images each; on the device of the backbone."""
        owners = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)).to(backbone.device)
        return cls(backbone, tuple(heads), tuple(rows), stack, owners)

    def logits(self, images: Tensor, prune: Mapping[int, float] | None = None) -> list[Tensor]:
        """What each adapter says of its own images, K times float32 [rows, C]; images normalised [B, 3, H, W]."""
        encoding = self.backbone.encode(
            images,
            lora=self.stack,
            adapter_ids=None if self.stack is None else self.owners,
            prune=prune,
            class_token_only=all(head.pool == "token" for head in self.heads),
        )
        parts = encoding.tokens.split(self.rows)
        return [head(self.backbone.pool(part, head.pool)) for head, part in zip(self.heads, parts, strict=True)]


def inversion_losses(
    teachers: Teachers,
    images: Tensor,
    labels: Tensor,
    prune: Mapping[int, float] | None,
    prior: BatchNormPrior | None,
    prior_weight: float,
    image_size: int,
) -> Tensor:
    """Eq. 1 for each adapter: cross-entropy of the teacher plus the weighted batch-norm prior of its own images.

    The teachers see the images enlarged to `image_size`, the prior as they are.

    Args:
        teachers: K adapters.
        images: normalised, [B, 3, s, s], those of one adapter after those of another.
        labels: int64 [B].
        prune: `{layer: ratio}`, see `Backbone.forward`.
        prior: compares the statistics of each adapter's images; none when None.
        prior_weight: alpha_R.
        image_size: side in pixels.

    Returns:
        float32 [K].
    """
    logits = teachers.logits(enlarge(images, image_size), prune)
    wanted = labels.split(teachers.rows)
    losses = torch.stack([cross_entropy(own, right) for own, right in zip(logits, wanted, strict=True)])
    if prior is None:
        return losses
    return losses + prior_weight * prior(images, teachers.backbone.mean, teachers.backbone.std, teachers.rows)
