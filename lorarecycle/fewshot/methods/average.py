"""LoRAs Avg: the mean of many adapters' updates, merged into the plain model (LoRA Recycle, Sec. 5, baseline a)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...adapters.adapter import Adapter, LoRAFactors
from ...meta.warm_start import start_factors
from ...runtime.seeds import stream
from ...vit.backbone import Backbone
from ...vit.lora import LoRA, fresh_factors
from .base import Given, Needs
from .nearest import NearestMean


def average(adapters: Sequence[Adapter], *, name: str = "average") -> Adapter:
    """The exact mean of the updates `scaling * B A`; the ranks add up, nothing is cut off.

    (The mean of the A's and of the B's apart has no meaning: factors are only determined up to a change of basis.)

    Args:
        adapters: for one base model; an adapter without a site counts as zero there.
        name: of the result, which has no head.

    Raises:
        ValueError: no adapters, or shapes that differ at a site.
    """
    if not adapters:
        raise ValueError("`adapters` must hold at least one adapter, got none.")
    factors = {}
    for site in dict.fromkeys(site for adapter in adapters for site in adapter.sites):
        parts = [adapter.factors[site] for adapter in adapters if site in adapter.factors]
        if len({(p.lora_A.shape[1], p.lora_B.shape[0]) for p in parts}) > 1:
            raise ValueError(f"`adapters` must be for one base model, got different shapes at {site}.")
        lora_A = torch.cat([p.lora_A for p in parts])
        lora_B = torch.cat([p.lora_B * (p.scaling / len(adapters)) for p in parts], dim=1)
        factors[site] = LoRAFactors(lora_A, lora_B, 1.0)
    first = adapters[0]
    return Adapter(factors, base_model=first.base_model, mean=first.mean, std=first.std, name=name)


def average_factors(adapters: Sequence[Adapter], backbone: Backbone, r: int) -> LoRA:
    """The mean of the updates, re-factored at rank `r` by a singular value decomposition of the products.

    Ranks that the adapters do not fill start as PEFT starts them.

    Args:
        adapters: for `backbone`.
        backbone: that they are for.
        r: rank at each site that any of them has.

    Returns:
        trainable factors on the backbone's device.
    """
    sites = {site for adapter in adapters for site in adapter.sites}
    shapes = {site: backbone.site_shape(site) for site in sorted(sites)}
    generator = stream(0, "average")
    fresh = {site: fresh_factors(r, *shape, generator=generator) for site, shape in shapes.items()}
    return start_factors(adapters, LoRA(fresh), backbone, gain=1.0).to(backbone.device)


@dataclass
class AverageNearestMean(NearestMean):
    """The nearest class mean under the average of the adapters.

    Args:
        distance: see `distance_logits`.
        r: rank that the average is cut to; None keeps it whole.
    """

    r: int | None = None
    needs: ClassVar[Needs] = Needs(adapters=1)

    def _encode(self, given: Given) -> Backbone:
        backbone, adapters = given.backbone, given.adapters
        if self.r is None:
            return backbone.merge(average(adapters))
        return backbone.merge(average_factors(adapters, backbone, self.r).to_adapter(name="average", like=backbone))
