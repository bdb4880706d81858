"""LoRAHub: a weighted sum of the adapters whose weights a gradient-free optimiser finds on the support images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.adapter import Adapter
from ...meta.prototypes import Distance, class_centres, distance_logits
from ...runtime.seeds import derive, stream
from ...vit.backbone import Backbone
from ...vit.replay import ReplayedForward
from .base import Given, Method, Needs, Task, inputs
from .linear_probe import probe
from .tuned import augmented


class WeightedSum:
    """A backbone that wears `sum_i w_i D_i` of n adapters, for any weights, written into one copy of its weights.

    Args:
        backbone: is left as it is.
        adapters: n of them.
    """

    def __init__(self, backbone: Backbone, adapters: Sequence[Adapter]) -> None:
        self.count: int = len(adapters)
        self.model: Backbone = backbone.clone()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()
        self.forward: ReplayedForward = ReplayedForward(self.model)
        self._sites: list[tuple[Any, ...]] = []
        for site in dict.fromkeys(site for adapter in adapters for site in adapter.sites):
            parts = [(i, adapter.factors[site]) for i, adapter in enumerate(adapters) if site in adapter.factors]
            lora_A = torch.cat([f.lora_A for _, f in parts]).to(backbone.device)
            lora_B = torch.cat([f.scaling * f.lora_B for _, f in parts], dim=1).to(backbone.device)
            owner = torch.cat([torch.full((f.r,), i) for i, f in parts]).to(backbone.device)
            plain = backbone.site_weight(site).float().clone()
            self._sites.append((self.model.site_weight(site), plain, lora_A, lora_B, owner))

    @torch.no_grad()
    def set(self, weights: Tensor) -> None:
        """Wear the sum with these weights, float [n]."""
        for target, plain, lora_A, lora_B, owner in self._sites:
            target.copy_(torch.addmm(plain, lora_B * weights.to(lora_B)[owner], lora_A))

    @torch.no_grad()
    def find(self, loss: Callable[[], float], *, budget: int, penalty: float, seed: int) -> Tensor:
        """Weights, float32 [n], that a gradient-free optimiser finds from 0 on, within 1.5 of it.

        Args:
            loss: of the weights that are worn.
            budget: weights that are tried.
            penalty: on the mean of their absolute values.
            seed: of the optimiser.
        """
        import nevergrad

        def judge(weights: np.ndarray) -> float:
            self.set(torch.from_numpy(weights).float())
            return loss() + penalty * float(np.abs(weights).mean())

        weights = nevergrad.p.Array(init=np.zeros(self.count)).set_bounds(-1.5, 1.5)
        weights.random_state.seed(derive(seed, "weights") % 2**32)
        optimizer = nevergrad.optimizers.NGOpt(parametrization=weights, budget=budget)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of settings that nevergrad gives to its own parts
            found = optimizer.minimize(judge)
        return torch.from_numpy(found.value).float()


@dataclass
class LoRAHub(Method):
    """Weights of the adapters for each task (Huang et al., COLM 2024), then a linear classifier on the features.

    The loss of some weights is the cross-entropy of augmented support images under the nearest class mean of the plain
    ones, plus `penalty` times the mean of the weights' absolute values. LoRAHub itself has a language model's loss,
    which has no classifier to learn, and weighs the adapters' A and B apart, not their products. Weights start at 0 and
    stay within 1.5 of it, as theirs do.

    Args:
        budget: weights that are tried.
        penalty: of long weights.
        views: augmented copies of each support image.
        seed: of everything random; each task has the same.
    """

    budget: int = 40
    penalty: float = 0.05
    views: int = 2
    seed: int = 0
    needs: ClassVar[Needs] = Needs(adapters=1, fine_tuning=True, packages=("nevergrad",))
    summed: WeightedSum = field(init=False, repr=False)

    def _prepare(self, given: Given) -> None:
        self.summed = WeightedSum(given.backbone, given.adapters)

    def solve(self, task: Task) -> Tensor:
        self.summed.set(self.find_weights(task))
        model = self.summed.model
        support, query = (task.run(model, self.summed.forward, index) for index in (task.support, task.query))
        labels = task.labels(model.device)
        return self.answer(support, labels, query, task.n_way)

    def answer(self, support: Tensor, labels: Tensor, query: Tensor, n_way: int) -> Tensor:
        """Logits [m, n_way] of query features [m, D], from support features [n, D] with their labels [n]."""
        return probe(support[None], labels[None], query[None], n_way, steps=100, rate=0.01)[0]

    @torch.no_grad()
    def find_weights(self, task: Task) -> Tensor:
        """The weights of a task, float32 [n]."""
        model = self.summed.model
        images, labels = inputs(model, task.support_pixels()), task.labels(model.device)
        generator = stream(self.seed, "views")
        everything = torch.cat([images, *(augmented(images, generator) for _ in range(self.views))])

        def loss() -> float:
            features = torch.cat([self.summed.forward(part) for part in everything.split(64)]).float()
            centres = class_centres(features[: len(images)], labels, task.n_way)
            logits = distance_logits(F.normalize(features[len(images) :], dim=-1), F.normalize(centres, dim=-1))
            return F.cross_entropy(10 * logits, labels.repeat(self.views)).item()

        return self.summed.find(loss, budget=self.budget, penalty=self.penalty, seed=self.seed)


@dataclass
class LoRAHubNearestMean(LoRAHub):
    """LoRAHub + NN (LoRA Recycle, Tab. 16): the nearest class mean in place of the linear classifier.

    Args:
        distance: see `distance_logits`; the other settings are those of `LoRAHub`.
    """

    distance: Distance = "euclidean"

    def answer(self, support: Tensor, labels: Tensor, query: Tensor, n_way: int) -> Tensor:
        return distance_logits(query, class_centres(support, labels, n_way), self.distance)
