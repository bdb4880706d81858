"""Cells of accuracy: a method on the tasks of a set, whatever it is made of; and what it checks beforehand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config import RecycleConfig, as_plain
from ..data.lazy import Dataset
from ..fewshot.evaluate import evaluate
from ..fewshot.images import TaskImages
from ..fewshot.methods.base import Given, Method, Task
from ..fewshot.methods.nearest import NearestMean
from ..fewshot.methods.recycled import FromWeights, LoRARecycle
from ..fewshot.tasks import sample_tasks
from ..vit.backbone import Backbone
from .facts import Facts, method_facts
from .learning import learned
from .memory import peak, reset_peak
from .sets import with_enough
from .settings import key_of, make_cell_method, set_names, task_config, tasks_seen
from .world import World

Result = dict[str, Any]
SHOWS = ("accuracy", "tasks_per_second", "prepare_seconds", "memory")
"""Figures that a table may show."""
KEPT = 12
"""Prepared methods that stay in memory."""


def accuracy(world: World, settings: Mapping[str, Any]) -> Result:
    """Accuracy in percent with its interval, tasks per second (features that an earlier cell of the set left are not
    counted), seconds of preparation (without adapters and surrogates, which cells share), peak memory of answering and
    fine-tuning in GB."""
    method: Any = make_cell_method(settings)
    needs, config = method.needs, task_config(settings)
    model, meta_lora, seconds = world.model(settings), None, None
    if isinstance(method, LoRARecycle):
        model, meta_lora, seconds = learned(world, settings)
        method, needs = NearestMean(distance=method.distance), NearestMean.needs
    elif not needs.rate:
        method, seconds = _ready(world, settings, method, model)
    adapters = world.adapters(settings) if method.needs.adapters else ()
    surrogates = world.surrogates(settings) if method.needs.surrogates else None
    reset_peak(world.device)
    found = {}
    for name in set_names(settings):
        data = with_enough(world.open(name, "test"), config.n_shot + config.n_query, config.n_way, name)
        aside = None
        if chooses_rate(method):
            source = validation_set(settings)
            aside = with_enough(world.open(source, "val"), config.n_shot + config.n_query, config.n_way, source)
        tasks = sample_tasks(
            data.labels,
            n_way=config.n_way,
            n_shot=config.n_shot,
            n_query=config.n_query,
            n_tasks=config.n_tasks,
            seed=config.seed,
            groups=data.groups,
        )
        result = evaluate(
            model,
            data,
            meta_lora,
            method=method,
            adapters=adapters,
            surrogates=surrogates,
            validation=aside,
            config=config,
            tasks=tasks.first(tasks_seen(settings)),
            images=_images(world, settings, name, data, model),
            workers=world.workers,
            quiet=world.quiet,
        )
        found[name] = {
            **result.summary(),
            "n_drawn": config.n_tasks,
            "prepare_seconds": result.prepare_seconds if needs.rate else seconds,
            "tasks_per_second": 1 / result.seconds_per_task,
            **({"rate": method.chosen} if needs.rate else {}),
        }
    first, n = next(iter(found.values())), len(found)
    return {
        **first,
        "accuracy": sum(f["accuracy"] for f in found.values()) / n,
        "interval": sum(f["interval"] ** 2 for f in found.values()) ** 0.5 / n,
        "memory": peak(world.device),
        **({"sets": {name: f["accuracy"] for name, f in found.items()}} if n > 1 else {}),
    }


def _images(world: World, settings: Mapping[str, Any], name: str, data: Dataset, model: Backbone) -> TaskImages | None:
    """The images of a set, their features kept for the cells that follow; None where tasks want few of them."""
    config = task_config(settings)
    if config.n_tasks * config.n_way * (config.n_shot + config.n_query) < len(data):
        return None
    key = name, data.class_names, model.fit
    if key not in world.images:
        if len(world.images) >= KEPT:
            world.images.clear()
        world.images[key] = TaskImages(data.images, model.fit, workers=world.workers)
    return world.images[key]


class Ready(Method):
    """A method that is prepared already."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def _prepare(self, given: Given) -> None:
        pass

    def solve(self, task: Task) -> Tensor:
        return self.method.solve(task)

    def solve_all(self, tasks: Sequence[Task]) -> Iterator[Tensor]:
        return self.method.solve_all(tasks)


def _ready(world: World, settings: Mapping[str, Any], method: Method, model: Backbone) -> tuple[Ready, float]:
    """A method whose preparation hangs on no task, prepared once for all sets and shots, and the seconds that it took,
    adapters and surrogates not counted; the last few are kept."""
    needs, key = method.needs, key_of(prepared_facts(world, settings, method))
    if key not in world.prepared:
        adapters = world.adapters(settings) if needs.adapters else ()
        surrogates = world.surrogates(settings) if needs.surrogates else None
        start = time.perf_counter()
        method.prepare(model, adapters, surrogates, None, world.text_encoder if needs.text_encoder else None)
        while len(world.prepared) >= KEPT:
            world.prepared.pop(next(iter(world.prepared)))
        world.prepared[key] = method, time.perf_counter() - start
    ready, seconds = world.prepared[key]
    return Ready(ready), seconds


def facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What moves a cell of accuracy."""
    method: Any = make_cell_method(settings)
    names, tasks = set_names(settings), as_plain(task_config(settings))
    del tasks["distance"]
    if not chooses_rate(method):
        del tasks["n_validation_tasks"]
    found = {
        **prepared_facts(world, settings, method),
        "tasks": {**tasks, "seen": tasks_seen(settings)},
        "tests": [world.open(name, "test").digest() for name in names],
    }
    found |= {"names": names} if len(names) > 1 else {}
    if chooses_rate(method):
        found["validation"] = world.open(validation_set(settings), "val").digest()
    return found


def prepared_facts(world: World, settings: Mapping[str, Any], method: Any) -> Facts:
    """What moves a method before it sees a task."""
    if isinstance(method, LoRARecycle):
        return {**world.learn_facts(settings), "method": "LoRARecycle", "distance": method.distance}
    found, needs = {**world.base_facts(settings), **method_facts(method)}, method.needs
    if needs.adapters or needs.surrogates:
        made = world.surrogate_facts(settings) if needs.surrogates else world.adapter_facts(settings)
        found |= {**made, "count": world.count(settings)}
    if isinstance(method, FromWeights):
        found["recipe"] = as_plain(RecycleConfig.weights())
    return found | ({"text_encoder": world.text_facts()} if needs.text_encoder else {})


def chooses_rate(method: Any) -> bool:
    """Whether a method chooses its rate on validation tasks."""
    return bool(method.needs.rate and method.rate is None)


def validation_set(settings: Mapping[str, Any]) -> str:
    """The set whose validation classes rates are chosen on: `validation`, or the first that adapters were tuned on;
    for adapters of a folder, the set that is tested on."""
    own = settings["adapters"].get("folder")
    return settings["validation"] or (set_names(settings) if own else settings["adapters"]["of"])[0]
