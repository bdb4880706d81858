"""Cells of cost: iterations per second, operations and memory of inversion (Tab. 4) and of meta-training (Tab. 5)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..config import as_plain
from ..costs import forward_flops
from ..inversion.invert import Inverter
from ..inversion.surrogate import Surrogate
from ..meta.train import meta_train
from ..runtime.seeds import stream
from .facts import Facts
from .memory import peak, reset_peak
from .settings import inversion_config, meta_config
from .world import World

STEPS, BATCH = 20, {"inversion": 25, "training": 100}
"""Steps that are timed, and the paper's batch sizes."""
WARM_UP, LONGER = 2, 3
"""Steps before the clock; how many times the steps of the first timed run the second takes."""


def inversion_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves a cell of `inversion_cost`."""
    return {**world.surrogate_facts(settings), "measure": _measure(settings, "inversion")}


def training_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves a cell of `training_cost`."""
    meta = as_plain(meta_config(settings))
    measure = _measure(settings, "training")
    return {**world.base_facts(settings), "meta": meta, "seed": settings["seed"], "measure": measure}


def _measure(settings: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """Steps that are timed, images of a batch."""
    measure = settings.get("measure") or {}
    return measure.get("steps", STEPS), measure.get("batch_size", BATCH[kind])


def images_seen(settings: Mapping[str, Any]) -> int:
    """Images that the steps of a cell see, those before the clock among them."""
    kind, n_way, episodes = settings["kind"], settings["adapters"]["n_way"], 1
    if kind == "training":
        config = meta_config(settings)
        n_way, episodes = config.n_way, config.episodes_per_step
    steps, batch = _measure(settings, kind)
    return (WARM_UP + (1 + LONGER) * steps) * episodes * n_way * _per_class(kind, batch, n_way)


def _per_class(kind: str, batch: int, n_way: int) -> int:
    return max(1, round(batch / n_way)) if kind == "inversion" else max(2, batch // n_way)


def inversion_cost(world: World, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of inversion of one batch of one adapter; where tokens are pruned, pruned ones."""
    steps, batch = _measure(settings, "inversion")
    (adapter,), backbone = world.adapters(settings, 1), world.backbone(settings)
    assert adapter.head is not None
    per_class = _per_class("inversion", batch, len(adapter.head.class_names))
    chosen = inversion_config(settings)
    prior = world.prior(chosen)
    config = replace(chosen, images_per_class=per_class, batch_size=batch, prune_from=0.0, patience=None)
    config = config if prior is not None else replace(config, prior=None)

    def take(count: int) -> None:
        invert = Inverter(backbone, config=replace(config, steps=count), prior=prior, dtype=world.dtype)
        invert(adapter, seed=settings["seed"], teacher_logits=False, scores=False, quiet=True)

    size = config.image_size or backbone.image_size
    return _measured(world, take, steps, forward_flops(backbone, size, config.prune))


def training_cost(world: World, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of meta-training on random images, which cost what surrogates cost."""
    steps, batch = _measure(settings, "training")
    model, config = world.model(settings), meta_config(settings)
    per_class = _per_class("training", batch, config.n_way)
    n_shot = min(5, per_class - 1)
    config = replace(config, n_shot=n_shot, n_query=per_class - n_shot, init="random", guide_weight=0.0)
    surrogates = [_noise(model.image_size, model.patch_size, config.n_way, per_class, i) for i in range(2)]

    def take(count: int) -> None:
        meta_train(model, surrogates, config=replace(config, steps=count), seed=settings["seed"], quiet=True)

    patches = model.num_patches(model.image_size)
    left = patches - math.floor(patches * (config.sparsity or 0))
    return _measured(world, take, steps, forward_flops(model, model.image_size, patches=left))


def _measured(world: World, take: Callable[[int], None], steps: int, forward: float) -> dict[str, Any]:
    """Figures of a step: its rate from the difference of two runs, so that what comes before and after drops out.

    FLOPs are those of the paper: multiply-adds of one image, forward once and backward twice.
    """
    take(WARM_UP)  # compiles and captures what there is to compile and capture
    reset_peak(world.device)
    short, long = _seconds(world, lambda: take(steps)), _seconds(world, lambda: take(LONGER * steps))
    rate = (LONGER - 1) * steps / (long - short) if long > short else LONGER * steps / long
    return {"iterations_per_second": rate, "gflops": 3 * forward / 2 / 1e9, "memory": peak(world.device)}


def _seconds(world: World, run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - start


def _noise(size: int, patch_size: int, n_way: int, per_class: int, i: int) -> Surrogate:
    """Random images with random answers and scores."""
    generator, n = stream(i, "noise"), n_way * per_class
    patches = (size // patch_size) ** 2
    return Surrogate(
        torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8),
        torch.arange(n_way).repeat(per_class),
        torch.randn(n, n_way, generator=generator),
        tuple(f"noise {i}.{c}" for c in range(n_way)),
        patch_size,
        scores=torch.rand(n, patches, generator=generator),
        adapter=f"noise {i}",
    )
