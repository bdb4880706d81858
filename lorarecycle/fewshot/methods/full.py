"""Full fine-tuning: every weight of the ViT, with a linear classifier (LoRA Recycle, App. D)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .base import Given, Task
from .tuned import Trainable, Tuned


@dataclass
class FullFineTuning(Tuned):
    """Weights and classifier descend together on the support images; see `Tuned` for the settings."""

    trainable: Trainable = field(init=False, repr=False)

    def _setup(self, given: Given) -> None:
        self.trainable = Trainable(given.backbone)

    def _solve(self, task: Task, rate: float) -> Tensor:
        self.trainable.reset()
        model = self.trainable.model
        return self._with_classifier(task, rate, model, self.trainable, model.parameters())
