"""Tip-Adapter's cache without training: each support image votes for its class by its likeness to the query."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import Distance
from .base import Task
from .nearest import NearestMean


@dataclass
class SupportCache(NearestMean):
    """Votes `exp(-beta (1 - cosine))`, summed over the support of a class (Zhang et al., ECCV 2022, Eq. 3 to 5).

    Without a text encoder there are no zero-shot logits to add them to; the centre of the support is taken off the
    features first, since those of a plain ViT all point the same way.

    Args:
        beta: sharpness; 5.5 is the authors'.
    """

    beta: float = 5.5
    distance: Distance = field(init=False, default="cosine", repr=False)
    """Always the cosine."""

    def solve(self, task: Task) -> Tensor:
        support, query = task.features(self.encoder)
        centre = support.mean(dim=0)
        likeness = F.normalize(query - centre, dim=-1) @ F.normalize(support - centre, dim=-1).T
        votes = torch.exp(-self.beta * (1 - likeness))
        members = F.one_hot(task.labels(support.device), task.n_way).to(votes)
        return (votes @ (members / members.sum(dim=0))).clamp_min(1e-30).log()
