"""The kinds of cells: how each runs, what it hangs on, and what it checks before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import accuracy, checks, generation, images, language, losses, speed
from .facts import Facts
from .world import World

Run = Callable[[World, Mapping[str, Any]], dict[str, Any]]


class Kind(NamedTuple):
    """A kind of cell."""

    run: Run
    facts: Callable[[World, Mapping[str, Any]], Facts]
    """What it hangs on: cells of equal facts are one cell, in whatever table."""
    check: Callable[[World, Mapping[str, Any]], None]
    shows: tuple[str, ...]
    """Figures of its result that a column may show; where none are named, whatever the result has."""
    few_shot: bool = False
    """Whether it answers the tasks that `tasks` describes."""


def _nothing(world: World, settings: Mapping[str, Any]) -> None:
    """Cells that need a model alone."""


KINDS: dict[str, Kind] = {
    "accuracy": Kind(accuracy.accuracy, accuracy.facts, checks.check, accuracy.SHOWS, few_shot=True),
    "inversion": Kind(
        speed.inversion_cost,
        speed.inversion_facts,
        checks.check_adapters,
        ("iterations_per_second", "gflops", "memory"),
    ),
    "training": Kind(
        speed.training_cost, speed.training_facts, _nothing, ("iterations_per_second", "gflops", "memory")
    ),
    "losses": Kind(losses.area_losses, losses.facts, losses.check, ("before", "after")),
    "pictures": Kind(images.pictures, images.facts, checks.check_adapters, ("images", "loss")),
    "generation": Kind(
        generation.generation,
        generation.facts,
        generation.check,
        ("accuracy", "storage", *(f"task {i}" for i in range(1, 21))),
    ),
    "language": Kind(language.language, language.facts, language.check, ()),
}


def find_kind(settings: Mapping[str, Any]) -> Kind:
    """The kind of a cell.

    Raises:
        ValueError: an unknown one; the known are listed.
    """
    if settings["kind"] not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {settings['kind']!r}.")
    return KINDS[settings["kind"]]


def cell_facts(world: World, settings: Mapping[str, Any]) -> Facts:
    """What a cell hangs on; the digits of it name its file."""
    return {"kind": settings["kind"], **find_kind(settings).facts(world, settings)}
