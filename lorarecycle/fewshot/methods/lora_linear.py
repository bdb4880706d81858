"""LoRA + Linear, and LoRAs Avg + Linear: low-rank factors and a linear classifier (LoRA Recycle, App. D)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...adapters.adapter import Adapter
from ...runtime.seeds import stream
from ...vit.backbone import Backbone
from ...vit.lora import LoRA
from .average import average_factors
from .base import Given, Needs, Task
from .tuned import Tuned


@dataclass
class LoRALinear(Tuned):
    """Fresh factors on q and v of every block train with the classifier; see `Tuned` for the other settings.

    Args:
        r: rank; the scaling is 1.
    """

    r: int = 4
    backbone: Backbone = field(init=False, repr=False)
    start: Adapter = field(init=False, repr=False)
    """What each task's factors start from."""

    def _setup(self, given: Given) -> None:
        self.backbone = given.backbone
        self.start = self._first(given.adapters).to_adapter(name="start", like=self.backbone)

    def _first(self, adapters: list[Adapter]) -> LoRA:
        generator = stream(self.seed, "lora + linear")
        return LoRA.random(self.backbone, r=self.r, lora_alpha=float(self.r), generator=generator)

    def _solve(self, task: Task, rate: float) -> Tensor:
        lora = LoRA.from_adapter(self.start).to(self.backbone.device)
        return self._with_classifier(
            task, rate, self.backbone, lambda batch: self.backbone(batch, lora=lora), lora.parameters()
        )


@dataclass
class AverageLinear(LoRALinear):
    """The factors start as the average of the adapters, re-factored at rank `r`, at the adapters' sites."""

    r: int = 16
    needs: ClassVar[Needs] = Needs(adapters=1, fine_tuning=True, rate=True)

    def _first(self, adapters: list[Adapter]) -> LoRA:
        return average_factors(adapters, self.backbone, self.r)
