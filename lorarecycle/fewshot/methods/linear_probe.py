"""Linear probe: a linear classifier on frozen features, many tasks at once (LoRA Recycle, App. D)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vit.backbone import Backbone
from .base import Given, Task
from .tuned import Optimizer, Tuned, descend

TOGETHER = 100
"""Tasks that are solved as one batch; their classifiers do not touch one another."""


@dataclass
class LinearProbe(Tuned):
    """Only the classifier trains; see `Tuned` for the settings."""

    steps: int = 100
    optimizer: Optimizer = "adam"
    encoder: Backbone = field(init=False, repr=False)

    def _setup(self, given: Given) -> None:
        self.encoder = given.backbone

    def _solve(self, task: Task, rate: float) -> Tensor:
        return next(self._solve_all([task], rate))

    def _solve_all(self, tasks: Sequence[Task], rate: float) -> Iterator[Tensor]:
        for _, alike in groupby(tasks, lambda task: (task.n_way, len(task.support), len(task.query))):
            group = list(alike)
            for start in range(0, len(group), TOGETHER):
                part = group[start : start + TOGETHER]
                features = [task.features(self.encoder) for task in part]
                support, query = (torch.stack(each) for each in zip(*features, strict=True))
                labels = torch.stack([task.labels(support.device) for task in part])
                yield from probe(support, labels, query, part[0].n_way, self.steps, rate, self.optimizer)


def probe(
    support: Tensor, labels: Tensor, query: Tensor, n_way: int, steps: int, rate: float, optimizer: Optimizer = "adam"
) -> Tensor:
    """Linear classifiers from zero, one for each of T tasks, and their logits.

    Args:
        support: float32 [T, S, D].
        labels: int64 [T, S].
        query: float32 [T, Q, D].
        n_way, steps, rate, optimizer: C, and how they train.

    Returns:
        float32 [T, Q, C].
    """
    weight = torch.zeros(len(support), n_way, support.shape[-1], device=support.device, requires_grad=True)
    bias = torch.zeros(len(support), 1, n_way, device=support.device, requires_grad=True)

    def logits(features: Tensor) -> Tensor:
        return features @ weight.transpose(1, 2) + bias

    def loss(step: int) -> Tensor:  # a sum over tasks: each descends as if alone
        return F.cross_entropy(logits(support).flatten(0, 1), labels.flatten(), reduction="sum") / labels.shape[1]

    descend([weight, bias], loss, steps=steps, rate=rate, optimizer=optimizer)
    return logits(query).detach()
