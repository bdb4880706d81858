"""`--plan`: what an experiment will do, how much of it is done, and about how long the rest takes here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..config import RecycleConfig
from ..costs import PASSES, flops_per_second, forward_flops, network_flops
from ..fewshot.methods.recycled import FromWeights, LoRARecycle
from ..fewshot.methods.registry import find_method, make_method
from ..meta.guide import native_size
from ..plan import _duration
from .accuracy import validation_set
from .run import Cell, Run
from .settings import inversion_config, key_of, meta_config, method_options, pick, set_names, task_config
from .world import ADAPTERS, SURROGATES, World

ALL_WEIGHTS = 3.0
"""Cost of a forward and a backward pass to all weights, in forward passes."""


class Work(NamedTuple):
    """Something that is made once, for however many cells."""

    stage: str
    key: str
    amount: int
    unit: str
    flops: float


def plan_run(run: Run) -> str:
    """A table of the work that is left. Estimates: one product of the model's shape is timed.

    Args:
        run: prepared; its models and its prior are loaded, as their operations are counted.
    """
    world, todo = run.world, run.todo()
    found: dict[tuple[str, str], tuple[Work, float]] = {}
    speeds: dict[int, float] = {}
    for cell in todo:
        width = world.backbone(cell.settings).embed_dim
        if width not in speeds:  # the best of three: other programs slow some of them down
            speeds[width] = max(flops_per_second(world.device, world.dtype, width) for _ in range(3))
        speed = speeds[width]
        for work in works(world, cell):
            found.setdefault((work.stage, work.key), (work, work.flops / speed))
    stages: dict[str, list[tuple[Work, float]]] = {}
    for work, seconds in found.values():
        stages.setdefault(work.stage, []).append((work, seconds))
    rows = [("stage", "amount", "about")]
    for stage, parts in stages.items():
        amount = f"{sum(work.amount for work, _ in parts)} {parts[0][0].unit}"
        rows.append((stage, amount, _duration(sum(seconds for _, seconds in parts))))
    total = sum(seconds for _, seconds in found.values())
    rows.append(("", "", _duration(total)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    missing = sum(bool(cell.missing) for cell in run.cells)
    different = len({cell.key for cell in run.cells if not cell.missing})
    title = f"{run.experiment.title}: {len(run.cells)} cells, {different} different ones, {different - len(todo)} done"
    title += f", {missing} without their data set" if missing else ""
    note = ["A rehearsal at small size."] if run.quick else []
    return "\n".join([title, run.machine, *note, "", *table])


def works(world: World, cell: Cell) -> Iterator[Work]:
    """What a cell needs made, itself last."""
    settings = cell.settings
    kind = settings["kind"]
    backbone = world.backbone(settings)
    forward = forward_flops(backbone, backbone.image_size)
    if kind not in ("accuracy", "losses", "inversion", "training"):
        yield Work(f"{kind} cells", cell.key, 1, "cells", 0.0)
        return
    method = make_method(settings["method"], **method_options(settings))
    needs = method.needs
    adapters = needs.adapters or needs.surrogates if kind == "accuracy" else kind != "training"
    surrogates = needs.surrogates if kind == "accuracy" else kind == "losses"
    if adapters and not settings["adapters"].get("folder"):
        yield _tuning(world, settings, forward)
    if surrogates:
        yield _inversion(world, settings, forward)
    if kind == "accuracy":
        if isinstance(method, LoRARecycle):
            yield _meta_training(settings, cell.key, forward)
        if isinstance(method, FromWeights):
            yield _from_weights(world, settings, method, forward)
        yield _evaluation(world, settings, cell.key, forward)
    elif kind != "losses":
        yield Work(f"measure {kind}", cell.key, 1, "cells", 80 * 100 * PASSES * forward)


def _tuning(world: World, settings: Mapping[str, Any], forward: float) -> Work:
    wanted, chosen = pick(settings, ADAPTERS), settings["adapters"]
    folder = world.folder("adapters", wanted)
    left = sum(not (folder / f"task-{i}").exists() for i in range(chosen["count"]))
    counts = [torch.bincount(world.open(name, "train").labels).float().mean().item() for name in chosen["of"]]
    images = left * chosen["n_way"] * sum(counts) / len(counts) * chosen["tune"].get("epochs", 10)
    return Work("tune adapters", key_of(wanted), left, "adapters", images * PASSES * forward)


def _inversion(world: World, settings: Mapping[str, Any], forward: float) -> Work:
    wanted, config, chosen = pick(settings, SURROGATES), inversion_config(settings), settings["adapters"]
    backbone = world.backbone(settings)
    count = len(world.adapters(settings)) if chosen.get("folder") else chosen["count"]
    images = count * chosen["n_way"] * config.images_per_class
    if settings["surrogates"]["images"] == "real":
        return Work("label real images", key_of(wanted), images, "images", images * forward)
    wanted["surrogates"] = {k: v for k, v in wanted["surrogates"].items() if k != "mask"}
    folder = world.folder("surrogates", wanted)
    left = sum(not (folder / f"{i}.safetensors").exists() for i in range(count))
    pruned = forward_flops(backbone, backbone.image_size, config.prune)
    share = 1 - config.prune_from if config.prune else 0.0
    step = (1 - share) * forward + share * pruned
    prior = world.prior(config)
    if prior is not None:
        step += network_flops(prior.network, prior.size or backbone.image_size)
    images = images * left // max(1, count)
    return Work("invert adapters", key_of(wanted), images, "images", images * config.steps * PASSES * step)


def _meta_training(settings: Mapping[str, Any], key: str, forward: float) -> Work:
    config = meta_config(settings)
    images = config.steps * config.n_way * (config.n_shot + config.n_query)
    passes = ALL_WEIGHTS if settings["learn"] == "everything" else PASSES
    flops = images * (1 - (config.sparsity or 0)) * passes * forward
    return Work("meta-train", key, config.steps, "steps", flops)


def _from_weights(world: World, settings: Mapping[str, Any], method: FromWeights, forward: float) -> Work:
    """A meta-LoRA of the default preset, once for all sets and shots: steps on painted pictures, and the guide's
    features of them."""
    config, backbone = RecycleConfig.weights(), world.backbone(settings)
    meta = config.meta
    images = method.steps * meta.n_way * (meta.n_shot + meta.n_query)
    side = meta.guide_size or max(native_size(backbone), backbone.image_size)
    guide = config.inversion.pictures * (1 + meta.flip) * forward_flops(backbone, side)
    key = key_of(pick(settings, (*ADAPTERS, "method", "options")))
    return Work("meta-train", key, method.steps, "steps", images * PASSES * forward + guide)


def _evaluation(world: World, settings: Mapping[str, Any], key: str, forward: float) -> Work:
    """Features of the images that tasks use; for methods that run the model anew, of each task and its training."""
    config = task_config(settings)
    method: Any = make_method(settings["method"], **method_options(settings))
    needs = find_method(settings["method"]).needs
    per_task = config.n_way * (config.n_shot + config.n_query)
    sets, tasks = set_names(settings), config.n_tasks
    if needs.rate and method.rate is None and validation_set(world, settings):
        tasks += config.n_validation_tasks * len(method.rates)
    heavy = needs.fine_tuning and settings["method"] != "linear-probe"
    if not heavy:
        images = sum(min(len(world.open(name, "test")), tasks * per_task) for name in sets)
        model = pick(
            settings, ("base", "weights", "set")
        )  # whose features serve all shots, and methods that adapt none
        if needs.adapters:
            model |= pick(settings, ("adapters", "surrogates", "learn", "meta", "method", "options", "seed"))
        return Work("features", key_of(model), images, "images", images * forward)
    support = config.n_way * config.n_shot
    if hasattr(method, "budget"):
        training = method.budget * support * (1 + method.views)
    else:
        passes = ALL_WEIGHTS if settings["method"] in ("full", "pmf") else PASSES
        training = method.steps * support * passes * (2 if settings["method"] == "pmf" else 1)
    images = len(sets) * tasks * (per_task + math.ceil(training))
    return Work("fine-tune and answer tasks", key, config.n_tasks * len(sets), "tasks", images * forward)
