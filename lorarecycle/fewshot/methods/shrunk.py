"""Class means shrunk towards classes that the adapters' heads know: one image says little about its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...meta.prototypes import Distance, class_centres, distance_logits
from ...vit.backbone import Backbone
from .base import Given, Method, Needs, Task, accuracy
from .recycled import WarmStart

STRENGTHS = (0.0, 0.125, 0.25, 0.5, 1.0)


@dataclass
class ShrunkMean(Method):
    """Nearest class means, each moved a little towards the known classes that it is like. Ours; no paper has it.

    With m the mean of the support's features and p a class's mean of n images::

        p' = m + (1 - t) (p - m) + t |p - m| d,   t = strength / (strength + n)

    where d is the mean direction of the `neighbours` head rows nearest to p - m. A head's rows, less their mean, point
    to its classes in the features of its adapter; here they are compared with features of the warm start, which all
    adapters share. With strength 0 it is the warm start's nearest class mean.

    Args:
        strength: images that the known classes count for; chosen on validation tasks, or 0.25, when None.
        neighbours: known classes that a new one is moved towards.
        distance: see `distance_logits`.
    """

    strength: float | None = None
    neighbours: int = 3
    distance: Distance = "euclidean"
    needs: ClassVar[Needs] = Needs(adapters=1, heads=True)
    encoder: Backbone = field(init=False, repr=False)
    known: Tensor = field(init=False, repr=False)
    """float32 [K, D], unit directions of the adapters' classes"""
    chosen: float = field(init=False, default=0.0)

    def _prepare(self, given: Given) -> None:
        backbone, adapters, aside = given.backbone, given.adapters, given.validation_tasks
        self.encoder = WarmStart().prepare(backbone, adapters).encoder
        heads = [a.head for a in adapters if a.head is not None and a.head.weight.shape[1] == backbone.embed_dim]
        if not heads:
            raise ValueError(f"`adapters` must have heads that read the {backbone.embed_dim} features of the backbone.")
        rows = torch.cat([head.weight - head.weight.mean(dim=0) for head in heads])
        self.known = F.normalize(rows.float(), dim=-1).to(backbone.device)
        self.chosen = 0.25 if self.strength is None else self.strength
        if self.strength is None and aside:
            scores = [accuracy(self._solve_all, aside, s).mean().item() for s in STRENGTHS]
            self.chosen = STRENGTHS[max(range(len(scores)), key=scores.__getitem__)]

    def _solve_all(self, tasks: list[Task], strength: float) -> list[Tensor]:
        return [self._solve(task, strength) for task in tasks]

    def _solve(self, task: Task, strength: float) -> Tensor:
        support, query = task.features(self.encoder)
        labels = task.labels(support.device)
        centre = support.mean(dim=0)
        own = class_centres(support, labels, task.n_way) - centre
        likeness = F.normalize(own, dim=-1) @ self.known.T
        nearest = likeness.topk(min(self.neighbours, len(self.known)), dim=-1)
        towards = F.normalize((nearest.values.clamp_min(0)[..., None] * self.known[nearest.indices]).sum(dim=1), dim=-1)
        share = (strength / (strength + torch.bincount(labels, minlength=task.n_way).float()))[:, None]
        moved = (1 - share) * own + share * own.norm(dim=-1, keepdim=True) * towards
        return distance_logits(query, centre + moved, self.distance)

    def solve(self, task: Task) -> Tensor:
        return self._solve(task, self.chosen)
