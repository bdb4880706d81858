"""What the cells of an experiment cost: their stages, in floating-point operations, as far as they can be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..config import InversionConfig, RecycleConfig
from ..costs import PASSES, forward_flops, network_flops
from ..fewshot.methods.caml import CAML
from ..fewshot.methods.pmf import PMF
from ..fewshot.methods.recycled import FromWeights, LoRARecycle
from ..fewshot.methods.zero_shot import ZeroShotRecycle
from ..meta.guide import guide_side
from ..stages import guide_views
from . import generation, images, language, speed
from .accuracy import chooses_rate, prepared_facts
from .settings import (
    inversion_config,
    key_of,
    make_cell_method,
    meta_config,
    runs_anew,
    set_names,
    task_config,
    tasks_seen,
)
from .world import World

ALL_WEIGHTS = 3.0
"""Cost of a forward and a backward pass to all weights, in forward passes."""


class Work(NamedTuple):
    """Something that is made once, for however many cells."""

    stage: str
    key: str
    """Work of one stage and key is one, the largest amount of it: who needs few of something shares those of many."""
    amount: int
    unit: str
    flops: float | None
    """None where nobody knows."""
    width: int
    """Of the model: how fast products run depends on it."""


def works(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    """What a cell needs made, itself last.

    Args:
        world: where it runs.
        settings: of the cell.
        key: of the cell.
    """
    return KINDS[settings["kind"]](world, settings, key)


def _accuracy(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    method: Any = make_cell_method(settings)
    if method.needs.adapters or method.needs.surrogates:
        yield from _tuning(world, settings)
    if method.needs.surrogates:
        yield from _inversion(world, settings)
    if isinstance(method, LoRARecycle):
        yield _meta_training(world, settings, key)
    elif method.needs.surrogates or isinstance(method, FromWeights):
        yield _preparation(world, settings, method, key)
    yield _evaluation(world, settings, method, key)


def _inversion_steps(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    yield from _tuning(world, settings, 1)
    pruned = replace(inversion_config(settings), prune_from=0.0)
    flops = speed.images_seen(settings) * _inversion_flops(world, settings, pruned)
    yield Work("measure steps", key, 1, "cells", flops, _width(world, settings))


def _training_steps(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    flops = speed.images_seen(settings) * _meta_flops(world, settings)
    yield Work("measure steps", key, 1, "cells", flops, _width(world, settings))


def _losses(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    yield from _tuning(world, settings)
    yield from _inversion(world, settings)
    count = 2 * _image_count(world, settings, world.count(settings))
    yield Work("losses", key, count, "images", count * _forward(world, settings), _width(world, settings))


def _pictures(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    count, per_class = images.drawn(settings)
    yield from _tuning(world, settings, count)
    yield from _inversion(world, settings, count)
    shown = count * settings["adapters"]["n_way"] * per_class
    yield Work("features of pictures", key, shown, "images", shown * _forward(world, settings), _width(world, settings))


def _generation(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    """Adapters by their images; nobody knows how fast a generator of their size learns."""
    chosen, width = generation.settled(settings), _width(world, settings)
    tasks, forward = chosen["tasks"], _forward(world, settings)
    if chosen["method"] not in ("data", "plain"):
        seen = generation.N_WAY * chosen["per_class"] * chosen["tune"].get("epochs", 10)
        left = sum(not generation.run_folder(world, settings, i).exists() for i in range(tasks))
        run = generation.run_folder(world, settings, 0).parent.name
        yield Work("tune adapters", run, left, "adapters", left * seen * PASSES * forward, width)
    if chosen["method"] in generation.GENERATORS:
        yield Work("fit generators", key, 1, "generators", None, width)
    data = world.open(set_names(settings)[0], "train")
    tested = tasks * generation.N_WAY * len(data) // len(data.class_names)
    tested *= {"data": 0, "plain": 1, "original": 1}.get(chosen["method"], chosen["samples"])
    yield Work("answer with generated adapters", key, tested, "images", tested * forward, width)


def _language(world: World, settings: Mapping[str, Any], key: str) -> Iterator[Work]:
    chosen, folder = language.settled(settings), language.model_folder(world, settings)
    width, texts = chosen["model"]["width"], chosen["texts"]
    step = chosen["batch_size"] * chosen["length"] * 2 * 12 * width**2 * chosen["model"]["blocks"]
    if not (folder / "model.safetensors").exists():
        steps = chosen["model_steps"]
        yield Work("train the language model", folder.name, steps, "steps", steps * ALL_WEIGHTS * step, width)
    if chosen["method"] != "plain":
        left = sum(not (folder / name).exists() for name in texts)
        flops = left * chosen["steps"] * PASSES * step
        yield Work("tune adapters of texts", folder.name, left, "adapters", flops, width)
    if chosen["method"] in generation.GENERATORS:
        yield Work("fit generators", key, 1, "generators", None, width)


KINDS: dict[str, Callable[[World, Mapping[str, Any], str], Iterator[Work]]] = {
    "accuracy": _accuracy,
    "inversion": _inversion_steps,
    "training": _training_steps,
    "losses": _losses,
    "pictures": _pictures,
    "generation": _generation,
    "language": _language,
}


def _width(world: World, settings: Mapping[str, Any]) -> int:
    return world.backbone(settings).embed_dim


def _forward(world: World, settings: Mapping[str, Any]) -> float:
    backbone = world.backbone(settings)
    return forward_flops(backbone, backbone.image_size)


def _image_count(world: World, settings: Mapping[str, Any], adapters: int) -> int:
    return adapters * settings["adapters"]["n_way"] * inversion_config(settings).images_per_class


def _tuning(world: World, settings: Mapping[str, Any], first: int | None = None) -> Iterator[Work]:
    chosen = settings["adapters"]
    if chosen.get("folder"):
        return
    folder = world.folder("adapters", world.adapter_facts(settings))
    count = chosen["count"] if first is None else min(first, chosen["count"])
    left = sum(not (folder / f"task-{i}").exists() for i in range(count))
    of_class = [torch.bincount(world.open(name, "train").labels).float() for name in chosen["of"]]
    counts = [each.clamp(max=chosen.get("per_class") or float("inf")).mean().item() for each in of_class]
    seen = left * chosen["n_way"] * sum(counts) / len(counts) * chosen["tune"].get("epochs", 10)
    flops = seen * PASSES * _forward(world, settings)
    yield Work("tune adapters", folder.name, left, "adapters", flops, _width(world, settings))


def _inversion(world: World, settings: Mapping[str, Any], first: int | None = None) -> Iterator[Work]:
    config, forward, width = inversion_config(settings), _forward(world, settings), _width(world, settings)
    count = world.count(settings) if first is None else min(first, world.count(settings))
    folder = world.folder("surrogates", world.surrogate_facts(settings))
    key = folder.name
    if settings["surrogates"]["images"] == "real":
        labelled = _image_count(world, settings, count)
        yield Work("label real images", key, labelled, "images", labelled * forward, width)
        return
    left = _image_count(world, settings, sum(not (folder / f"{i}.safetensors").exists() for i in range(count)))
    flops = left * config.steps * _inversion_flops(world, settings, config)
    yield Work("invert adapters", key, left, "images", flops, width)


def _inversion_flops(world: World, settings: Mapping[str, Any], config: InversionConfig) -> float:
    """Of one image in one step of inversion, the mean of steps with and without pruned tokens."""
    backbone = world.backbone(settings)
    share = 1 - config.prune_from if config.prune else 0.0
    size = config.image_size or backbone.image_size
    step = (1 - share) * forward_flops(backbone, size) + share * forward_flops(backbone, size, config.prune)
    prior = world.prior(config)
    return PASSES * (step if prior is None else step + network_flops(prior.network, prior.size or size))


def _meta_training(world: World, settings: Mapping[str, Any], key: str) -> Work:
    """Done once for all cells that learn the same, but for models that learn whole: those are not kept."""
    config, kept = meta_config(settings), settings["learn"] != "everything"
    key = key_of(world.learn_facts(settings)) if kept else key
    steps = 0 if kept and (world.work / "meta-loras" / key).exists() else config.steps
    seen = steps * config.episodes_per_step * config.n_way * (config.n_shot + config.n_query)
    return Work("meta-train", key, steps, "steps", seen * _meta_flops(world, settings), _width(world, settings))


def _meta_flops(world: World, settings: Mapping[str, Any]) -> float:
    """Of one image in one step of meta-training."""
    passes = ALL_WEIGHTS if settings["learn"] == "everything" else PASSES
    return passes * (1 - (meta_config(settings).sparsity or 0)) * _forward(world, settings)


def _preparation(world: World, settings: Mapping[str, Any], method: Any, key: str) -> Work:
    """What a method learns before it sees a task, once for all sets and shots where nothing of it hangs on tasks."""
    forward, width = _forward(world, settings), _width(world, settings)
    if not method.needs.rate:
        key = key_of(prepared_facts(world, settings, method))
    if isinstance(method, FromWeights):
        return _from_weights(world, method, key, forward, world.backbone(settings))
    if isinstance(method, CAML):
        tokens = method.max_way * method.n_query * (1 + method.max_way * (1 + method.max_shot) / 2)
        step = method.batch * tokens * 2 * 12 * method.hidden**2 * method.layers
        features = _image_count(world, settings, world.count(settings)) * forward
        return Work("prepare methods", key, method.steps, "steps", features + method.steps * ALL_WEIGHTS * step, width)
    if isinstance(method, PMF):
        seen = method.meta_steps * method.n_way * (method.n_shot + method.n_query)
        return Work("prepare methods", key, method.meta_steps, "steps", seen * ALL_WEIGHTS * forward, width)
    if isinstance(method, ZeroShotRecycle):
        steps, gradients = method.passes
        seen = steps * method.n_way * method.n_query
        return Work("prepare methods", key, steps, "steps", seen * (PASSES if gradients else 1) * forward, width)
    return Work("prepare methods", key, 1, "methods", None, width)


def _from_weights(world: World, method: FromWeights, key: str, forward: float, backbone: Any) -> Work:
    """A meta-LoRA of the default preset: steps on painted pictures, and the guide's features of them."""
    config = RecycleConfig.weights()
    meta = config.meta
    seen = method.steps * meta.n_way * (meta.n_shot + meta.n_query)
    side = meta.guide_size or guide_side(backbone, backbone.image_size)
    guide = config.inversion.pictures * guide_views(config) * forward_flops(backbone, side)
    flops = seen * PASSES * forward + guide
    return Work("prepare methods", key, method.steps, "steps", flops, backbone.embed_dim)


def _evaluation(world: World, settings: Mapping[str, Any], method: Any, key: str) -> Work:
    """Features of the images that tasks use; for methods that run the model anew, of each task and its training."""
    config, forward, width = task_config(settings), _forward(world, settings), _width(world, settings)
    per_task = config.n_way * (config.n_shot + config.n_query)
    sets, tasks = set_names(settings), tasks_seen(settings)
    if chooses_rate(method):
        tasks += config.n_validation_tasks * len(method.rates)
    if not runs_anew(settings):
        seen = sum(min(len(world.open(name, "test")), tasks * per_task) for name in sets)
        facts = {**world.base_facts(settings), "tests": [world.open(name, "test").digest() for name in sets]}
        if method.needs.adapters:  # features of a model of its own; the plain one's serve all shots and methods
            facts |= prepared_facts(world, settings, method)
        return Work("features", key_of(facts), seen, "images", seen * forward, width)
    support = config.n_way * config.n_shot
    if hasattr(method, "budget"):
        training = method.budget * support * (1 + method.views)
    else:
        passes = ALL_WEIGHTS if settings["method"] in ("full", "pmf") else PASSES
        training = method.steps * support * passes * (2 if settings["method"] == "pmf" else 1)
    seen = len(sets) * tasks * (per_task + math.ceil(training))
    amount = tasks_seen(settings) * len(sets)
    return Work("fine-tune and answer tasks", key, amount, "tasks", seen * forward, width)
