"""Zero-shot LoRA Recycle, LoRAHub and MOLE: what classifies is a matrix of text features (LoRA Recycle, Tab. 14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.adapter import Adapter, Head
from ...config import RecycleConfig
from ...inversion.surrogate import Surrogate
from ...meta.factors import random_factors
from ...meta.train import learning_rate
from ...runtime.seeds import derive, stream
from ...vit.backbone import Backbone
from .base import Method, Needs, Task, TextEncoder, inputs
from .lorahub import WeightedSum
from .mole import Gated
from .tuned import descend


def contrastive_logits(text_encoder: TextEncoder, features: Tensor, class_names: Sequence[str]) -> Tensor:
    """CLIP's logits: cosines of image and text features, times the model's temperature.

    Args:
        text_encoder: of the model that the features are of.
        features: [B, D], of images; gradients run through.
        class_names: C names.

    Returns:
        float32 [B, C].
    """
    images = F.normalize(text_encoder.project(features), dim=-1)
    return text_encoder.scale * images @ text_encoder.encode(class_names).to(images).T


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
    text_encoder: TextEncoder = field(init=False, repr=False)

    def _prepare(
        self,
        backbone: Backbone,
        adapters: list[Adapter],
        surrogates: list[Surrogate],
        validation_tasks: list[Task],
        text_encoder: TextEncoder | None,
    ) -> None:
        assert text_encoder is not None  # checked
        self.text_encoder = text_encoder
        self.model, self.encoder = self._learn(backbone, adapters, surrogates)

    def _learn(
        self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]
    ) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
        """The model that was trained, and what gives its features."""
        meta = RecycleConfig.paper().meta
        steps = meta.steps if self.steps is None else self.steps
        lora = random_factors(backbone, replace(meta, r=self.r, lora_alpha=float(self.r)), self.seed)
        optimizer = torch.optim.Adam(lora.parameters(), lr=meta.lr or 1e-3)
        loss = self._episodes(backbone, surrogates)
        with torch.enable_grad():
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, meta, meta.lr or 1e-3)
                optimizer.zero_grad(set_to_none=True)
                loss(step, lambda x: backbone(x, lora=lora)).backward()
                optimizer.step()
        trained = backbone.merge(lora.to_adapter(name="zero-shot meta-LoRA", like=backbone))
        return trained, trained

    def _episodes(
        self, backbone: Backbone, surrogates: list[Surrogate]
    ) -> Callable[[int, Callable[[Tensor], Tensor]], Tensor]:
        """The contrastive loss of the episode of a step, under some encoder."""
        names = list(dict.fromkeys(name for s in surrogates for name in s.class_names))
        images = torch.cat([s.images for s in surrogates])
        known = torch.cat(
            [
                torch.tensor([names.index(n) for n in s.class_names])[s.labels]
                for s in surrogates
                if s.labels is not None
            ]
        )

        def loss(step: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
            generator = stream(self.seed, "zero-shot episode", step)
            classes = torch.randperm(len(names), generator=generator)[: self.n_way].tolist()
            rows, truth = [], []
            for i, c in enumerate(classes):
                own = (known == c).nonzero()[:, 0]
                rows.append(own[torch.randperm(len(own), generator=generator)[: self.n_query]])
                truth.append(torch.full((len(rows[-1]),), i))
            features = encode(inputs(backbone, images[torch.cat(rows)])).float()
            logits = contrastive_logits(self.text_encoder, features, [names[c] for c in classes])
            return F.cross_entropy(logits, torch.cat(truth).to(logits.device))

        return loss

    def solve(self, task: Task) -> Tensor:
        if isinstance(self.encoder, Backbone):
            _, query = task.features(self.encoder)
        else:
            query = task.run(self.model, self.encoder, task.query)
        return contrastive_logits(self.text_encoder, query, task.class_names).detach()


@dataclass
class ZeroShotHub(ZeroShotRecycle):
    """LoRAHub without support: the adapters' weights are found once, on the surrogates, without gradients.

    Args:
        budget: weights that are tried.
        penalty: of long weights, as in `LoRAHub`.
    """

    budget: int = 40
    penalty: float = 0.05
    needs: ClassVar[Needs] = Needs(adapters=1, surrogates=True, text_encoder=True, packages=("nevergrad",))

    @torch.no_grad()
    def _learn(
        self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]
    ) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
        import nevergrad

        summed, loss = WeightedSum(backbone, adapters), self._episodes(backbone, surrogates)

        def judge(weights: np.ndarray) -> float:
            summed.set(torch.from_numpy(weights).float())
            return loss(0, summed.model).item() + self.penalty * float(np.abs(weights).mean())

        weights = nevergrad.p.Array(init=np.zeros(len(adapters))).set_bounds(-1.5, 1.5)
        weights.random_state.seed(derive(self.seed, "weights") % 2**32)
        found = nevergrad.optimizers.NGOpt(parametrization=weights, budget=self.budget).minimize(judge)
        summed.set(torch.from_numpy(found.value).float())
        return summed.model, summed.model


@dataclass
class ZeroShotMole(ZeroShotRecycle):
    """MOLE without support: the gates train once, on the surrogates.

    Args:
        rate: learning rate of Adam.
    """

    rate: float = 1e-3

    def _learn(
        self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]
    ) -> tuple[Backbone, Callable[[Tensor], Tensor]]:
        gated, loss = Gated(backbone, adapters), self._episodes(backbone, surrogates)
        steps = 50 if self.steps is None else self.steps
        descend(gated.parameters(), lambda step: loss(step, gated.model), steps=steps, rate=self.rate, optimizer="adam")
        return gated.model, gated.model
