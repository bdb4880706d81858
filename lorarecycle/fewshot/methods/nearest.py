"""NN: the nearest class mean in the features of one encoder (LoRA Recycle, Sec. 5, baseline d)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...meta.prototypes import Distance, class_centres, distance_logits
from ...vit.backbone import Backbone
from .base import Given, Method, Task


@dataclass
class NearestMean(Method):
    """Minus the distance to each class's mean feature; Eq. 3b unless `distance` says otherwise.

    Subclasses say in `_encode` what the encoder is; here it is the backbone as it comes.

    Args:
        distance: see `distance_logits`.
    """

    distance: Distance = "euclidean"
    encoder: Backbone = field(init=False, repr=False)

    def _prepare(self, given: Given) -> None:
        self.encoder = self._encode(given)

    def _encode(self, given: Given) -> Backbone:
        return given.backbone

    def solve(self, task: Task) -> Tensor:
        support, query = task.features(self.encoder)
        return distance_logits(query, class_centres(support, task.labels(support.device), task.n_way), self.distance)
