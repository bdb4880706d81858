"""`--plan`: what an experiment will do, how much of it is done, and about how long the rest takes here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..costs import flops_per_second
from ..plan import _duration
from .costs import Work, works
from .run import Cell, Run
from .world import World

UNKNOWN = "not estimated"


def plan_run(run: Run) -> str:
    """A table of the work that is left. Estimates: one product of the model's shape is timed.

    Args:
        run: prepared.
    """
    todo, speed = run.todo(), Speed(run.world)
    found: dict[tuple[str, str], Work] = {}
    for cell in todo:
        for work in works(run.world, cell.settings, cell.key):
            before = found.setdefault((work.stage, work.key), work)
            found[work.stage, work.key] = max(before, work, key=lambda one: one.amount)
    stages: dict[str, list[Work]] = {}
    for work in found.values():
        stages.setdefault(work.stage, []).append(work)
    rows, total, unknown = [("stage", "amount", "about")], 0.0, False
    for stage, parts in stages.items():
        seconds = [speed.seconds(work) for work in parts]
        known = [s for s in seconds if s is not None]
        unknown |= len(known) < len(seconds)
        about = _duration(sum(known)) if len(known) == len(seconds) else UNKNOWN
        rows.append((stage, f"{sum(work.amount for work in parts)} {parts[0].unit}", about))
        total += sum(known)
    rows.append(("", "", _duration(total) + (" and what is not estimated" if unknown else "")))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    missing = [cell for cell in run.cells if cell.missing]
    different = len({cell.key for cell in run.cells if not cell.missing})
    title = f"{run.experiment.title}: {len(run.cells)} cells, {different} different ones, {different - len(todo)} done"
    note = ["A rehearsal at small size."] if run.quick else []
    note += [f"{len(missing)} cells cannot run; the first: {missing[0].missing}"] if missing else []
    return "\n".join([title, run.machine, *note, "", *table])


class Speed:
    """How fast this device is, timed once for each width of a model: the best of three, as other programs slow some."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known: dict[int, float] = {}

    def seconds(self, work: Work) -> float | None:
        """That some work takes; None where nobody knows."""
        if work.flops is None:
            return None
        if work.width not in self.known:
            rates = [flops_per_second(self.world.device, self.world.dtype, work.width) for _ in range(3)]
            self.known[work.width] = max(rates)
        return work.flops / self.known[work.width]


def cheapest_first(run: Run) -> list[Cell]:
    """The cells that are left, each time the one that adds least to what those before it made; those whose cost nobody
    knows last."""
    speed = Speed(run.world)
    left: list[tuple[Cell, dict[Any, float]]] = []
    for cell in run.todo():
        costs = {(w.stage, w.key): _or_endless(speed.seconds(w)) for w in works(run.world, cell.settings, cell.key)}
        left.append((cell, costs))
    return list(_greedy(left))


def _greedy(left: list[tuple[Cell, dict[Any, float]]]) -> Iterator[Cell]:
    made: dict[Any, float] = {}
    while left:
        extra = [sum(_more(seconds, made.get(key, 0.0)) for key, seconds in costs.items()) for _, costs in left]
        cell, costs = left.pop(extra.index(min(extra)))
        made |= {key: max(seconds, made.get(key, 0.0)) for key, seconds in costs.items()}
        yield cell


def _more(seconds: float, made: float) -> float:
    """What is left of some work once some of it is made; both may be endless."""
    return seconds - made if seconds > made else 0.0


def _or_endless(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds
