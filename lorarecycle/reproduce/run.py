"""`reproduce`: an experiment's cells one after the other, each kept; results as JSON and as a table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.files import read_json, write_json, write_text
from ..runtime.progress import track
from .experiment import Column, Experiment, Row
from .facts import Facts
from .images import draw_grid, draw_map, draw_shots
from .kinds import find_kind
from .settings import Settings
from .table import markdown
from .world import World

logger: logging.Logger = logging.getLogger(__name__)

WRITE_EVERY = 30.0
"""Seconds between tables that are written on the way."""


class CellsFailed(RuntimeError):
    """Cells of a run failed; the others are done.

    Attributes:
        table: file of what is done.
        failures: a line for each.
    """

    def __init__(self, table: Path, failures: list[str]) -> None:
        super().__init__("; ".join([f"{len(failures)} cells failed", *failures]))
        self.table = table
        self.failures = failures


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        row, column: where it stands.
        asked: settings, as the file says.
        settings: those that it runs with; smaller in a rehearsal.
        takes_weights: they are those of the run's arguments.
        missing: why it cannot run, where that is put up with.
        facts: what it hangs on.
        key: names its file; equal for cells of equal facts, empty where it cannot run.
    """

    row: Row
    column: Column
    asked: Settings
    settings: Settings
    takes_weights: bool = False
    missing: str = ""
    facts: Facts = field(default_factory=dict)
    key: str = ""


@dataclass
class Run:
    """An experiment that is ready to run: everything is known and checked.

    Attributes:
        experiment: what is run.
        world: where.
        cells: row after row.
        quick: a rehearsal.
        machine: in words.
        order: of the cells that are left; column after column when None.
    """

    experiment: Experiment
    world: World
    cells: list[Cell]
    quick: bool
    machine: str
    order: Callable[[Run], list[Cell]] | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the table is written."""
        return self.world.work / self.experiment.name

    def path(self, cell: Cell) -> Path:
        """Where a cell's result is kept; tables share cells."""
        return self.world.work / "cells" / f"{cell.key}.json"

    def todo(self) -> list[Cell]:
        """Cells without a result, each once, those of a column together."""
        order = {column.name: i for i, column in enumerate(self.experiment.columns)}
        cells = sorted(self.cells, key=lambda cell: order[cell.column.name])
        found = {cell.key: cell for cell in reversed(cells) if not cell.missing and not self.path(cell).exists()}
        return list(reversed(list(found.values())))

    def __call__(self) -> Path:
        """Run what is not there yet; the table's file.

        Raises:
            CellsFailed: cells that failed, once all others are done; they are tried again by the next call.
        """
        self.failed.clear()
        write_json(self.world.work / "settings.json", {"quick": self.quick, "machine": self.machine})
        written = time.perf_counter()
        cells = self.todo() if self.order is None else self.order(self)
        for cell in track(cells, self.experiment.name, unit="cells", quiet=self.world.quiet):
            try:
                result = find_kind(cell.settings).run(self.world, cell.settings)
            except Exception as error:  # out of memory, say: the other cells are worth having
                reason = " ".join(str(error).split()) or "no reason given"
                self.failed[cell.key] = f"{cell.row.name}, {cell.column.name}: {type(error).__name__}: {reason}"
                logger.error("failed: %s", self.failed[cell.key])
                logger.debug("failed: %s", cell.row.name, exc_info=True)
                continue
            write_json(self.path(cell), {"facts": cell.facts, "result": result})
            logger.info("%s, %s: %s", cell.row.name, cell.column.name, result)
            if time.perf_counter() - written > WRITE_EVERY:
                self.write()
                written = time.perf_counter()
        table = self.write()
        try:
            self.draw()
        except Exception as error:
            if not self.failed:
                raise
            logger.error("the picture failed too: %s", error)
        if self.failed:
            raise CellsFailed(table, list(self.failed.values()))
        return table

    def results(self) -> Iterator[tuple[Cell, dict[str, Any] | None]]:
        """Every cell with its result, None where there is none."""
        for cell in self.cells:
            path = self.path(cell)
            yield cell, read_json(path)["result"] if not cell.missing and path.exists() else None

    def draw(self) -> Path | None:
        """The experiment's picture, where it has one and all that it takes."""
        kind, path = self.experiment.picture, self.folder / f"{self.experiment.name}.png"
        found = [(cell, result) for cell, result in self.results() if result is not None]
        if kind is None or not found:
            return None
        if kind == "shots":
            lines: dict[str, list[tuple[int, float, float]]] = {}
            for cell, result in found:
                if "accuracy" in result:
                    point = (cell.settings["tasks"]["n_shot"], result["accuracy"], result.get("interval", 0.0))
                    lines.setdefault(cell.row.name, []).append(point)
            return draw_shots(lines, path)
        sheets = {cell.key: (cell.row.name, self.world.work / result["file"]) for cell, result in found}
        return (draw_grid if kind == "grid" else draw_map)(list(sheets.values()), path)

    def write(self) -> Path:
        """Write results.json and table.md as far as there are results; the latter's path."""
        found = list(self.results())
        record = {
            "experiment": self.experiment.name,
            "title": self.experiment.title,
            "source": self.experiment.source,
            "quick": self.quick,
            "machine": self.machine,
            "models": sorted({cell.settings["base"] for cell, _ in found if "base" in cell.facts}),
            "cells": [
                {
                    "row": cell.row.name,
                    "column": cell.column.name,
                    "shows": cell.column.shows,
                    "asked": cell.asked,
                    "settings": cell.settings,
                    "key": cell.key,
                    "result": result,
                    **({"not run": cell.missing} if cell.missing else {}),
                }
                for cell, result in found
            ],
        }
        write_json(self.folder / "results.json", record)
        there = {(cell.row.name, cell.column.name): result for cell, result in found if result is not None}
        return write_text(self.folder / "table.md", markdown(self.experiment, there, record))
