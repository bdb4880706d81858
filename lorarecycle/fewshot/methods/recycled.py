"""What this library makes of adapters: the warm start, and meta-LoRAs with their sparse forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...adapters.adapter import Adapter
from ...config import RecycleConfig
from ...inversion.pictures import painted_surrogate
from ...inversion.surrogate import Surrogate
from ...meta.factors import random_factors
from ...meta.train import meta_train
from ...meta.warm_start import start_factors
from ...vit.backbone import Backbone
from .base import Needs
from .nearest import NearestMean


@dataclass
class WarmStart(NearestMean):
    """The nearest class mean under the amplified mean of the adapters, see `warm_start`.

    Args:
        distance: see `distance_logits`.
        r: rank.
        gain: factor on the mean; `common_gain` when None.
    """

    r: int = 16
    gain: float | None = None
    needs: ClassVar[Needs] = Needs(adapters=1)

    def _encode(self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]) -> Backbone:
        meta = replace(RecycleConfig.weights().meta, r=self.r, lora_alpha=float(self.r))
        start = start_factors(adapters, random_factors(backbone, meta, 0), backbone, gain=self.gain)
        return backbone.merge(start.to_adapter(name="warm start", like=backbone))


@dataclass
class FromWeights(NearestMean):
    """The nearest class mean under a meta-LoRA of the default preset: painted pictures, no heads (see `recycle`).

    Args:
        distance: see `distance_logits`.
        steps: of meta-training.
        seed: of everything random.
    """

    steps: int = 100
    seed: int = 0
    needs: ClassVar[Needs] = Needs(adapters=1)

    def _encode(self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]) -> Backbone:
        config = RecycleConfig.weights()
        meta = replace(config.meta, steps=self.steps)
        pictures = painted_surrogate(backbone, config.inversion, seed=self.seed, quiet=True)
        trained = meta_train(backbone, [pictures], config=meta, adapters=adapters, seed=self.seed, quiet=True)
        return backbone.merge(trained.meta_lora)


@dataclass
class LoRARecycle(NearestMean):
    """LoRA Recycle as published: meta-training on surrogates, of which the most attended tokens are seen (Sec. 4.2).

    Args:
        distance: see `distance_logits`.
        sparsity: share of the tokens left out; None takes the surrogates as they are.
        steps: of meta-training; the paper's when None.
        seed: of everything random.
    """

    sparsity: float | None = None
    steps: int | None = None
    seed: int = 0
    needs: ClassVar[Needs] = Needs(adapters=1, heads=True, surrogates=True)

    def _encode(self, backbone: Backbone, adapters: list[Adapter], surrogates: list[Surrogate]) -> Backbone:
        meta = RecycleConfig.paper().meta
        meta = replace(meta, sparsity=self.sparsity, steps=meta.steps if self.steps is None else self.steps)
        if len(surrogates) == 1:
            meta = replace(meta, interpolation=0.0)
        trained = meta_train(backbone, surrogates, config=meta, adapters=adapters, seed=self.seed, quiet=True)
        return backbone.merge(trained.meta_lora)
