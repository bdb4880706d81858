"""The loss of a meta-training step: episodes under nearest class centres (Eq. 3, 4), features of a guide, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MetaConfig
from ..data.images import normalize
from ..data.resolution import resample
from ..vit.backbone import Backbone
from ..vit.lora import LoRA
from ..vit.positions import mirror
from .bank import Bank
from .draws import Draw
from .prototypes import distance_logits


def episode_loss(backbone: Backbone, lora: LoRA, bank: Bank, draw: Draw, config: MetaConfig) -> Tensor:
    """Loss of one episode, a float32 scalar: Eq. 3 within an adapter, Eq. 4 across adapters, and the guide's share."""
    rows, S = draw.rows, config.n_way * config.n_shot
    images, kept = bank.step_images(rows), None if bank.kept is None else bank.kept[rows]
    if config.flip:
        images = torch.where(draw.mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        kept = None if kept is None else torch.where(draw.mirrored.view(-1, 1), mirror(kept, bank.columns), kept)
    if bank.resampling is not None:
        images = resample(images, bank.resampling.index_select(0, draw.resolution))
    targets = None
    if config.guide_weight < 1:
        targets = torch.eye(config.n_way, device=rows.device).repeat_interleave(config.n_query, dim=0)
        if bank.teacher_logits is not None:
            answers = bank.teacher_logits[rows[S:]].index_select(1, draw.teacher_classes).softmax(-1)
            targets = torch.where(draw.cross_task, targets, answers)
    images = normalize(images, backbone.mean, backbone.std, backbone.dtype)
    follow = None if bank.targets is None else bank.targets[rows]
    return query_loss(backbone, lora, images, kept, targets, config, follow)


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
