"""What this library makes of adapters: the warm start, and meta-LoRAs with their sparse forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...config import MetaConfig, RecycleConfig
from ...inversion.pictures import painted_surrogate
from ...inversion.surrogate import Surrogate
from ...meta.factors import random_factors
from ...meta.train import meta_train
from ...meta.warm_start import start_factors
from ...vit.backbone import Backbone
from .base import Given, Needs
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

    def _encode(self, given: Given) -> Backbone:
        backbone = given.backbone
        meta = replace(RecycleConfig.weights().meta, r=self.r, lora_alpha=float(self.r))
        start = start_factors(given.adapters, random_factors(backbone, meta, 0), backbone, gain=self.gain)
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

    def _encode(self, given: Given) -> Backbone:
        config = RecycleConfig.weights()
        meta = replace(config.meta, steps=self.steps)
        pictures = painted_surrogate(given.backbone, config.inversion, seed=self.seed, quiet=True)
        return _trained(given, [pictures], meta, self.seed)


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

    def _encode(self, given: Given) -> Backbone:
        meta = RecycleConfig.paper().meta
        meta = replace(meta, sparsity=self.sparsity, steps=meta.steps if self.steps is None else self.steps)
        if len(given.surrogates) == 1:
            meta = replace(meta, interpolation=0.0)
        return _trained(given, given.surrogates, meta, self.seed)


def _trained(given: Given, surrogates: list[Surrogate], config: MetaConfig, seed: int) -> Backbone:
    """The backbone under the meta-LoRA that the surrogates train."""
    result = meta_train(given.backbone, surrogates, config=config, adapters=given.adapters, seed=seed, quiet=True)
    return given.backbone.merge(result.meta_lora)
