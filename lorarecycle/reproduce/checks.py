"""What a cell needs, made sure of before anything is tuned, inverted or measured."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ..fewshot.evaluate import seen_names
from ..fewshot.methods.recycled import LoRARecycle
from ..meta.episodes import check_episodes
from .accuracy import chooses_rate, validation_set
from .sets import check_apart, with_enough
from .settings import inversion_config, make_cell_method, meta_config, set_names, task_config
from .world import World

logger: logging.Logger = logging.getLogger(__name__)


def check(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that a cell can run, without running anything.

    Raises:
        ValueError, FileNotFoundError, ImportError: sets, classes, images, packages, a text encoder that are missing.
    """
    name = settings["method"]
    method: Any = make_cell_method(settings)
    needs, config = method.needs, task_config(settings)
    missing = [package for package in needs.packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"method {name!r} needs {', '.join(missing)}; `pip install {' '.join(missing)}`.")
    if needs.text_encoder and world.text_encoder is None:
        raise ValueError(f"`text_encoder` must be given for method {name!r}, got none: a CLIP model of transformers.")
    if config.n_way > getattr(method, "max_way", config.n_way):
        raise ValueError(
            f"`options.max_way` must be at least `tasks.n_way` for method {name!r}, got {method.max_way} and "
            f"{config.n_way}."
        )
    per_class = config.n_shot + config.n_query
    for one in set_names(settings):
        with_enough(world.open(one, "test"), per_class, config.n_way, f"set {one!r}")
    if chooses_rate(method):
        source = validation_set(settings)
        try:
            aside = world.open(source, "val")
        except ValueError as error:
            raise ValueError(
                f"`validation` must name a set with validation classes, on which method {name!r} chooses its rate, got "
                f"{source!r} ({error}); or give the rate in `options`."
            ) from error
        with_enough(aside, per_class, config.n_way, f"set {source!r}")
    if not needs.adapters and not needs.surrogates:
        return
    check_adapters(world, settings, heads=needs.heads or needs.surrogates, surrogates=needs.surrogates)
    check_unseen(world, settings)
    if isinstance(method, LoRARecycle):
        check_meta(world, settings)


def check_adapters(world: World, settings: Mapping[str, Any], *, heads: bool = True, surrogates: bool = True) -> None:
    """Make sure that adapters can be had, and surrogates of them, without tuning or inverting anything.

    Args:
        world: where the cell runs.
        settings: of the cell.
        heads: they must have classification heads.
        surrogates: images of their classes are wanted too.

    Raises:
        ValueError, FileNotFoundError: sets, folders, heads, a text encoder that are missing.
    """
    chosen, images = settings["adapters"], settings["surrogates"]
    if surrogates and images.get("head") == "text" and world.text_encoder is None:
        raise ValueError("`text_encoder` must be given for `surrogates.head` 'text', got none: a CLIP model.")
    if not chosen.get("folder"):
        for one in chosen["of"]:
            with_enough(world.open(one, "train"), 1, chosen["n_way"], f"set {one!r}")
        return
    place = world.place(chosen["folder"])
    if not place.is_dir():
        raise FileNotFoundError(f"`adapters.folder` must be a folder of adapters, got {place}.")
    if surrogates and images["images"] == "real":
        raise ValueError("`surrogates.images` must be 'inverted' for adapters of a folder, got 'real'.")
    headless = [adapter.name for adapter in world.own_adapters(settings) if adapter.head is None]
    if heads and headless:
        what = f"method {settings['method']!r}" if settings["kind"] == "accuracy" else f"cells of {settings['kind']!r}"
        raise ValueError(
            f"`adapters.folder` must hold adapters with classification heads for {what}, got none in "
            f"{', '.join(headless[:5])}; choose a method that needs none, such as 'recycle-weights'."
        )


def check_unseen(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that no class that adapters were tuned on is tested on, see `check_apart`.

    Of adapters of a folder there are names only, which may mean other things: a line of the log tells of them.

    Raises:
        ValueError: one is.
    """
    chosen, tested = settings["adapters"], set_names(settings)
    if not chosen.get("folder"):
        for seen in chosen["of"]:
            for one in tested:
                other = None if seen == one else seen
                check_apart(world.open(seen, "train"), world.open(one, "test"), one, other)
        return
    for one in tested:
        both = seen_names(world.own_adapters(settings), world.open(one, "test").class_names)
        if both:
            text = "%d classes of set %r have the name of one that an adapter of %s was tuned on (%s): %s"
            shown, doubt = ", ".join(both[:5]), "the tasks are not of unseen classes, unless these are others"
            logger.warning(text, len(both), one, chosen["folder"], shown, doubt)


def check_meta(world: World, settings: Mapping[str, Any]) -> None:
    """Make sure that what learns can draw its episodes, where it draws any.

    Raises:
        ValueError: too few classes or images of an adapter, or a guide where all weights learn.
    """
    chosen, meta, count = settings["adapters"], meta_config(settings), world.count(settings)
    if settings["learn"] == "everything" and meta.guide_weight > 0:
        raise ValueError(f"`meta.guide_weight` must be 0 where `learn` is 'everything', got {meta.guide_weight}.")
    if settings["learn"] == "joint" or meta.steps == 0 or meta.guide_weight == 1:
        return  # no episode of classes is drawn
    per_class = inversion_config(settings).images_per_class
    if chosen.get("folder"):
        names = [a.head.class_names for a in world.own_adapters(settings)[:count] if a.head is not None]
    else:
        lists = world.class_lists(settings, count)
        names = [tuple(classes) for _, classes in lists]
        if settings["surrogates"]["images"] == "real":
            images = (world.open(one, "train").select_classes(classes).counts for one, classes in lists)
            per_class = min([per_class, chosen.get("per_class") or per_class, *itertools.chain.from_iterable(images)])
    meta = replace(meta, interpolation=0.0) if len(names) == 1 else meta
    check_episodes([len(own) for own in names], [f"adapter {i}" for i in range(len(names))], meta, names)
    if per_class < meta.n_shot + meta.n_query:
        raise ValueError(
            f"`surrogates` must have meta.n_shot + meta.n_query = {meta.n_shot + meta.n_query} images of a class, got "
            f"{per_class}; raise `images_per_class` (real ones: `adapters.per_class`), or lower those of `meta`."
        )
