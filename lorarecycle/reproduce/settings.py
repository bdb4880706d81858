"""The settings of a cell: what files say laid over one another, checked, and named by what a cell reads of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import resources
from typing import Any, cast

from ..config import EvaluateConfig, InversionConfig, MetaConfig, RecycleConfig, TuneConfig, as_config
from ..fewshot.methods.base import Method
from ..fewshot.methods.linear_probe import LinearProbe
from ..fewshot.methods.recycled import LoRARecycle
from ..fewshot.methods.registry import find_method, make_method

Settings = dict[str, Any]
"""Names and JSON values; see `docs/guides/reproduce.md` for what each means."""

PARTS = {
    "adapters": ("of", "count", "n_way", "per_class", "ranks", "tune", "folder"),
    "surrogates": ("images", "mask", "head", "inversion"),
    "generator": ("method", "config", "r", "tasks", "tune", "per_class", "samples", "vector"),
    "language": (
        *("texts", "method", "config", "model", "model_steps", "r", "steps", "checkpoints", "batch_size", "length"),
    ),
    "pictures": ("adapters", "per_class"),
    "measure": ("steps", "batch_size"),
}
"""Settings that have settings; those of `tune`, `inversion`, `meta`, `tasks` and `config` are the library's own."""
KNOWN = (
    *("kind", "base", "weights", "set", "method", "options", "adapters", "surrogates", "learn", "meta", "validation"),
    *("tasks", "seed", "area", "generator", "language", "pictures", "measure"),
)
CHOICES = {
    "learn": ("lora", "everything", "joint"),
    "surrogates.images": ("inverted", "real"),
    "surrogates.mask": ("last-layer", "first-layer"),
    "surrogates.head": ("own", "text"),
    "area": ("foreground", "background"),
    "generator.method": ("data", "original", "plain", "soup", "cond-p-diff", "icm-lora"),
    "generator.vector": ("vision", "text", "both"),
    "language.method": ("original", "plain", "soup", "cond-p-diff", "icm-lora"),
}


@cache
def _common() -> str:
    return resources.files(__package__).joinpath("experiments/common.json").read_text(encoding="utf-8")


def common() -> Settings:
    """The protocol that the tables share: LoRA Recycle, Sec. 5."""
    return json.loads(_common())


def merge(*layers: Mapping[str, Any]) -> Settings:
    """Settings laid over one another, the last on top; mappings are merged name by name, null takes a value away.

    Weights belong to the base that they are named with: another base on top takes them away.
    """
    found: Settings = {}
    for layer in layers:
        if layer.get("base", found.get("base")) != found.get("base"):
            found.pop("weights", None)
        for name, value in layer.items():
            below = found.get(name)
            if isinstance(value, Mapping) and isinstance(below, dict):
                found[name] = merge(below, value)
            elif value is None and isinstance(below, dict):
                found[name] = {}
            else:
                found[name] = merge(value) if isinstance(value, Mapping) else value
    return found


def inversion_config(settings: Mapping[str, Any]) -> InversionConfig:
    """How images are inverted: the paper's settings and what `surrogates.inversion` changes."""
    given = dict(settings["surrogates"]["inversion"])
    if "prune" in given:
        given["prune"] = {int(layer): float(ratio) for layer, ratio in given["prune"].items()}
    default = RecycleConfig.paper().inversion
    return as_config(InversionConfig, _tuples(given, ("betas",)), argument="surrogates.inversion", default=default)


def meta_config(settings: Mapping[str, Any]) -> MetaConfig:
    """How the meta-LoRA trains: the paper's settings, the method's sparsity, and what `meta` changes."""
    given = _tuples(settings["meta"], ("sites", "layers", "resolutions"))
    sparsity = getattr(make_method(settings["method"]), "sparsity", None)
    given = given if sparsity is None else {"sparsity": sparsity, **given}
    return as_config(MetaConfig, given, argument="meta", default=RecycleConfig.paper().meta)


def tune_config(settings: Mapping[str, Any], r: int, seed: int) -> TuneConfig:
    """How an adapter is tuned: the paper's settings and what `tune` changes, with scaling 1."""
    given = {"r": r, "lora_alpha": float(r), **_tuples(settings, ("sites", "layers")), "seed": seed}
    return as_config(TuneConfig, given, argument="tune")


def task_config(settings: Mapping[str, Any]) -> EvaluateConfig:
    """The tasks of a cell."""
    given = {name: value for name, value in settings["tasks"].items() if name != "n_tuned"}
    return as_config(EvaluateConfig, {**given, "seed": settings["seed"]}, argument="tasks")


def runs_anew(settings: Mapping[str, Any]) -> bool:
    """Whether the method runs the model again for each task; a linear probe does not."""
    entry = find_method(settings["method"])
    return entry.needs.fine_tuning and not issubclass(entry.kind, LinearProbe)


def tasks_seen(settings: Mapping[str, Any]) -> int:
    """How many of the tasks that are drawn a cell sees: the first `n_tuned` where its method runs the model anew."""
    drawn, tuned = task_config(settings).n_tasks, settings["tasks"].get("n_tuned")
    return min(drawn, tuned) if tuned and runs_anew(settings) else drawn


def make_cell_method(settings: Mapping[str, Any]) -> Method:
    """The method of a cell with its options, and the cell's seed where it has one."""
    options = _tuples(settings["options"], tuple(settings["options"]))
    kind: Any = find_method(settings["method"]).kind
    seeded = any(f.name == "seed" and f.init for f in fields(kind))
    return make_method(settings["method"], **({"seed": settings["seed"]} if seeded else {}), **options)


def set_names(settings: Mapping[str, Any]) -> list[str]:
    """The sets that a cell tests on; the mean over several is what it reports (Meta-Dataset)."""
    named = settings["set"]
    return [named] if isinstance(named, str) else list(named)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Make sure that names and values are known, before anything runs.

    Raises:
        ValueError, TypeError: what is not; the message lists what would be.
    """
    _known(settings, KNOWN, "settings")
    for part, names in PARTS.items():
        _known(settings.get(part) or {}, names, part)
    for path, allowed in CHOICES.items():
        value: Any = settings
        for name in path.split("."):
            value = (value or {}).get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"`{path}` must be one of {', '.join(allowed)}, got {value!r}.")
    _check_method(settings)
    _check_tasks(settings["tasks"])
    adapters = settings["adapters"]
    if not adapters.get("folder") and (not adapters.get("of") or adapters["count"] < 1 or not adapters["ranks"]):
        raise ValueError(f"`adapters` must name sets (`of`), a `count` of at least 1 and `ranks`, got {adapters}.")
    most = adapters.get("per_class")
    if most is not None and (adapters.get("folder") or not isinstance(most, int) or most < 1):
        raise ValueError(f"`adapters.per_class` must be at least 1, left out for adapters of a folder, got {most!r}.")
    for r in adapters["ranks"]:
        tune_config(adapters["tune"], r, 0)
    inversion_config(settings), meta_config(settings), task_config(settings)


def _check_method(settings: Mapping[str, Any]) -> None:
    """Options that a method does not have, or that something else decides."""
    options = settings["options"]
    if "seed" in options:
        raise ValueError(f"`options` must leave `seed` to the cell's own, got {options['seed']!r}; give `seed` there.")
    decided = sorted(set(options) - {"distance"})
    if isinstance(make_cell_method(settings), LoRARecycle) and decided:
        raise ValueError(
            f"`options` of method {settings['method']!r} may hold `distance` only, got {decided[0]!r}; `meta` says how "
            "it trains."
        )


def _check_tasks(tasks: Mapping[str, Any]) -> None:
    """Settings of tasks that would change nothing."""
    for name, place in (("distance", "options"), ("seed", "seed")):
        if name in tasks:
            raise ValueError(f"`tasks` must leave {name!r} out, got {tasks[name]!r}; give it in `{place}`.")
    tuned = tasks.get("n_tuned")
    if tuned is not None and not (isinstance(tuned, int) and tuned >= 1):
        raise ValueError(f"`tasks.n_tuned` must be at least 1, got {tuned!r}.")


def key_of(facts: Mapping[str, Any]) -> str:
    """Sixteen digits that name facts: equal ones, equal digits, 5 and 5.0 alike."""
    return hashlib.sha256(json.dumps(_alike(facts), sort_keys=True).encode()).hexdigest()[:16]


def _alike(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _alike(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_alike(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _tuples(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in settings.items()}


def _known(given: Any, names: Sequence[str], what: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"`{what}` must be an object of names and values, got {type(given).__name__}.")
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"`{what}` must hold some of {', '.join(cast(Sequence[str], names))}, got {unknown[0]!r}.")
