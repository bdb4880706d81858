"""Random factors of a meta-LoRA, made where everything about it is known to fit the backbone."""

from __future__ import annotations

from ..config import MetaConfig
from ..runtime.seeds import stream
from ..vit.backbone import Backbone
from ..vit.lora import LoRA


def random_factors(backbone: Backbone, config: MetaConfig, seed: int) -> LoRA:
    """Random factors of the meta-LoRA, once everything about it is known to fit the backbone.

    Raises:
        ValueError: blocks that the backbone does not have, sites that cannot be trained in it, or a `guide_size` that
            its patch size does not divide.
    """
    blocks = range(backbone.num_blocks)
    if config.layers is not None and not set(config.layers) <= set(blocks):
        raise ValueError(f"`layers` must be some of 0 to {backbone.num_blocks - 1}, got {config.layers}.")
    for i in blocks if config.layers is None else config.layers:
        if {"fc1", "fc2"} & set(config.sites) and not backbone.has_plain_mlp(i):
            raise ValueError(f"`sites` must leave out fc1 and fc2 for {backbone.name!r}, whose MLPs are gated.")
    if config.guide_size is not None and config.guide_size % backbone.patch_size:
        raise ValueError(
            f"`guide_size` must be a multiple of the patch {backbone.patch_size}, got {config.guide_size}."
        )
    return LoRA.random(
        backbone,
        r=config.r,
        lora_alpha=config.lora_alpha,
        sites=config.sites,
        layers=config.layers,
        generator=stream(seed, "meta-lora"),
    )
