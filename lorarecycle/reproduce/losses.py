"""Cells of Table 6: the classification loss of what the mask keeps and of what it leaves out, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.adapter import Adapter
from ..data.images import normalize
from ..inversion.start import finished_pixels, start_images
from ..inversion.surrogate import Surrogate
from ..runtime.seeds import derive, stream
from ..vit.backbone import Backbone
from .checks import check_adapters
from .facts import Facts
from .settings import inversion_config
from .world import World

SPARSITY = 0.75
"""Share of the patches that is background."""


def facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves such a cell."""
    return {**world.surrogate_facts(settings), "count": world.count(settings), "area": settings["area"]}


def check(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that adapters and surrogates can be had, and that an area is named; errors as in `check_adapters`."""
    check_adapters(world, settings)
    images = settings["surrogates"]
    if images["images"] == "real" or images.get("head") == "text":
        raise ValueError(
            "`surrogates` must be images inverted by the adapters' own heads for cells of 'losses', got "
            f"`images` {images['images']!r} and `head` {images.get('head') or 'own'!r}."
        )
    if settings.get("area") is None:
        raise ValueError("`area` must be given for cells of 'losses', one of foreground, background, got none.")


def area_losses(world: World, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Mean cross-entropy of the teachers, who see only an area of each image: of what it started as, and of what it
    became. The areas are those of the finished image: the quarter of the patches that is attended to most, and the
    rest."""
    before, after = [], []
    for i, (surrogate, adapter) in enumerate(zip(world.surrogates(settings), world.adapters(settings), strict=True)):
        teacher = world.backbone(settings).merge(adapter).to(dtype=world.dtype)
        start = _started(teacher, adapter, settings, derive(settings["seed"], "inversion", i))
        kept = area(surrogate, settings["area"])
        before.append(_loss(teacher, adapter, start, surrogate, kept))
        after.append(_loss(teacher, adapter, surrogate.images, surrogate, kept))
    return {"before": sum(before) / len(before), "after": sum(after) / len(after)}


def area(surrogate: Surrogate, name: str) -> Tensor:
    """Positions of the patches of an area, int64 [n, k], ascending."""
    assert surrogate.scores is not None
    N = surrogate.scores.shape[1]
    count = N - math.floor(N * SPARSITY)
    order = surrogate.scores.argsort(dim=1, descending=True, stable=True)
    return (order[:, :count] if name == "foreground" else order[:, count:]).sort(dim=1).values


@torch.no_grad()
def _started(teacher: Backbone, adapter: Adapter, settings: Mapping[str, Any], seed: int) -> Tensor:
    """What the images of a surrogate started as, uint8 [n, 3, H, W]."""
    config, head = inversion_config(settings), adapter.head
    assert head is not None
    labels = torch.arange(len(head.class_names)).repeat(config.images_per_class)
    parts = []
    for i, wanted in enumerate(labels.split(config.batch_size)):
        start = start_images(teacher, head, wanted.to(teacher.device), config, stream(seed, "inversion", i))
        parts.append(finished_pixels(start, teacher, config))
    return torch.cat(parts)


@torch.no_grad()
def _loss(teacher: Backbone, adapter: Adapter, images: Tensor, surrogate: Surrogate, kept: Tensor) -> float:
    head, total = adapter.head, 0.0
    assert head is not None
    assert surrogate.labels is not None
    for part in torch.arange(len(images)).split(64):
        x = normalize(images[part].to(teacher.device), teacher.mean, teacher.std, teacher.dtype)
        features = teacher(x, kept=kept[part].to(teacher.device), pool=head.pool)
        labels = surrogate.labels[part].to(teacher.device)
        total += F.cross_entropy(head(features), labels, reduction="sum").item()
    return total / len(images)
