"""Zero-shot LoRA Recycle, LoRAHub and MOLE: what classifies is a matrix of text features (LoRA Recycle, Tab. 14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.adapter import Head
from ...config import RecycleConfig
from ...meta.factors import random_factors
from ...meta.train import learning_rate
from ...runtime.seeds import stream
from ...vit.backbone import Backbone
from .base import Given, Method, Needs, Task, TextEncoder, inputs
from .lorahub import WeightedSum
from .mole import Gated
from .text import Names
from .tuned import descend


def text_head(text_encoder: TextEncoder, class_names: Sequence[str], width: int, *, pool: str = "token") -> Head:
    """A linear head whose rows are the classes' text features in the space of image features: what takes the place of
    an adapter's own head in inversion (Tab. 14; Eq. 1 with a contrastive loss).

    CLIP divides image features by their length, which a linear head cannot: it divides by the square root of the width,
    which is about the length of features after a layer norm.

    Args:
        text_encoder: whose projection of image features is linear.
        class_names: C names.
        width: D, of image features.
        pool: see `Head.pool`.

    Raises:
        ValueError: the projection is not linear.
    """
    unit = torch.eye(width)
    zero = text_encoder.project(torch.zeros(1, width))
    columns = text_encoder.project(unit) - zero
    probe = torch.linspace(-1, 1, width)[None]
    if not torch.allclose(text_encoder.project(probe) - zero, probe.to(columns) @ columns, atol=1e-3):
        raise ValueError("`text_encoder` must project image features by a matrix, got one that is not linear.")
    text = text_encoder.encode(class_names).to(columns)
    weight = text_encoder.scale * text @ columns.T
    bias = text_encoder.scale * text @ zero[0]
    return Head((weight / width**0.5).cpu(), (bias / width**0.5).cpu(), tuple(class_names), pool)


@dataclass
class ZeroShotRecycle(Method):
    """Zero-shot LoRA Recycle: a meta-LoRA that trains on episodes of surrogates under CLIP's contrastive loss, its
    classes named in words; it never looks at a task's support.

    Args:
        steps: of meta-training; the paper's when None.
        n_way: classes of an episode, of whatever adapters; never two of one name.
        n_query: images of each.
        r: rank of the meta-LoRA.
        seed: of everything random.
    """

    steps: int | None = None
    n_way: int = 5
    n_query: int = 15
    r: int = 4
    seed: int = 0
    needs: ClassVar[Needs] = Needs(adapters=1, surrogates=True, text_encoder=True)
    encoder: Callable[[Tensor], Tensor] = field(init=False, repr=False)
    model: Backbone = field(init=False, repr=False)
    names: Names = field(init=False, repr=False)

    @property
    def passes(self) -> tuple[int, bool]:
        """How many episodes go through the model in preparation, and whether with gradients."""
        return RecycleConfig.paper().meta.steps if self.steps is None else self.steps, True

    def _prepare(self, given: Given) -> None:
        assert given.text_encoder is not None  # checked
        self.names = Names(given.text_encoder)
        self.model, self.encoder = self._learn(given, Episodes(given, self.names, self.n_way, self.n_query, self.seed))

    def _learn(self, given: Given, loss: Episodes) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
        """The model that was trained, and what gives its features."""
        backbone, plan = given.backbone, RecycleConfig.paper().meta
        meta = replace(plan, steps=self.passes[0], r=self.r, lora_alpha=float(self.r))
        lora = random_factors(backbone, meta, self.seed)
        optimizer = torch.optim.Adam(lora.parameters(), lr=meta.lr or 1e-3)
        with torch.enable_grad():
            for step in range(meta.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, meta, meta.lr or 1e-3)
                optimizer.zero_grad(set_to_none=True)
                loss(step, lambda x: backbone(x, lora=lora)).backward()
                optimizer.step()
        trained = backbone.merge(lora.to_adapter(name="zero-shot meta-LoRA", like=backbone))
        return trained, trained

    def solve(self, task: Task) -> Tensor:
        if isinstance(self.encoder, Backbone):
            _, query = task.features(self.encoder)
        else:
            query = task.run(self.model, self.encoder, task.query)
        return self.names.logits(query, task.class_names).detach()


class Episodes:
    """Cross-entropy of CLIP's logits on episodes of the surrogates; classes of one name are one.

    Args:
        given: backbone and surrogates of a method.
        names: of the classes.
        n_way, n_query: classes of an episode, images of each.
        seed: of the draws.
    """

    def __init__(self, given: Given, names: Names, n_way: int, n_query: int, seed: int) -> None:
        self.backbone, self.names, self.seed = given.backbone, names, seed
        self.n_way, self.n_query = n_way, n_query
        self.classes = list(dict.fromkeys(name for s in given.surrogates for name in s.class_names))
        self.images: Tensor = torch.cat([s.images for s in given.surrogates])
        names.encode(self.classes)  # all at once
        number = {name: i for i, name in enumerate(self.classes)}
        owned = [(torch.tensor([number[n] for n in s.class_names]), s.labels) for s in given.surrogates]
        known = torch.cat([own[labels] for own, labels in owned if labels is not None])
        self.members: list[Tensor] = [(known == c).nonzero()[:, 0] for c in range(len(self.classes))]

    def __call__(self, step: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of the episode of a step, under some encoder of images."""
        generator = stream(self.seed, "zero-shot episode", step)
        classes = torch.randperm(len(self.classes), generator=generator)[: self.n_way].tolist()
        rows = []
        for own in (self.members[c] for c in classes):
            rows.append(own[torch.randperm(len(own), generator=generator)[: self.n_query]])
        truth = torch.cat([torch.full((len(own),), i) for i, own in enumerate(rows)])
        features = encode(inputs(self.backbone, self.images[torch.cat(rows)])).float()
        logits = self.names.logits(features, [self.classes[c] for c in classes])
        return F.cross_entropy(logits, truth.to(logits.device))


@dataclass
class ZeroShotHub(ZeroShotRecycle):
    """LoRAHub without support: the adapters' weights are found once, on the surrogates, without gradients.

    Args:
        budget: weights that are tried.
        episodes: of surrogates, whose mean loss judges all weights: those of one would fit its few classes.
        penalty: of long weights, as in `LoRAHub`.
    """

    budget: int = 40
    episodes: int = 10
    penalty: float = 0.05
    needs: ClassVar[Needs] = Needs(adapters=1, surrogates=True, text_encoder=True, packages=("nevergrad",))

    @property
    def passes(self) -> tuple[int, bool]:
        return self.budget * self.episodes, False

    @torch.no_grad()
    def _learn(self, given: Given, loss: Episodes) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
        summed = WeightedSum(given.backbone, given.adapters)

        def judge() -> float:
            losses = [loss(step, summed.model).item() for step in range(self.episodes)]
            return sum(losses) / len(losses)

        summed.set(summed.find(judge, budget=self.budget, penalty=self.penalty, seed=self.seed))
        return summed.model, summed.model


@dataclass
class ZeroShotMole(ZeroShotRecycle):
    """MOLE without support: the gates train once, on the surrogates.

    Args:
        rate: learning rate of Adam.
    """

    rate: float = 1e-3

    @property
    def passes(self) -> tuple[int, bool]:
        return 50 if self.steps is None else self.steps, True

    def _learn(self, given: Given, loss: Episodes) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
        gated = Gated(given.backbone, given.adapters)
        steps = self.passes[0]
        descend(gated.parameters(), lambda s: loss(s, gated.model), steps=steps, rate=self.rate, optimizer="adam")
        return gated.model, gated.model
