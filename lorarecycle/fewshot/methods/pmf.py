"""P > M > F: pre-training, meta-training on episodes, fine-tuning on each task's augmented support."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...meta.prototypes import class_centres, distance_logits
from ...runtime.seeds import stream
from .base import Given, Needs, Task, inputs
from .episodes import EpisodeDraw, pool_classes
from .tuned import Trainable, Tuned, augmented, descend


@dataclass
class PMF(Tuned):
    """All weights train: on episodes of the surrogates beforehand, then on each task (Hu et al., CVPR 2022).

    Both stages have the loss of a cosine nearest-mean classifier; in fine-tuning the support gives the means and its
    augmented copies are the queries. See `Tuned` for the other settings.

    Args:
        meta_steps: episodes.
        meta_rate: learning rate of SGD on them.
        n_way, n_shot, n_query: of an episode.
        temperature: factor on the cosines; 10 is the authors' start.
    """

    meta_steps: int = 100
    meta_rate: float = 1e-3
    n_way: int = 5
    n_shot: int = 5
    n_query: int = 10
    temperature: float = 10.0
    needs: ClassVar[Needs] = Needs(adapters=1, surrogates=True, fine_tuning=True, rate=True)
    trainable: Trainable = field(init=False, repr=False)

    def _setup(self, given: Given) -> None:
        pool = pool_classes(given.surrogates)
        images, n_way = pool.images, min(self.n_way, len(pool.class_names))
        draw = EpisodeDraw(pool.labels, n_way, min(self.n_shot, min(pool.counts) - 1), self.n_query)
        self.trainable = Trainable(given.backbone)

        def loss(step: int) -> Tensor:
            support, known, query, truth = draw(stream(self.seed, "P>M>F", step))
            return self._loss(inputs(self.trainable.model, images[torch.cat([support, query])]), known, truth)

        parameters = self.trainable.model.parameters()
        descend(parameters, loss, steps=self.meta_steps, rate=self.meta_rate, optimizer="sgd")
        self.trainable.keep()

    def _loss(self, images: Tensor, known: Tensor, truth: Tensor) -> Tensor:
        features = self.trainable(images)
        centres = class_centres(features[: len(known)], known.to(features.device), int(known.max()) + 1)
        logits = self.temperature * distance_logits(features[len(known) :], centres, "cosine")
        return F.cross_entropy(logits, truth.to(features.device))

    def _solve(self, task: Task, rate: float) -> Tensor:
        self.trainable.reset()
        model, labels = self.trainable.model, task.support_labels
        images = inputs(model, task.support_pixels())

        def loss(step: int) -> Tensor:
            views = augmented(images, stream(self.seed, "view", step))
            return self._loss(torch.cat([images, views]), labels, labels)

        descend(model.parameters(), loss, steps=self.steps, rate=rate, optimizer=self.optimizer)
        support, query = (task.run(model, self.trainable, index) for index in (task.support, task.query))
        centres = class_centres(support, task.labels(support.device), task.n_way)
        return self.temperature * distance_logits(query, centres, "cosine")
