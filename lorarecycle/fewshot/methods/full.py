"""Full fine-tuning: every weight of the ViT, with a linear classifier (LoRA Recycle, App. D)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ...adapters.adapter import Adapter
from ...inversion.surrogate import Surrogate
from ...vit.backbone import Backbone
from .base import Task, inputs
from .tuned import Linear, Trainable, Tuned, descend


@dataclass
class FullFineTuning(Tuned):
    """Weights and classifier descend together on the support images; see `Tuned` for the settings."""

    trainable: Trainable = field(init=False, repr=False)

    def _setup(self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]) -> None:
        self.trainable = Trainable(backbone)

    def _solve(self, task: Task, rate: float) -> Tensor:
        trainable, model = self.trainable, self.trainable.model
        trainable.reset()
        head = Linear(model.embed_dim, task.n_way, model.device)
        images, labels = inputs(model, task.support_pixels()), task.labels(model.device)
        descend(
            [*model.parameters(), *head.parameters()],
            lambda step: F.cross_entropy(head(trainable(images)), labels),
            steps=self.steps,
            rate=rate,
            optimizer=self.optimizer,
        )
        return head(task.run(model, trainable, task.query)).detach()
