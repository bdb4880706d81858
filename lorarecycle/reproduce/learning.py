"""What Tables 7 to 11 compare: how a meta-LoRA, or more than it, learns from surrogates; made once and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from ..adapters.adapter import Adapter
from ..config import MetaConfig
from ..fewshot.methods.episodes import pool_classes
from ..fewshot.methods.tuned import Trainable
from ..inversion.surrogate import Surrogate
from ..meta.bank import fill_bank
from ..meta.draws import Draws
from ..meta.episodes import EpisodeSampler
from ..meta.loss import episode_loss
from ..meta.shares import own_shares
from ..meta.train import default_lr, learning_rate
from ..runtime.distributed import ALONE
from ..runtime.files import read_json, write_json
from ..runtime.graphs import adam, set_rate
from ..runtime.progress import track
from ..tuning import tune
from ..vit.backbone import Backbone
from ..vit.features import normalized_batches
from .settings import meta_config
from .stages import trained
from .world import World

T = TypeVar("T")

MASK_SPARSITY = 0.75
"""Of the masks of Table 11, where `meta.sparsity` says nothing."""


class Learned(NamedTuple):
    """What has learnt from surrogates.

    Attributes:
        model: of the cell.
        adapter: that it wears, if it has one.
        seconds: that learning took, adapters and surrogates not counted; None where they were not kept.
    """

    model: Backbone
    adapter: Adapter | None
    seconds: float | None


def learned(world: World, settings: Mapping[str, Any]) -> Learned:
    """The model of a cell once it has learnt from its surrogates.

    `learn` is "lora" (the meta-LoRA), "everything" (all weights, Tab. 10) or "joint" (a LoRA and one classifier over
    all classes of all adapters, Tab. 8).
    """
    if settings["learn"] == "everything":
        model, seconds = _timed(everything, world, settings)
        return Learned(model, None, seconds)
    folder = world.folder("meta-loras", world.learn_facts(settings))
    kept = folder.with_suffix(".json")
    if not folder.exists():
        adapter, seconds = _timed(joint if settings["learn"] == "joint" else _meta_lora, world, settings)
        write_json(kept, {"seconds": seconds})
        adapter.save(folder)  # last: where it is there, so are its seconds
    return Learned(world.model(settings), Adapter.load(folder), read_json(kept)["seconds"] if kept.exists() else None)


def _timed(make: Callable[[World, Mapping[str, Any]], T], world: World, settings: Mapping[str, Any]) -> tuple[T, float]:
    """What is made of a cell's adapters and surrogates, and the seconds that it took once they were there."""
    world.adapters(settings), world.surrogates(settings)
    start = time.perf_counter()
    return make(world, settings), time.perf_counter() - start


def settle_meta(world: World, settings: Mapping[str, Any]) -> tuple[list[Surrogate], MetaConfig]:
    """Surrogates and settings of meta-training, masked as `surrogates.mask` says."""
    config, surrogates = meta_config(settings), world.surrogates(settings)
    if len(surrogates) == 1:
        config = replace(config, interpolation=0.0)
    if settings["surrogates"]["mask"] == "first-layer":
        sparsity = MASK_SPARSITY if config.sparsity is None else config.sparsity
        surrogates = first_layer_masks(world, settings, surrogates, sparsity)
        config = replace(config, sparsity=None)
    return surrogates, config


def _meta_lora(world: World, settings: Mapping[str, Any]) -> Adapter:
    surrogates, config = settle_meta(world, settings)
    return trained(
        world.backbone(settings),
        surrogates,
        config=config,
        adapters=world.adapters(settings),
        seed=settings["seed"],
        dtype=world.dtype,
        quiet=world.quiet,
    )


@torch.no_grad()
def first_layer_masks(
    world: World, settings: Mapping[str, Any], surrogates: Sequence[Surrogate], sparsity: float
) -> list[Surrogate]:
    """Surrogates whose kept patches are those that the teacher's first block attends to most (Tab. 11)."""
    found = []
    for surrogate, adapter in zip(surrogates, world.adapters(settings), strict=True):
        teacher = world.backbone(settings).merge(adapter).to(dtype=world.dtype)
        batches = normalized_batches(teacher, surrogate.images, size=surrogate.images.shape[-1])
        kept = [teacher.encode(x, prune={0: sparsity}, class_token_only=True).kept for x in batches]
        found.append(replace(surrogate, kept=torch.cat([k.cpu().sort(dim=1).values for k in kept if k is not None])))
    return found


def joint(world: World, settings: Mapping[str, Any]) -> Adapter:
    """A LoRA tuned with one classifier over the classes of all adapters (Tab. 8), as long as meta-training looks at
    images: whole passes, one at least."""
    surrogates, config = settle_meta(world, settings)
    images = pool_classes(surrogates)
    seen = config.steps * config.episodes_per_step * config.n_way * (config.n_shot + config.n_query)
    adapter = tune(
        world.model(settings),
        images,
        config={
            "epochs": max(1, round(seen / len(images))),
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "sites": config.sites,
            "layers": config.layers,
            "lr": config.lr or 1e-3,
        },
        seed=settings["seed"],
        name="joint",
        quiet=world.quiet,
    )
    return adapter.with_head(None)


def everything(world: World, settings: Mapping[str, Any]) -> Backbone:
    """A backbone all of whose weights took the steps of meta-training (Tab. 10), by Adam in float32.

    Without a guide, which `check` refuses.
    """
    surrogates, config = settle_meta(world, settings)
    plain = world.model(settings)
    trainable = Trainable(plain)
    model = trainable.model
    bank = fill_bank(plain, surrogates, config.sparsity, resolutions=config.resolutions)
    lr = default_lr(model.embed_dim) if config.lr is None else config.lr
    sampler = EpisodeSampler(surrogates, config, settings["seed"])
    passes = own_shares(Draws.of(sampler, config, settings["seed"], first=0, device=model.device), config, ALONE)
    optimizer = adam(list(model.parameters()), model.device)
    none: Any = None
    for step in track(range(config.steps), "meta-train all weights", quiet=world.quiet):
        at = torch.tensor([step], device=model.device)
        optimizer.zero_grad(set_to_none=True)
        for draws, weight in passes:
            lower = world.dtype != torch.float32
            with torch.enable_grad(), torch.autocast(model.device.type, world.dtype, enabled=lower):
                loss = weight * episode_loss(model, none, bank, draws.at(at), config)
            loss.backward()
        set_rate(optimizer, torch.tensor(learning_rate(step, config, lr), device=model.device))
        optimizer.step()
    return model.requires_grad_(False).to(dtype=world.dtype)
