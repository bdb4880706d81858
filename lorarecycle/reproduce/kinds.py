"""The kinds of cells: how each runs, which settings move it, and what it checks before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import accuracy, generation, images, language, losses, speed
from .settings import Settings, key_of, pick
from .world import World

Run = Callable[[World, Mapping[str, Any]], dict[str, Any]]


class Kind(NamedTuple):
    """A kind of cell."""

    run: Run
    reads: Callable[[Mapping[str, Any]], tuple[str, ...]]
    """Names of the settings that move its result."""
    check: Callable[[World, Mapping[str, Any]], None]
    shows: tuple[str, ...]
    """Figures of its result that a column may show; where none are named, whatever the result has."""


def _adapters(world: World, settings: Mapping[str, Any]) -> None:
    """Cells that need adapters with heads, and surrogates: what LoRA Recycle needs."""
    accuracy.check(world, {**settings, "kind": "accuracy", "method": "lora-recycle", "options": {}})


def _nothing(world: World, settings: Mapping[str, Any]) -> None:
    """Cells that need a model alone."""


KINDS: dict[str, Kind] = {
    "accuracy": Kind(accuracy.accuracy, accuracy.reads, accuracy.check, ("accuracy", "tasks_per_second", "memory")),
    "inversion": Kind(
        speed.inversion_cost,
        lambda s: speed.INVERSION,
        _adapters,
        ("iterations_per_second", "gflops", "memory"),
    ),
    "training": Kind(
        speed.training_cost,
        lambda s: speed.TRAINING,
        _nothing,
        ("iterations_per_second", "gflops", "memory"),
    ),
    "losses": Kind(losses.area_losses, lambda s: losses.READS, _adapters, ("before", "after")),
    "pictures": Kind(images.pictures, lambda s: images.READS, _adapters, ("images", "loss")),
    "generation": Kind(
        generation.generation,
        lambda s: generation.READS,
        generation.check,
        ("accuracy", "storage", *(f"task {i}" for i in range(1, 21))),
    ),
    "language": Kind(language.language, lambda s: language.READS, language.check, ()),
}


def find_kind(settings: Mapping[str, Any]) -> Kind:
    """The kind of a cell.

    Raises:
        ValueError: an unknown one; the known are listed.
    """
    if settings["kind"] not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {settings['kind']!r}.")
    return KINDS[settings["kind"]]


def read_settings(settings: Mapping[str, Any]) -> Settings:
    """Of a cell's settings those that move its result: cells of equal ones are one cell, in whatever table."""
    return {"kind": settings["kind"], **pick(settings, find_kind(settings).reads(settings))}


def cell_key(settings: Mapping[str, Any]) -> str:
    """Names a cell's file."""
    return key_of(read_settings(settings))
