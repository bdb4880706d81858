"""LaplacianShot: nearest class means whose answers agree among neighbouring queries (transductive)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...config import Distance
from ...meta.prototypes import class_centres
from .base import Task
from .nearest import NearestMean


@dataclass
class LaplacianShot(NearestMean):
    """All queries of a task are answered together (Ziko et al., ICML 2020, Eq. 7 and Alg. 1).

    Features are centred on the support's mean and brought to length 1; a query's neighbours are its `neighbours`
    nearest queries. It presumes nothing about how many queries a class has. The authors centre on the mean of their
    training classes, rectify the class means by the queries, choose `weight` on validation classes, and count a query
    among its own neighbours.

    Args:
        weight: of the neighbours, lambda in the paper; 0 gives the nearest class mean of these features.
        neighbours: of a query.
        steps: of the bound optimisation.
    """

    weight: float = 0.7
    neighbours: int = 3
    steps: int = 20
    distance: Distance = field(init=False, default="sqeuclidean", repr=False)
    """Always that."""

    def solve(self, task: Task) -> Tensor:
        support, query = task.features(self.encoder)
        centre = support.mean(dim=0)
        support, query = (torch.nn.functional.normalize(x - centre, dim=-1) for x in (support, query))
        distance = torch.cdist(query, class_centres(support, task.labels(support.device), task.n_way)).square()
        near = torch.cdist(query, query).fill_diagonal_(torch.inf)
        k = min(self.neighbours, len(query) - 1)
        affinity = torch.zeros_like(near)
        if k > 0:
            affinity.scatter_(1, near.topk(k, largest=False).indices, 1.0)
        logits = -distance
        for _ in range(self.steps):
            logits = -distance + self.weight * affinity @ logits.softmax(dim=-1)
        return logits
