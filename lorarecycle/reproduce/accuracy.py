"""Cells of accuracy: a method on the tasks of a set, whatever it is made of; and what it checks beforehand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..data.lazy import Dataset
from ..fewshot.evaluate import evaluate
from ..fewshot.images import TaskImages
from ..fewshot.methods.base import Method, Task
from ..fewshot.methods.nearest import NearestMean
from ..fewshot.methods.recycled import LoRARecycle
from ..fewshot.methods.registry import find_method, make_method
from ..vit.backbone import Backbone
from .learning import learned
from .memory import peak, reset_peak
from .sets import check_apart, with_enough
from .settings import key_of, meta_config, method_options, pick, set_names, task_config
from .world import World

Result = dict[str, Any]
KEPT = 12
"""Prepared methods that stay in memory."""


def accuracy(world: World, settings: Mapping[str, Any]) -> Result:
    """Accuracy in percent with its interval, tasks per second (features that an earlier cell of the set left are not
    counted), seconds of preparation, peak memory in GB."""
    method: Any = make_method(settings["method"], **method_options(settings))
    needs, config = method.needs, task_config(settings)
    model, meta_lora = world.model(settings), None
    reset_peak(world.device)
    if isinstance(method, LoRARecycle):
        model, meta_lora = learned(world, settings)
        method, needs = NearestMean(distance=method.distance), NearestMean.needs
        reset_peak(world.device)
    elif not needs.rate:
        method = _ready(world, settings, method, model)
    found = {}
    for name in set_names(settings):
        data = with_enough(world.open(name, "test"), config.n_shot + config.n_query, config.n_way, name)
        aside = None
        if needs.rate and method.rate is None:
            source = validation_set(world, settings)
            aside = with_enough(world.open(source, "val"), config.n_shot + config.n_query, config.n_way, source)
        result = evaluate(
            model,
            data,
            meta_lora,
            method=method,
            adapters=world.adapters(settings) if method.needs.adapters else (),
            surrogates=world.surrogates(settings) if method.needs.surrogates else None,
            validation=aside,
            config=config,
            images=_images(world, settings, name, data, model),
            workers=world.workers,
            quiet=world.quiet,
        )
        found[name] = {
            **result.summary(),
            "prepare_seconds": getattr(method, "seconds", result.prepare_seconds),
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
    key = f"{name} {len(data)} {model.fit}"
    if key not in world.images:
        if len(world.images) >= KEPT:
            world.images.clear()
        world.images[key] = TaskImages(data.images, model.fit, workers=world.workers)
    return world.images[key]


class Ready(Method):
    """A method that is prepared already.

    Args:
        method: prepared.
        seconds: that it took.
    """

    def __init__(self, method: Method, seconds: float) -> None:
        self.method = method
        self.seconds = seconds

    def _prepare(self, *arguments: Any) -> None:
        pass

    def solve(self, task: Task) -> Tensor:
        return self.method.solve(task)

    def solve_all(self, tasks: Sequence[Task]) -> Iterator[Tensor]:
        return self.method.solve_all(tasks)


def _ready(world: World, settings: Mapping[str, Any], method: Method, model: Backbone) -> Ready:
    """A method whose preparation hangs on no task, prepared once for all sets and shots; the last few are kept."""
    needs = method.needs
    names = [name for name in reads(settings) if name not in ("set", "tasks")]
    key = key_of(pick(settings, names))
    if key not in world.prepared:
        start = time.perf_counter()
        method.prepare(
            model,
            world.adapters(settings) if needs.adapters else (),
            world.surrogates(settings) if needs.surrogates else None,
            None,
            world.text_encoder if needs.text_encoder else None,
        )
        while len(world.prepared) >= KEPT:
            world.prepared.pop(next(iter(world.prepared)))
        world.prepared[key] = method, time.perf_counter() - start
    return Ready(*world.prepared[key])


def reads(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings that move a cell of accuracy; others may differ between tables that share it."""
    method: Any = make_method(settings["method"], **method_options(settings))
    needs, names = method.needs, ["base", "weights", "method", "options", "set", "tasks", "seed"]
    recycled = isinstance(method, LoRARecycle)
    names += ["adapters"] if needs.adapters or needs.surrogates else []
    names += ["surrogates"] if needs.surrogates else []
    names += ["learn", "meta"] if recycled else []
    names += ["validation"] if needs.rate and method.rate is None else []
    return tuple(names)


def validation_set(world: World, settings: Mapping[str, Any]) -> str:
    """The set whose validation classes rates are chosen on: `validation`, or the first that adapters are of."""
    return settings["validation"] or (settings["adapters"].get("of") or set_names(settings))[0]


def check(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that a cell can run, without running anything.

    Raises:
        ValueError, FileNotFoundError, ImportError: sets, classes, images, packages, a text encoder that are missing.
    """
    name = settings["method"]
    method: Any = make_method(name, **method_options(settings))
    needs, config, chosen = find_method(name).needs, task_config(settings), settings["adapters"]
    missing = [package for package in needs.packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"method {name!r} needs {', '.join(missing)}; `pip install {' '.join(missing)}`.")
    words = needs.text_encoder or (needs.surrogates and settings["surrogates"].get("head") == "text")
    if words and world.text_encoder is None:
        raise ValueError(f"`text_encoder` must be given for method {name!r}, got none: a CLIP model of transformers.")
    per_class = config.n_shot + config.n_query
    for one in set_names(settings):
        with_enough(world.open(one, "test"), per_class, config.n_way, f"set {one!r}")
    if needs.rate and getattr(method, "rate", None) is None:
        source = validation_set(world, settings)
        with_enough(world.open(source, "val"), per_class, config.n_way, f"set {source!r}")
    if not needs.adapters and not needs.surrogates:
        return
    if chosen.get("folder"):
        _check_folder(world, settings, heads=needs.heads, surrogates=needs.surrogates)
        return
    for one in chosen["of"]:
        train = with_enough(world.open(one, "train"), 1, chosen["n_way"], f"set {one!r}")
        if one in set_names(settings):
            check_apart(train, world.open(one, "test"), one)
    if isinstance(method, LoRARecycle):
        meta = meta_config(settings)
        if meta.n_way > chosen["n_way"] and meta.interpolation < 1:
            raise ValueError(f"`meta.n_way` must be at most `adapters.n_way`, got {meta.n_way} and {chosen['n_way']}.")


def _check_folder(world: World, settings: Mapping[str, Any], *, heads: bool, surrogates: bool) -> None:
    """Make sure that adapters of the user's own are there and fit, and have heads where those are needed."""
    place = world.place(settings["adapters"]["folder"])
    if not place.is_dir():
        raise FileNotFoundError(f"`adapters.folder` must be a folder of adapters, got {place}.")
    if surrogates and settings["surrogates"]["images"] == "real":
        raise ValueError("`surrogates.images` must be 'inverted' for adapters of a folder, got 'real'.")
    headless = [adapter.name for adapter in world.adapters(settings) if adapter.head is None]
    if heads and headless:
        raise ValueError(
            f"`adapters.folder` must hold adapters with classification heads for method {settings['method']!r}, got "
            f"none in {', '.join(headless[:5])}; choose a method that needs none, such as 'recycle-weights'."
        )
