"""The settings of a cell: what files say laid over one another, checked, and named by what a cell reads of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, cast

from ..config import EvaluateConfig, InversionConfig, MetaConfig, RecycleConfig, TuneConfig, as_config
from ..fewshot.methods.registry import find_method, make_method

Settings = dict[str, Any]
"""Names and JSON values; see `docs/guides/reproduce.md` for what each means."""

PARTS = {
    "adapters": ("of", "count", "n_way", "ranks", "tune", "folder"),
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
    """Settings laid over one another, the last on top; mappings are merged name by name, null takes a value away."""
    found: Settings = {}
    for layer in layers:
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
    return as_config(EvaluateConfig, {**settings["tasks"], "seed": settings["seed"]}, argument="tasks")


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
    find_method(settings["method"])
    make_method(settings["method"], **method_options(settings))
    adapters = settings["adapters"]
    if not adapters.get("folder") and (not adapters.get("of") or adapters["count"] < 1 or not adapters["ranks"]):
        raise ValueError(f"`adapters` must name sets (`of`), a `count` of at least 1 and `ranks`, got {adapters}.")
    for r in adapters["ranks"]:
        tune_config(adapters["tune"], r, 0)
    inversion_config(settings), meta_config(settings), task_config(settings)


def method_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, lists as tuples."""
    return _tuples(settings["options"], tuple(settings["options"]))


def key_of(settings: Mapping[str, Any]) -> str:
    """Sixteen digits that name settings: equal ones, equal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def pick(settings: Mapping[str, Any], names: Sequence[str]) -> Settings:
    """Some settings."""
    return {name: settings[name] for name in names if name in settings}


def _tuples(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in settings.items()}


def _known(given: Any, names: Sequence[str], what: str) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"`{what}` must be an object of names and values, got {type(given).__name__}.")
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"`{what}` must hold some of {', '.join(cast(Sequence[str], names))}, got {unknown[0]!r}.")
