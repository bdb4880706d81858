"""The loss of a meta-training step: episodes under nearest class centres (Eq. 3, 4), features of a guide, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MetaConfig
from ..data.images import normalize
from ..vit.backbone import Backbone
from ..vit.lora import LoRA
from ..vit.positions import mirror
from .bank import Bank
from .episodes import Episode
from .prototypes import distance_logits


def episode_loss(
    backbone: Backbone,
    lora: LoRA,
    bank: Bank,
    episode: Episode,
    config: MetaConfig,
    generator: torch.Generator,
    loss_of: Callable[..., Tensor],
) -> Tensor:
    """Loss of one episode, a float32 scalar: Eq. 3 within an adapter, Eq. 4 across adapters, and the guide's share.

    `loss_of` is `query_loss` or its compiled form; everything around it is gathering and drawing.
    """
    device = backbone.device
    rows = episode.images.to(device)
    images, kept = bank.images[rows], None if bank.kept is None else bank.kept[rows]
    if config.flip:
        flip = (torch.rand(len(rows), generator=generator) < 0.5).to(device)
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        kept = None if kept is None else torch.where(flip.view(-1, 1), mirror(kept, bank.columns), kept)
    targets, S = None, config.n_way * config.n_shot
    if episode.cross_task:
        targets = F.one_hot(episode.labels[S:].to(device), config.n_way).float()
    elif bank.teacher_logits is not None and config.guide_weight < 1:
        targets = bank.teacher_logits[rows[S:]][:, episode.teacher_classes.to(device)].softmax(-1)
    images = normalize(images, backbone.mean, backbone.std, backbone.dtype)
    follow = None if bank.targets is None else bank.targets[rows]
    return loss_of(backbone, lora, images, kept, targets, config, follow)


def query_loss(
    backbone: Backbone,
    lora: LoRA,
    images: Tensor,
    kept: Tensor | None,
    targets: Tensor | None,
    config: MetaConfig,
    follow: Tensor | None = None,
) -> Tensor:
    """KL of the targets from the nearest-centre probabilities (Eq. 3); the cross-entropy of Eq. 4 for one-hot targets.

    Args:
        backbone: with `lora` beside its weights.
        images: normalised, [n_way * (n_shot + n_query), 3, H, W]: the support, class after class, then the queries; any
            where only the guide counts.
        kept: int64 [images, k], patches to read; all when None.
        targets: class probabilities of the queries, float32 [n_way * n_query, n_way]; None where only the guide counts.
        config: n_way, n_shot, distance, guide_weight.
        follow: features that those of the images should have, float32 [images, D]: their mean squared distance has
            the share `guide_weight` of the loss.
    """
    features = backbone(images, lora=lora, kept=kept).float()
    if follow is not None and config.guide_weight == 1:
        return F.mse_loss(features, follow)
    assert targets is not None
    S = config.n_way * config.n_shot
    centres = features[:S].unflatten(0, (config.n_way, config.n_shot)).mean(dim=1)
    logits = distance_logits(features[S:], centres, config.distance)
    loss = F.kl_div(logits.log_softmax(-1), targets, reduction="batchmean")
    return loss if follow is None else torch.lerp(loss, F.mse_loss(features, follow), config.guide_weight)
