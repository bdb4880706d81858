"""Cells of ICM-LoRA: adapters that are generated for tasks, beside the ones that were tuned (Tab. 1, 3 to 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import as_plain
from ..data.dataset import LabelledImages
from ..data.images import normalize
from ..data.lazy import Dataset
from ..generate import CondPDiff, LoRAGenerator, ModelSoup, task_vector, text_vector
from ..generate.generator import Generator
from ..runtime.seeds import derive, stream
from ..tuning import tune
from ..vit.backbone import Backbone
from ..vit.features import extract_features
from .facts import Facts
from .sets import with_enough
from .settings import key_of, set_names, tune_config
from .stages import draw_class_lists
from .world import World

GENERATORS: dict[str, type[Generator]] = {"soup": ModelSoup, "cond-p-diff": CondPDiff, "icm-lora": LoRAGenerator}
DEFAULTS: dict[str, Any] = {"r": 2, "tasks": 5, "per_class": 20, "samples": 1, "vector": "vision"}
"""What `generator` leaves open."""
N_WAY = 5
DESCRIPTION = "Tell apart {}."


class Task(NamedTuple):
    """Five classes: images to tune on, and others of the same classes to test on."""

    images: LabelledImages
    test: LabelledImages


def generation(world: World, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy in percent on other images of the tasks' classes ("task 1" ..., and their mean as "accuracy"), and
    "storage" in MB: of all that the method keeps for all tasks.

    Originals and generated adapters answer with their own heads; the plain model by the nearest class mean of the
    images that the others were tuned on. `generator.method` "data" has storage alone.
    """
    chosen = settled(settings)
    method, samples = chosen["method"], chosen["samples"]
    tasks = make_tasks(world, settings)
    if method == "data":
        return {"storage": sum(task.images.images.numel() for task in tasks) / 1e6}
    model, found = world.model(settings), []
    if method == "plain":
        found = [mean_accuracy(model, task) for task in tasks]
        return _figures(found, 0.0)
    runs = [checkpoints(world, settings, i, task) for i, task in enumerate(tasks)]
    if method == "original":
        found = [head_accuracy(model, run[-1], task.test) for run, task in zip(runs, tasks, strict=True)]
        folders = [run_folder(world, settings, i) for i in range(len(tasks))]
        return _figures(found, sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file()))
    vectors = [vector(world, settings, task) for task in tasks]
    made, size = generator(world, settings, runs, vectors)
    for task, asked in zip(tasks, vectors, strict=True):
        adapters = made.sample(asked, samples, seed=settings["seed"])
        each = [head_accuracy(model, adapter, task.test) for adapter in adapters if isinstance(adapter, Adapter)]
        found.append(sum(each) / len(each))
    return _figures(found, size)


def check(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that there are classes and images enough, and an encoder where text is read.

    Raises:
        ValueError: there are not.
    """
    chosen = settled(settings)
    if chosen.get("method") not in (*GENERATORS, "original", "plain", "data"):
        raise ValueError(f"`generator.method` must be given, one of {', '.join(GENERATORS)}, original, plain, data.")
    generator_config(chosen["method"], chosen["config"], settings["seed"])
    _enough(world, settings)
    if chosen["vector"] != "vision" and world.encode is None:
        raise ValueError("`text_encoder` must be given for text task vectors, got none: a CLIP model of transformers.")
    tune_config(chosen["tune"], chosen["r"], 0)


def _enough(world: World, settings: Mapping[str, Any]) -> Dataset:
    """The train classes that have images to tune on and to test on."""
    count = settled(settings)["per_class"] + 1
    return with_enough(world.open(set_names(settings)[0], "train"), count, N_WAY, "the tasks' set")


def facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves such a cell."""
    chosen = settled(settings)
    if chosen["method"] in GENERATORS:
        return {**_generator_facts(world, settings), "samples": chosen["samples"]}
    made = _task_facts if chosen["method"] in ("data", "plain") else _run_facts  # the former tune nothing
    return {**made(world, settings), "method": chosen["method"], "tasks": chosen["tasks"]}


def _task_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves the images of the tasks, and the plain model's answers."""
    whole, classes = world.open(set_names(settings)[0], "train"), _enough(world, settings).class_names
    return {
        **world.base_facts(settings),
        "set": whole.digest(),  # known already, where that of some classes would read their images again
        **({"classes": classes} if classes != whole.class_names else {}),
        "seed": settings["seed"],
        "per_class": settled(settings)["per_class"],
    }


def _run_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves the adapters of the tasks: those of a rank serve every generator."""
    chosen = settled(settings)
    tune = as_plain(tune_config(chosen["tune"], chosen["r"], settings["seed"]))
    return {**_task_facts(world, settings), "tune": tune}


def _generator_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves a generator, once it has its adapters."""
    chosen = settled(settings)
    return {
        **_run_facts(world, settings),
        "tasks": chosen["tasks"],
        "method": chosen["method"],
        "config": as_plain(generator_config(chosen["method"], chosen["config"], settings["seed"])),
        "vector": chosen["vector"],
        "text_encoder": None if chosen["vector"] == "vision" else world.text_facts(),
    }


def make_tasks(world: World, settings: Mapping[str, Any]) -> list[Task]:
    """Tasks of train classes; each class's images parted into those to tune on and the rest."""
    chosen, seed = settled(settings), settings["seed"]
    data = _enough(world, settings)
    fit, tasks = world.backbone(settings).fit, []
    for i, names in enumerate(draw_class_lists(data.class_names, chosen["tasks"], N_WAY, seed=seed)):
        images = data.select_classes(names).load(fit, workers=world.workers)
        tasks.append(Task(*images.split(chosen["per_class"], stream(seed, "task", i))))
    return tasks


def run_folder(world: World, settings: Mapping[str, Any], i: int) -> Path:
    """Where the checkpoints of a task are kept."""
    return world.folder("icm-adapters", _run_facts(world, settings)) / f"task-{i}"


def checkpoints(world: World, settings: Mapping[str, Any], i: int, task: Task) -> list[Adapter]:
    """The adapters after the last epochs of one task's tuning; all tasks start from the same factors."""
    folder = run_folder(world, settings, i)
    chosen = settled(settings)
    config = tune_config(chosen["tune"], chosen["r"], settings["seed"])
    if len(list(folder.glob("epoch-*"))) < config.save_last:
        resume = folder.with_name(f".{folder.name}.tuning.safetensors")
        tune(
            world.model(settings),
            task.images,
            config=config,
            name=f"task-{i}",
            checkpoint=resume,
            checkpoints=folder,
            quiet=world.quiet,
        )
        resume.unlink(missing_ok=True)
    return [Adapter.load(path) for path in sorted(folder.glob("epoch-*"))]


def vector(world: World, settings: Mapping[str, Any], task: Task) -> Tensor:
    """The task vector: of the images, of a sentence that names the classes, or both side by side (Tab. 6)."""
    kind, parts = settled(settings)["vector"], []
    if kind in ("vision", "both"):
        parts.append(task_vector(world.model(settings), task.images.images))
    if kind in ("text", "both"):
        assert world.encode is not None  # checked
        parts.append(text_vector(DESCRIPTION.format(", ".join(task.images.class_names)), world.encode))
    return torch.cat(parts)


def generator(
    world: World, settings: Mapping[str, Any], runs: list[list[Adapter]], vectors: list[Tensor]
) -> tuple[Generator, int]:
    """What learns from all checkpoints of all tasks, from its file where it is there; and the file's bytes."""
    chosen = settled(settings)
    kind = GENERATORS[chosen["method"]]
    path = world.work / "generators" / f"{key_of(_generator_facts(world, settings))}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        adapters = [adapter for run in runs for adapter in run]
        conditions = [v for run, v in zip(runs, vectors, strict=True) for _ in run]
        kind.fit(
            adapters,
            conditions,
            config=generator_config(chosen["method"], chosen["config"], settings["seed"]),
            device=str(world.device),
            checkpoint=path.with_suffix(".fit"),
            quiet=world.quiet,
        ).save(path)
        for left in (".fit", ".fit.diffusion"):
            path.with_suffix(left).unlink(missing_ok=True)
    return kind.load(path), path.stat().st_size


@torch.no_grad()
def head_accuracy(backbone: Backbone, adapter: Adapter, data: LabelledImages) -> float:
    """Accuracy in percent of an adapter under its own head."""
    assert adapter.head is not None
    model, hits = backbone.merge(adapter), 0
    for images, labels in zip(data.images.split(64), data.labels.split(64), strict=True):
        pixels = normalize(images.to(model.device), model.mean, model.std, model.dtype)
        logits = adapter.head(model(pixels, pool=adapter.head.pool))
        hits += int((logits.argmax(dim=1).cpu() == labels).sum())
    return 100 * hits / len(data)


def mean_accuracy(backbone: Backbone, task: Task) -> float:
    """Accuracy in percent of the plain model's nearest class mean."""
    features, queries = (extract_features(backbone, part.images) for part in task)
    means = torch.stack([features[task.images.labels == c].mean(dim=0) for c in range(len(task.images.class_names))])
    return 100 * (torch.cdist(queries, means).argmin(dim=1) == task.test.labels).float().mean().item()


def generator_config(method: str, given: Mapping[str, Any], seed: int) -> Any:
    """The settings of a generator from those that several share: what others have is left out. None where `method` is
    no generator.

    Raises:
        ValueError: a setting that none of them has.
    """
    kinds = {name: {f.name for f in fields(kind.config_class)} for name, kind in GENERATORS.items()}
    unknown = sorted(set(given) - set().union(*kinds.values()))
    if unknown or "seed" in given:
        raise ValueError(
            f"`config` of a generator must hold settings of {', '.join(GENERATORS)} but `seed`, which is the cell's, "
            f"got {[*unknown, 'seed'][0]!r}."
        )
    if method not in GENERATORS:
        return None
    own = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in kinds[method]}
    if "seed" in kinds[method]:
        own["seed"] = derive(seed, "generator") % 2**31
    return GENERATORS[method].config_class(**own)


def settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`generator` with its defaults."""
    given = settings.get("generator") or {}
    tune = {"save_last": 1, **(given.get("tune") or {})}
    return {**DEFAULTS, **given, "tune": tune, "config": given.get("config") or {}}


def _figures(accuracies: list[float], size: float) -> dict[str, Any]:
    each = {f"task {i}": value for i, value in enumerate(accuracies, 1)}
    return {**each, "accuracy": sum(accuracies) / len(accuracies), "storage": size / 1e6}
